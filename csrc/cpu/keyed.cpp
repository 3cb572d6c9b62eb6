// Random numbers of a counter and a key: Philox4x32-10 (Salmon et al. 2011), uniform or normal.
//
// This file is compiled once for each instruction set, into a namespace of its own (DPFAST_ISA).
#include <algorithm>

#include "isa.h"
#include "normal.h"

namespace dpfast {
namespace DPFAST_ISA {
namespace {

using std::int64_t;
using std::uint32_t;

constexpr std::uint64_t kWord = 0xffffffff;

// Ten rounds, of words that lie in 64 bits each.
void philox(Longs* c, std::uint64_t k0, std::uint64_t k1) {
    for (int round = 0; round < 10; ++round) {
        const Longs first = c[0] * 0xd2511f53, second = c[2] * 0xcd9e8d57;
        c[0] = second >> 32 ^ c[1] ^ k0, c[2] = first >> 32 ^ c[3] ^ k1;
        c[1] = second & kWord, c[3] = first & kWord;
        k0 = (k0 + 0x9e3779b9) & kWord, k1 = (k1 + 0xbb67ae85) & kWord;
    }
}

// Of 32 bits. (Bits below 2^52 are the number that 2^52 and they are, less 2^52.)
Half number(Longs word) { return as_numbers(word | 0x4330000000000000) - 0x1p52; }

void some(Longs* words, bool normal, float* out, int64_t count) {
    Half made[4];
    if (normal) {
        for (int i = 0; i < 4; i += 2) {
            box_muller((number(words[i]) + 1.0) * 0x1p-32, number(words[i + 1]) * 0x1p-32, made[i], made[i + 1]);
        }
    } else {
        for (int i = 0; i < 4; ++i) made[i] = number(words[i] >> 8) * 0x1p-24;
    }
    const int64_t end = std::min<int64_t>(count, 4 * kHalf);
    for (int64_t i = 0; i < end; ++i) out[i] = static_cast<float>(made[i % 4][i / 4]);
}

}  // namespace

void keyed(const Keyed& k, const int64_t* ids, float* out, int threads) {
    const int64_t blocks = (k.count + 3) / 4, parts = (blocks + kHalf - 1) / kHalf;
#pragma omp parallel for num_threads(threads) if (threads > 1 && k.examples * k.rows * k.count > kSerial)
    for (int64_t i = 0; i < k.examples * k.rows * parts; ++i) {
        const int64_t row = i / parts, block = i % parts * kHalf;
        Longs words[4] = {};
        for (int lane = 0; lane < kHalf; ++lane) words[0][lane] = static_cast<uint32_t>(block + lane);
        words[1] = Longs{} + static_cast<uint32_t>(ids[row / k.rows]);
        words[2] = Longs{} + k.step;
        words[3] = Longs{} + static_cast<uint32_t>(k.first + row % k.rows);
        philox(words, k.key[0], k.key[1]);
        some(words, k.normal, out + row * k.count + 4 * block, k.count - 4 * block);
    }
    (void)threads;  // unused without OpenMP
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
