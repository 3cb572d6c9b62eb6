// Numbers plus Gaussian noise: ChaCha20 (Bernstein 2008, RFC 8439) and Box and Muller (1958), in one pass.
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


typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Few __attribute__((vector_size(2 * kLanes), aligned(4)));

Words turned(Words x, int by) { return x << by | x >> (32 - by); }

void quarter_round(Words& a, Words& b, Words& c, Words& d) {
    a += b, d = turned(d ^ a, 16);
    c += d, b = turned(b ^ c, 12);
    a += b, d = turned(d ^ a, 8);
    c += d, b = turned(b ^ c, 7);
}

// Of kLanes blocks from `counter` on, with a nonce of 0: words[i] holds word i of each.
void chacha20(const uint32_t* key, int64_t counter, Words* words) {
    Words first[16], x[16];
    const uint32_t constants[4] = {0x61707865, 0x3320646e, 0x79622d32, 0x6b206574};
    for (int i = 0; i < 16; ++i) first[i] = Words{} + (i < 4 ? constants[i] : i < 12 ? key[i - 4] : 0);
    for (int lane = 0; lane < kLanes; ++lane) first[12][lane] = static_cast<uint32_t>(counter + lane);
    std::copy(first, first + 16, x);
    for (int round = 0; round < 20; round += 2) {
        for (int i = 0; i < 4; ++i) quarter_round(x[i], x[4 + i], x[8 + i], x[12 + i]);
        for (int i = 0; i < 4; ++i) {
            quarter_round(x[i], x[4 + (i + 1) % 4], x[8 + (i + 2) % 4], x[12 + (i + 3) % 4]);
        }
    }
    for (int i = 0; i < 16; ++i) words[i] = x[i] + first[i];
}

// 1 - k / 2^52, k the upper bits of words 2j and 2j + 1, of half of the blocks.
Half uniform(const Words* words, int j, int half) {
    const auto at = [&](int i) {
        return __builtin_convertvector(reinterpret_cast<const Few*>(words + i)[half], Longs);
    };
    return 2.0 - as_numbers((at(2 * j) | at(2 * j + 1) << 32) >> 12 | 0x3ff0000000000000);
}

// The nearest multiple of a grid: adding 1.5 * 2^52 of it leaves no bit below it. A shift of 0 rounds nothing.
double on_grid(double x, double shift) { return (x + shift) - shift; }

template <class T>
void some(const Noise& noise, const T* in, T* out, int64_t n, int64_t blocks, int64_t first) {
    Words words[16];
    chacha20(noise.key, first, words);
    Half normal[8][2];
    for (int half = 0; half < 2; ++half) {
        for (int j = 0; j < 4; ++j) {
            box_muller(uniform(words, j, half), uniform(words, j + 4, half), normal[j][half], normal[j + 4][half]);
        }
    }
    const double shift = 0x1.8p52 * noise.grid;
    const int64_t count = std::min<int64_t>(kLanes, blocks - first);
    for (int j = 0; j < 8; ++j) {
        const double* z = reinterpret_cast<const double*>(normal[j]);
        const int64_t at = j * blocks + first, end = std::min(count, n - at);
        for (int64_t i = 0; i < end; ++i) {
            const double sum = on_grid(in[at + i], shift) + on_grid(noise.scale * z[i], shift);
            out[at + i] = static_cast<T>(sum / noise.divisor);
        }
    }
}

template <class T>
void all(const Noise& noise, const T* in, T* out, int64_t n, int threads) {
    const int64_t blocks = (n + 7) / 8;
#pragma omp parallel for num_threads(threads) if (threads > 1 && n > kSerial)
    for (int64_t first = 0; first < blocks; first += kLanes) some(noise, in, out, n, blocks, first);
    (void)threads;  // unused without OpenMP
}

}  // namespace

void noised(const Noise& noise, const void* in, void* out, int64_t n, Dtype dtype, int threads) {
    if (dtype == Float64) {
        all(noise, static_cast<const double*>(in), static_cast<double*>(out), n, threads);
    } else {
        all(noise, static_cast<const float*>(in), static_cast<float*>(out), n, threads);
    }
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
