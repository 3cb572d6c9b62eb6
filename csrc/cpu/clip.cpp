// Squared norms and the clipped sum of stored per-example gradients: one pass over memory each.
#include <algorithm>

#include "dpfast.h"
#include "dpfast_clones.h"

namespace dpfast {
namespace {

using std::int64_t;

typedef float Lanes __attribute__((vector_size(32)));
typedef float Loose __attribute__((vector_size(32), aligned(4)));
typedef double Wide __attribute__((vector_size(64)));

constexpr int64_t kLanes = 8;
constexpr int64_t kColumns = 4096;  // numbers of the sum that stay in the first-level cache
constexpr int64_t kSquares = 1 << 16;  // numbers of a gradient in one task
constexpr int64_t kSerial = 32768;  // numbers below which threads cost more than they save

// Products of floats are exact in double.
DPFAST_CLONES double squares(const float* g, int64_t n) {
    Wide a{}, b{};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        const Wide x = __builtin_convertvector(*reinterpret_cast<const Loose*>(g + i), Wide);
        const Wide y = __builtin_convertvector(*reinterpret_cast<const Loose*>(g + i + kLanes), Wide);
        a += x * x;
        b += y * y;
    }
    a += b;
    double total = 0;
    for (int j = 0; j < kLanes; ++j) total += a[j];
    for (; i < n; ++i) total += static_cast<double>(g[i]) * g[i];
    return total;
}

DPFAST_CLONES void add(const float* g, float w, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] += w * g[i];
}

}  // namespace

void sq_norms(const float* grads, int64_t examples, int64_t numbers, int64_t stride, double* parts, double* sq,
              int threads) {
    const int64_t blocks = square_blocks(numbers);
#pragma omp parallel for num_threads(threads) if (threads > 1 && examples * numbers > kSerial)
    for (int64_t i = 0; i < examples * blocks; ++i) {
        const int64_t e = i / blocks, first = i % blocks * kSquares;
        parts[i] = squares(grads + e * stride + first, std::min(kSquares, numbers - first));
    }
    for (int64_t e = 0; e < examples; ++e) {
        sq[e] = 0;
        for (int64_t block = 0; block < blocks; ++block) sq[e] += parts[e * blocks + block];
    }
    (void)threads;  // unused without OpenMP
}

int64_t square_blocks(int64_t numbers) { return (numbers + kSquares - 1) / kSquares; }

void clipped_sum(const float* grads, int64_t examples, int64_t numbers, int64_t stride, const float* weights,
                 float* out, int threads) {
    const int64_t blocks = (numbers + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) if (threads > 1 && examples * numbers > kSerial)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * kColumns, n = std::min(kColumns, numbers - first);
        std::fill(out + first, out + first + n, 0.0f);
        for (int64_t e = 0; e < examples; ++e) {
            if (weights[e] > 0) add(grads + e * stride + first, weights[e], out + first, n);
        }
    }
    (void)threads;
}

}  // namespace dpfast
