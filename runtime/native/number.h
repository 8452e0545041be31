// The two number formats that tokens come in.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

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

// Sixteen numbers at a time: compilers make the machine's vectors of them. By reference everywhere, since a vector
// returned by value would be passed in another way on another processor.
constexpr std::size_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));
typedef std::uint32_t Words __attribute__((vector_size(kLanes * sizeof(std::uint32_t)), aligned(4)));
typedef std::uint16_t Halves __attribute__((vector_size(kLanes * sizeof(std::uint16_t)), aligned(2)));

inline void load(const float* from, Vector& into) { std::memcpy(&into, from, sizeof into); }

inline void load(const bf16* from, Vector& into) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Words bits = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&into, &bits, sizeof into);
}

inline void store(const Vector& from, float* into) { std::memcpy(into, &from, sizeof from); }

// As narrow() does; the processor's own instruction, where there is one, takes subnormal numbers for zero.
inline void store(const Vector& from, bf16* into) {
#ifdef __AVX512BF16__
    __m512 values;
    std::memcpy(&values, &from, sizeof values);
    const __m256bh halves = _mm512_cvtneps_pbh(values);
    std::memcpy(into, &halves, sizeof halves);
#else
    Words bits;
    std::memcpy(&bits, &from, sizeof bits);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const auto ordered = from == from;
    const Halves halves = __builtin_convertvector(ordered ? rounded : (bits >> 16) | 0x40u, Halves);
    std::memcpy(into, &halves, sizeof halves);
#endif
}

} // namespace tocom
