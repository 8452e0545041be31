// Token merging of one image (ToMe, section 3): the algorithm alone, for the adapters of the engines.
//
// It computes what the function body of ai.tocom::TokenMerge computes (export/graph/operators/merge.py is the specification):
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

#include "rows.h"
#include "number.h"

namespace tocom {

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

// What enters.
template <class T> struct Tokens {
    const T* x;        // [N, C]
    const T* addend;   // [N, C], added to x before anything else; null for nothing
    const float* size; // [N]

    void read(std::size_t token, std::size_t width, float* row) const {
        read_row(x + token * width, addend == nullptr ? nullptr : addend + token * width, width, row);
    }
};

// What remains.
template <class T> struct Merged {
    T* x;        // [N - r, C]
    float* size; // [N - r]
    T* normed;   // [N - r, C], the layer norm of x; null for none
    T* log_size; // [N - r]; null for none
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
    template <class T>
    void merge(const MergeShape& shape, const Tokens<T>& tokens, const LayerNorm& norm, const Decisions& decided,
               std::size_t first, std::size_t last, const Merged<T>& merged) {
        link_sources(shape, decided);
        row_.resize(shape.channels);
        const std::size_t width = shape.channels, kept = shape.protected_ + shape.unmerged();
        for (std::size_t row = first; row < last; ++row) {
            const std::size_t from = origin(shape, decided, row);
            tokens.read(from, width, row_.data());
            merged.size[row] = tokens.size[from];
            if (row >= kept && head_[row - kept] != kNone) {
                merged.size[row] = take_in(tokens, width, head_[row - kept], tokens.size[from]);
            }
            write_row(row_.data(), width, merged.x + row * width);
            if (norm.weight != nullptr) {
                norm.apply(row_.data(), width, merged.normed + row * width);
            }
            if (merged.log_size != nullptr) {
                narrow(std::log(merged.size[row]), merged.log_size[row]);
            }
        }
    }

  private:
    static constexpr std::size_t kRows = 8;

    // Unit vectors: a-tokens as rows, b-tokens as columns padded to whole vectors.
    template <class M> void gather_units(const MergeShape& shape, const M* metric) {
        const std::size_t a = shape.a_count(), b = shape.b_count(), depth = shape.metric;
        padded_ = (b + kLanes - 1) / kLanes * kLanes;
        units_a_.resize((a + kRows) * depth);
        units_b_.assign(padded_ * depth, 0.0f);
        row_.resize(depth);
        const std::size_t first = std::min(shape.first_a(), shape.first_b()), size = shape.heads * depth;
        for (std::size_t token = first; token < shape.tokens; ++token) {
            if (token + kAhead < shape.tokens) {
                prefetch(metric + (token + kAhead) * size, size);
            }
            const std::size_t at = (token - first) / 2;
            if ((token - shape.first_a()) % 2 == 0) {
                unit(shape, metric + token * size, units_a_.data() + at * depth);
                continue;
            }
            unit(shape, metric + token * size, row_.data());
            for (std::size_t d = 0; d < depth; ++d) {
                units_b_[d * padded_ + at] = row_[d];
            }
        }
    }

    // The mean over heads of one token's metric, divided by its length.
    template <class M> static void unit(const MergeShape& shape, const M* row, float* out) {
        const std::size_t depth = shape.metric;
        std::size_t d = 0;
        Vector sum, next;
        for (; d + kLanes <= depth; d += kLanes) {
            load(row + d, sum);
            for (std::size_t head = 1; head < shape.heads; ++head) {
                load(row + head * depth + d, next);
                sum += next;
            }
            store(sum / static_cast<float>(shape.heads), out + d);
        }
        for (; d < depth; ++d) {
            float one = widen(row[d]);
            for (std::size_t head = 1; head < shape.heads; ++head) {
                one += widen(row[head * depth + d]);
            }
            out[d] = one / static_cast<float>(shape.heads);
        }
        const float norm = std::sqrt(sum_around<true>(0.0f, out, depth));
        const float floor = norm < 1e-12f ? 1e-12f : norm; // NaN stays NaN
        for (std::size_t d = 0; d < depth; ++d) {
            out[d] /= floor;
        }
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

    // Which token a row of what remains starts from.
    static std::size_t origin(const MergeShape& shape, const Decisions& decided, std::size_t row) {
        if (row < shape.protected_) {
            return row;
        }
        const std::size_t free = row - shape.protected_;
        return free < shape.unmerged() ? static_cast<std::size_t>(decided.unm[free])
                                       : shape.first_b() + 2 * (free - shape.unmerged());
    }

    // Merges a chain of sources into the token in row_; returns the size of all.
    template <class T> float take_in(const Tokens<T>& tokens, std::size_t width, std::size_t first, float size) {
        other_.resize(width);
        float total = size;
        for (std::size_t c = 0; c < width; ++c) {
            row_[c] *= size;
        }
        for (std::size_t i = first; i != kNone; i = next_[i]) {
            const auto from = static_cast<std::size_t>(sources_[i]);
            const float weight = tokens.size[from];
            tokens.read(from, width, other_.data());
            for (std::size_t c = 0; c < width; ++c) {
                row_[c] += other_[c] * weight;
            }
            total += weight;
        }
        for (std::size_t c = 0; c < width; ++c) {
            row_[c] /= total;
        }
        return total;
    }

    static constexpr std::size_t kAhead = 2; // tokens between asking for one and reading it
    static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();

    std::size_t padded_ = 0;
    const std::int64_t* sources_ = nullptr;
    std::vector<float> units_a_, units_b_, row_, other_, scores_, best_;
    std::vector<std::size_t> pick_, order_, head_, next_;
};

} // namespace tocom
