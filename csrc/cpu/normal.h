// Standard normal numbers from uniform ones, by the formula of Box and Muller (1958), in vectors of doubles.
#pragma once

#include <cstdint>

#include "vec.h"

namespace dpfast {
namespace DPFAST_ISA {
namespace {

constexpr int kHalf = kLanes / 2;  // doubles in a vector
[[maybe_unused]] constexpr std::int64_t kSerial = 4096;  // numbers below which threads cost more than they save

typedef std::uint64_t Longs __attribute__((vector_size(8 * kHalf)));

inline Half as_numbers(Longs bits) { return reinterpret_cast<Half>(bits); }

inline Half either(Longs which, Half yes, Half no) {
    return as_numbers((which & reinterpret_cast<Longs>(yes)) | (~which & reinterpret_cast<Longs>(no)));
}

inline Half root(Half x) {
#if defined(__AVX512F__)
    return _mm512_sqrt_pd(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_pd(x);
#else
    for (int i = 0; i < kHalf; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
#endif
}

// Of 2^-52 .. 1, to some roundings: 2^e m with m between the root of 1/2 and that of 2, log m = 2 atanh((m-1)/(m+1)).
inline Half logarithm(Half x) {
    const Longs bits = reinterpret_cast<Longs>(x);
    const Half m = as_numbers((bits & 0xfffffffffffff) | 0x3fe0000000000000);
    const Longs is_small = reinterpret_cast<Longs>(m < 0.70710678118654752);
    const Half e = as_numbers(((bits >> 52) - 1022 + is_small) + 0x4338000000000000) - 0x1.8p52;  // is_small: -1 or 0
    const Half n = either(is_small, m + m, m), s = (n - 1.0) / (n + 1.0), t = s * s;
    Half sum = Half{} + 1.0 / 21;
    for (int k = 19; k > 0; k -= 2) sum = sum * t + 1.0 / k;
    return e * 0.69314718055994531 + 2.0 * s * sum;
}

// Cosine and sine of 2 pi u, u in 0 .. 1: of the rest of a quarter turn by Taylor's series, then turned by quarters.
inline void turn(Half u, Half& cosine, Half& sine) {
    const Half shifted = u * 4.0 + 0x1.8p52;
    const Longs quarters = reinterpret_cast<Longs>(shifted);  // in the lowest bits
    const Half x = (u * 4.0 - (shifted - 0x1.8p52)) * 1.5707963267948966, t = x * x;
    Half s = Half{} + 1.0, c = Half{} + 1.0;
    for (int k = 16; k > 0; k -= 2) s = 1.0 - s * t * (1.0 / (k * (k + 1))), c = 1.0 - c * t * (1.0 / (k * (k - 1)));
    s *= x;
    const Longs is_odd = -(quarters & 1);
    const Longs sign = 0x8000000000000000 + Longs{};
    cosine = as_numbers(reinterpret_cast<Longs>(either(is_odd, s, c)) ^ (sign & -((quarters + 1) >> 1 & 1)));
    sine = as_numbers(reinterpret_cast<Longs>(either(is_odd, c, s)) ^ (sign & -(quarters >> 1 & 1)));
}

// Two of a pair: 0 < u <= 1 and 0 <= v <= 1.
inline void box_muller(Half u, Half v, Half& first, Half& second) {
    const Half radius = root(-2.0 * logarithm(u));
    turn(v, first, second);
    first *= radius, second *= radius;
}

}  // namespace
}  // namespace DPFAST_ISA
}  // namespace dpfast
