// Squared norms and the clipped sum of stored per-example gradients: one pass over memory each.
//
// This file is compiled once for each instruction set, into a namespace of its own (DPFAST_ISA).
#include <algorithm>
#include <vector>

#include "isa.h"
#include "vec.h"

namespace dpfast {
namespace DPFAST_ISA {
namespace {

using std::int64_t;

constexpr int64_t kColumns = 4096;  // numbers of the sum that stay in the first-level cache
constexpr int64_t kSerial = 32768;  // numbers below which threads cost more than they save

double squares(const float* g, int64_t n) {
    Wide sum;
    int64_t i = 0;
    while (i + 2 * kLanes <= n) {
        Vec even{}, odd{};
        for (int step = 0; step < kBrief / 2 && i + 2 * kLanes <= n; ++step, i += 2 * kLanes) {
            const Vec x = load(g + i), y = load(g + i + kLanes);
            even += x * x;
            odd += y * y;
        }
        sum += widen(even + odd);
    }
    double rest = 0;
    for (; i < n; ++i) rest += static_cast<double>(g[i]) * g[i];
    return total(sum) + rest;
}

void add(const float* g, float w, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] += w * g[i];
}

}  // namespace

void sq_norms(const float* grads, int64_t examples, int64_t numbers, int64_t stride, double* parts, double* sq,
              int threads) {
    const int64_t blocks = square_blocks(numbers);
#pragma omp parallel for num_threads(threads) if (threads > 1 && examples * numbers > kSerial)
    for (int64_t i = 0; i < examples * blocks; ++i) {
        const int64_t e = i / blocks, first = i % blocks * kSquareBlock;
        parts[i] = squares(grads + e * stride + first, std::min(kSquareBlock, numbers - first));
    }
    for (int64_t e = 0; e < examples; ++e) {
        sq[e] = 0;
        for (int64_t block = 0; block < blocks; ++block) sq[e] += parts[e * blocks + block];
    }
    (void)threads;  // unused without OpenMP
}

void clipped_sums(const Stored* stored, int64_t count, int64_t examples, const float* weights, int threads) {
    std::vector<int64_t> ends;  // of each one's blocks
    int64_t blocks = 0, all = 0;
    for (int64_t i = 0; i < count; ++i) {
        blocks += (stored[i].numbers + kColumns - 1) / kColumns;
        ends.push_back(blocks);
        all += examples * stored[i].numbers;
    }
#pragma omp parallel for num_threads(threads) if (threads > 1 && all > kSerial)
    for (int64_t at = 0; at < blocks; ++at) {
        const int64_t i = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
        const Stored& one = stored[i];
        const int64_t first = (at - (i ? ends[i - 1] : 0)) * kColumns, n = std::min(kColumns, one.numbers - first);
        std::fill(one.out + first, one.out + first + n, 0.0f);
        for (int64_t e = 0; e < examples; ++e) {
            if (weights[e] > 0) add(one.grads + e * one.stride + first, weights[e], one.out + first, n);
        }
    }
    (void)threads;  // unused without OpenMP
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
