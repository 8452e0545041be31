// Token merging of one image (ToMe, section 3): the algorithm alone, for the adapters of the engines.
//
// It computes what the function body of ai.tocom::TokenMerge computes (export/operators/merge.py is the specification):
// a-tokens stand at even positions behind the prefix, b-tokens at odd ones; every a-token picks the b-token of the
// highest cosine, the first of equals; the r a-tokens with the highest cosines (the first of equals) merge into their
// pick as the size-weighted mean. A NaN ranks above every number and the first one wins, as in PyTorch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace tocom {

// bfloat16 as engines store it: the upper half of a float.
struct bf16 {
    std::uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(bf16 value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

inline void narrow(float value, float& out) { out = value; }

// To the nearest, ties to even; NaN stays NaN.
inline void narrow(float value, bf16& out) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = static_cast<std::uint16_t>(std::isnan(value) ? (bits >> 16) | 0x40u : rounded);
}

struct MergeShape {
    std::size_t tokens;     // N
    std::size_t channels;   // C
    std::size_t metric;     // D
    std::size_t heads;      // H, over which the metric is still to be averaged
    std::size_t removed;    // r, at most (N - protected) / 2
    std::size_t protected_; // prefix tokens, which stay first
    bool keep_order;        // unmerged a-tokens in position order, else in score order

    std::size_t first_a() const { return protected_ + protected_ % 2; }
    std::size_t first_b() const { return protected_ + 1 - protected_ % 2; }
    std::size_t a_count() const { return tokens > first_a() ? (tokens - first_a() + 1) / 2 : 0; }
    std::size_t b_count() const { return tokens > first_b() ? (tokens - first_b() + 1) / 2 : 0; }
    std::size_t unmerged() const { return a_count() - removed; }
    std::size_t remaining() const { return tokens - removed; }
    bool valid() const {
        return tokens > protected_ && channels > 0 && metric > 0 && heads > 0 && removed <= (tokens - protected_) / 2;
    }
};

// What is decided, as positions among the N tokens.
struct Decisions {
    std::int64_t* src; // [r], the best match first
    std::int64_t* dst; // [r]
    std::int64_t* unm; // [A - r]
};

// Work space of one thread, kept between calls.
class Merger {
  public:
    // Decides who merges into whom.
    //   metric [N, H, D]
    template <class M> void match(const MergeShape& shape, const M* metric, const Decisions& out) {
        gather_units(shape, metric);
        pick_best(shape);
        rank(shape, out);
    }

    // Merges as decided: rows first..last of what remains, so that threads can share an image.
    //   x [N, C], size [N] -> merged [N - r, C], merged_size [N - r]
    template <class T>
    void merge(const MergeShape& shape, const T* x, const float* size, const Decisions& decided, std::size_t first,
               std::size_t last, T* merged, float* merged_size) {
        link_sources(shape, decided);
        const std::size_t width = shape.channels, kept = shape.protected_ + shape.unmerged();
        for (std::size_t row = first; row < last; ++row) {
            T* out = merged + row * width;
            if (row >= kept) {
                merged_size[row] = merge_row(shape, x, size, row - kept, out);
                continue;
            }
            const auto from = row < shape.protected_ ? row : static_cast<std::size_t>(decided.unm[row - shape.protected_]);
            std::memcpy(out, x + from * width, width * sizeof(T));
            merged_size[row] = size[from];
        }
    }

  private:
    static constexpr std::size_t kLanes = 16;
    static constexpr std::size_t kRows = 8;
    typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

    // Unit vectors: a-tokens as rows, b-tokens as columns padded to whole vectors.
    template <class M> void gather_units(const MergeShape& shape, const M* metric) {
        const std::size_t a = shape.a_count(), b = shape.b_count(), depth = shape.metric;
        padded_ = (b + kLanes - 1) / kLanes * kLanes;
        units_a_.resize((a + kRows) * depth);
        units_b_.assign(padded_ * depth, 0.0f);
        row_.resize(depth);
        for (std::size_t i = 0; i < a; ++i) {
            unit(shape, metric + (shape.first_a() + 2 * i) * shape.heads * depth, units_a_.data() + i * depth);
        }
        for (std::size_t j = 0; j < b; ++j) {
            unit(shape, metric + (shape.first_b() + 2 * j) * shape.heads * depth, row_.data());
            for (std::size_t d = 0; d < depth; ++d) {
                units_b_[d * padded_ + j] = row_[d];
            }
        }
    }

    // The mean over heads of one token's metric, divided by its length.
    template <class M> static void unit(const MergeShape& shape, const M* row, float* out) {
        const std::size_t depth = shape.metric;
        for (std::size_t d = 0; d < depth; ++d) {
            out[d] = widen(row[d]);
        }
        for (std::size_t head = 1; head < shape.heads; ++head) {
            row += depth;
            for (std::size_t d = 0; d < depth; ++d) {
                out[d] += widen(row[d]);
            }
        }
        for (std::size_t d = 0; d < depth; ++d) {
            out[d] /= static_cast<float>(shape.heads);
        }
        const float norm = std::sqrt(sum_of_squares(out, depth));
        const float floor = norm < 1e-12f ? 1e-12f : norm; // NaN stays NaN
        for (std::size_t d = 0; d < depth; ++d) {
            out[d] /= floor;
        }
    }

    // In lanes: one after the other, every addition would wait for the one before.
    static float sum_of_squares(const float* values, std::size_t count) {
        const std::size_t whole = count - count % kLanes;
        Vector lanes = {}, next;
        for (std::size_t at = 0; at < whole; at += kLanes) {
            load(values + at, next);
            lanes += next * next;
        }
        float sum = 0.0f;
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            sum += lanes[lane];
        }
        for (std::size_t at = whole; at < count; ++at) {
            sum += values[at] * values[at];
        }
        return sum;
    }

