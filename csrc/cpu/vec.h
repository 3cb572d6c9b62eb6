// Vectors of the instruction set that a file is compiled for (DPFAST_ISA names its namespace), and sums in double.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dpfast {
namespace DPFAST_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;  // numbers in a vector
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4)));  // at any address
typedef double Half __attribute__((vector_size(4 * kLanes)));              // half as many doubles

constexpr int kBrief = 8;  // numbers that are added up in float before they go into a double: they err by 8 roundings

struct Brain {  // bfloat16
    std::uint16_t bits;
};

inline float number(float v) { return v; }
inline float number(Brain v) {
    const std::uint32_t bits = static_cast<std::uint32_t>(v.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

inline Vec load(const float* at) { return *reinterpret_cast<const Loose*>(at); }
inline Vec load(const Brain* at) {
    typedef std::uint16_t Bits __attribute__((vector_size(2 * kLanes), aligned(2)));
    typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
    const Words words = __builtin_convertvector(*reinterpret_cast<const Bits*>(at), Words) << 16;
    Vec v;
    std::memcpy(&v, &words, sizeof v);
    return v;
}

inline void store(float* at, Vec v) { *reinterpret_cast<Loose*>(at) = v; }
inline void store(Brain* at, Vec v) {  // rounded to the nearest, halves to even
    typedef std::uint16_t Bits __attribute__((vector_size(2 * kLanes), aligned(2)));
    typedef std::uint32_t Words __attribute__((vector_size(4 * kLanes)));
    Words words;
    std::memcpy(&words, &v, sizeof v);
    const Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    const Words is_nan = reinterpret_cast<Words>(v != v);
    *reinterpret_cast<Bits*>(at) = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), Bits);
}

inline void put_number(float* at, float v) { *at = v; }
inline void put_number(Brain* at, float v) {
    std::uint32_t bits;
    std::memcpy(&bits, &v, sizeof v);
    at->bits = static_cast<std::uint16_t>(v != v ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// As many doubles as a Vec has floats. (A vector of twice the register's size would be taken apart into numbers.)
struct Wide {
    Half low{}, high{};

    void operator+=(const Wide& other) { low += other.low, high += other.high; }
};

inline Wide operator+(Wide a, const Wide& b) { return a += b, a; }
inline Wide operator*(const Wide& a, const Wide& b) { return {a.low * b.low, a.high * b.high}; }

inline Wide widen(Vec v) {
#if defined(__AVX512F__)
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))};
#elif defined(__AVX2__)
    return {_mm256_cvtps_pd(_mm256_castps256_ps128(v)), _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1))};
#else
    Wide w;
    for (int i = 0; i < kLanes / 2; ++i) w.low[i] = v[i], w.high[i] = v[kLanes / 2 + i];
    return w;
#endif
}

inline double total(const Wide& wide) {
    const Half half = wide.low + wide.high;
#if defined(__AVX512F__)
    return _mm512_reduce_add_pd(half);
#elif defined(__AVX2__)
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(half), _mm256_extractf128_pd(half, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
#else
    double sum = 0;
    for (int i = 0; i < kLanes / 2; ++i) sum += half[i];
    return sum;
#endif
}

}  // namespace
}  // namespace DPFAST_ISA
}  // namespace dpfast
