// One token at a time, in float32: what is added to it, and its layer norm.
#pragma once

#include <cmath>
#include <cstddef>

#include "number.h"

namespace tocom {

// Asks for values [count] that will be read soon, and that the processor itself fetches too late.
template <class T> void prefetch(const T* values, std::size_t count) {
    for (std::size_t at = 0; at < count; at += 64 / sizeof(T)) {
        __builtin_prefetch(values + at);
    }
}

// x [C] and addend [C], or null for nothing -> row [C]
template <class T> void read_row(const T* x, const T* addend, std::size_t width, float* row) {
    std::size_t c = 0;
    Vector one, other = {};
    for (; c + kLanes <= width; c += kLanes) {
        load(x + c, one);
        if (addend != nullptr) {
            load(addend + c, other);
            one += other;
        }
        store(one, row + c);
    }
    for (; c < width; ++c) {
        row[c] = addend == nullptr ? widen(x[c]) : widen(x[c]) + widen(addend[c]);
    }
}

// row [C] -> out [C]
template <class T> void write_row(const float* row, std::size_t width, T* out) {
    std::size_t c = 0;
    Vector values;
    for (; c + kLanes <= width; c += kLanes) {
        load(row + c, values);
        store(values, out + c);
    }
    for (; c < width; ++c) {
        narrow(row[c], out[c]);
    }
}

// The sum of values - center, or of their squares, in lanes: one after the other, every addition would wait for the one
// before.
template <bool squared> float sum_around(float center, const float* values, std::size_t count) {
    constexpr std::size_t kChains = 4;
    Vector lanes[kChains] = {}, next;
    std::size_t at = 0;
    for (; at + kChains * kLanes <= count; at += kChains * kLanes) {
        for (std::size_t chain = 0; chain < kChains; ++chain) {
            load(values + at + chain * kLanes, next);
            next -= center;
            lanes[chain] += squared ? next * next : next;
        }
    }
    for (; at + kLanes <= count; at += kLanes) {
        load(values + at, next);
        next -= center;
        lanes[0] += squared ? next * next : next;
    }
    const Vector all = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    float quarter[4];
    for (std::size_t lane = 0; lane < 4; ++lane) {
        quarter[lane] = (all[lane] + all[lane + 4]) + (all[lane + 8] + all[lane + 12]);
    }
    float sum = (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
    for (; at < count; ++at) {
        const float centered = values[at] - center;
        sum += squared ? centered * centered : centered;
    }
    return sum;
}

struct LayerNorm {
    const float* weight; // [C]; null for no norm
    const float* bias;   // [C]
    float epsilon;       // added to the variance

    // row [C] -> out [C]
    template <class T> void apply(const float* row, std::size_t width, T* out) const {
        const float mean = sum_around<false>(0.0f, row, width) / static_cast<float>(width);
        const float variance = sum_around<true>(mean, row, width) / static_cast<float>(width);
        const float scale = 1.0f / std::sqrt(variance + epsilon);
        std::size_t c = 0;
        Vector values, factor, shift;
        for (; c + kLanes <= width; c += kLanes) {
            load(row + c, values);
            load(weight + c, factor);
            load(bias + c, shift);
            store((values - mean) * scale * factor + shift, out + c);
        }
        for (; c < width; ++c) {
            narrow((row[c] - mean) * scale * weight[c] + bias[c], out[c]);
        }
    }
};

} // namespace tocom