    // Highest cosine of every a-token, and the first b-token that has it.
    void pick_best(const MergeShape& shape) {
        const std::size_t a = shape.a_count();
        best_.assign(a, 0.0f);
        pick_.assign(a, 0);
        if (shape.b_count() == 0) {
            return; // nothing to merge into, nothing is removed
        }
        scores_.resize(kRows * padded_);
        for (std::size_t i = 0; i < a; i += kRows) {
            const std::size_t rows = std::min(kRows, a - i);
            score_rows(units_a_.data() + i * shape.metric, shape.metric);
            for (std::size_t row = 0; row < rows; ++row) {
                first_best(scores_.data() + row * padded_, shape.b_count(), best_[i + row], pick_[i + row]);
            }
        }
    }

    // Scores of kRows a-tokens (rows behind the last one hold leftovers, which nobody reads).
    void score_rows(const float* a, std::size_t depth) {
        for (std::size_t at = 0; at < padded_; at += kLanes) {
            Vector sums[kRows] = {};
            const float* b = units_b_.data() + at;
            for (std::size_t d = 0; d < depth; ++d, b += padded_) {
                Vector column;
                load(b, column);
                for (std::size_t row = 0; row < kRows; ++row) {
                    sums[row] += a[row * depth + d] * column;
                }
            }
            for (std::size_t row = 0; row < kRows; ++row) {
                std::memcpy(scores_.data() + row * padded_ + at, &sums[row], sizeof(Vector));
            }
        }
    }

    // The highest of `count` scores and where it stands first; the padding behind them is overwritten.
    void first_best(float* scores, std::size_t count, float& best, std::size_t& pick) const {
        std::fill(scores + count, scores + padded_, -std::numeric_limits<float>::infinity());
        Vector top, next;
        load(scores, top);
        auto unordered = top != top;
        for (std::size_t at = kLanes; at < padded_; at += kLanes) {
            load(scores + at, next);
            unordered |= next != next;
            top = next > top ? next : top;
        }
        bool strange = false;
        best = top[0];
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            strange |= unordered[lane] != 0;
            best = top[lane] > best ? top[lane] : best;
        }
        const auto found = std::find_if(scores, scores + count, [&](float score) {
            return strange ? std::isnan(score) : score == best;
        });
        pick = static_cast<std::size_t>(found - scores);
        best = *found;
    }

    // By reference: a vector returned by value would be passed in another way on another processor.
    static void load(const float* from, Vector& into) { std::memcpy(&into, from, sizeof into); }

    // A total order: NaN above every number.
    static bool above(float one, float other) { return one > other || (std::isnan(one) && !std::isnan(other)); }

    void rank(const MergeShape& shape, const Decisions& out) {
        const std::size_t a = shape.a_count(), removed = shape.removed;
        order_.resize(a);
        for (std::size_t i = 0; i < a; ++i) {
            order_[i] = i;
        }
        const auto better = [this](std::size_t one, std::size_t other) {
            return above(best_[one], best_[other]) || (!above(best_[other], best_[one]) && one < other);
        };
        const auto cut = order_.begin() + static_cast<std::ptrdiff_t>(removed);
        if (shape.keep_order) {
            std::partial_sort(order_.begin(), cut, order_.end(), better);
            std::sort(cut, order_.end());
        } else {
            std::sort(order_.begin(), order_.end(), better);
        }
        for (std::size_t i = 0; i < a; ++i) {
            const auto at = static_cast<std::int64_t>(shape.first_a() + 2 * order_[i]);
            if (i < removed) {
                out.src[i] = at;
                out.dst[i] = static_cast<std::int64_t>(shape.first_b() + 2 * pick_[order_[i]]);
            } else {
                out.unm[i - removed] = at;
            }
        }
    }

    // Chains the sources of every b-token: head_[b] -> next_[i] -> ..., each one a position in src, or kNone.
    void link_sources(const MergeShape& shape, const Decisions& decided) {
        head_.assign(shape.b_count(), kNone);
        next_.resize(shape.removed);
        sources_ = decided.src;
        for (std::size_t i = shape.removed; i-- > 0;) {
            const std::size_t b = (static_cast<std::size_t>(decided.dst[i]) - shape.first_b()) / 2;
            next_[i] = head_[b];
            head_[b] = i;
        }
    }

    // One b-token with what merges into it; returns its size.
    template <class T> float merge_row(const MergeShape& shape, const T* x, const float* size, std::size_t b, T* out) {
        const std::size_t width = shape.channels, at = shape.first_b() + 2 * b, first = head_[b];
        const T* own = x + at * width;
        if (first == kNone) {
            std::memcpy(out, own, width * sizeof(T));
            return size[at];
        }
        sums_.resize(width);
        float total = size[at];
        for (std::size_t c = 0; c < width; ++c) {
            sums_[c] = widen(own[c]) * size[at];
        }
        for (std::size_t i = first; i != kNone; i = next_[i]) {
            const auto from = static_cast<std::size_t>(sources_[i]);
            const T* other = x + from * width;
            for (std::size_t c = 0; c < width; ++c) {
                sums_[c] += widen(other[c]) * size[from];
            }
            total += size[from];
        }
        for (std::size_t c = 0; c < width; ++c) {
            narrow(sums_[c] / total, out[c]);
        }
        return total;
    }

    static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

    std::size_t padded_ = 0;
    const std::int64_t* sources_ = nullptr;
    std::vector<float> units_a_, units_b_, row_, scores_, best_, sums_;
    std::vector<std::size_t> pick_, order_, head_, next_;
};

} // namespace tocom
