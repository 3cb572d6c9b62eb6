// Per-example gradients of a group norm's affine parameters, from its input: one pass over x and g.
//
// With mean and scale of a row's group, x_hat = (x - mean) * scale, so that sums of x, x^2, g and g * x per channel are
// enough: weight = sum over rows of (sum g x - mean sum g) * scale. All sums are carried in double, where products of
// floats are exact and the differences lose nothing that float would have kept.
#include <algorithm>
#include <cmath>
#include <vector>

#include "dpfast.h"
#include "dpfast_clones.h"

namespace dpfast {
namespace {

using std::int64_t;

typedef float Loose __attribute__((vector_size(32), aligned(4)));
typedef double Wide __attribute__((vector_size(64)));
constexpr int64_t kLanes = 8;
constexpr int64_t kSerial = 32768;  // elements below which threads cost more than they save

#define DPFAST_WIDE(p) __builtin_convertvector(*reinterpret_cast<const Loose*>(p), Wide)

struct Sums {
    double x, xx, g, gx;
};

inline __attribute__((always_inline)) double total(const Wide& wide) {
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += wide[i];
    return sum;
}

// Of one channel whose positions follow each other.
DPFAST_CLONES void along_positions(const float* x, const float* g, int64_t positions, Sums* out) {
    Wide sx{}, sxx{}, sg{}, sgx{};
    int64_t s = 0;
    for (; s + kLanes <= positions; s += kLanes) {
        const Wide xs = DPFAST_WIDE(x + s), gs = DPFAST_WIDE(g + s);
        sx += xs;
        sxx += xs * xs;
        sg += gs;
        sgx += gs * xs;
    }
    *out = Sums{total(sx), total(sxx), total(sg), total(sgx)};
    for (; s < positions; ++s) {
        out->x += x[s];
        out->xx += static_cast<double>(x[s]) * x[s];
        out->g += g[s];
        out->gx += static_cast<double>(g[s]) * x[s];
    }
}

// Of some channels, whatever the strides; fast where channels follow each other.
DPFAST_CLONES void along_channels(const float* x, const float* g, int64_t x_channel, int64_t g_channel, int64_t x_step,
                                  int64_t g_step, int64_t channels, int64_t positions, Sums* out) {
    for (int64_t c = 0; c < channels; ++c) out[c] = Sums{0, 0, 0, 0};
    for (int64_t s = 0; s < positions; ++s) {
        for (int64_t c = 0; c < channels; ++c) {
            const double xs = x[s * x_step + c * x_channel], gs = g[s * g_step + c * g_channel];
            out[c].x += xs;
            out[c].xx += xs * xs;
            out[c].g += gs;
            out[c].gx += gs * xs;
        }
    }
}

}  // namespace

void group_norm_grads(const float* x, NormStride x_stride, const float* g, NormStride g_stride, const NormShape& shape,
                      double eps, float* weight, float* bias, int threads) {
    const int64_t width = shape.channels / std::max<int64_t>(1, shape.groups);
    const double count = static_cast<double>(width * shape.positions);
    const int64_t tasks = shape.examples * shape.groups;
    const bool contiguous = x_stride.s == 1 && g_stride.s == 1;
    const bool parallel = threads > 1 && tasks * shape.rows * width * shape.positions > kSerial;
    (void)parallel;  // unused without OpenMP
#pragma omp parallel num_threads(threads) if (parallel)
    {
        std::vector<Sums> sums(width);
        std::vector<double> w(width), b(width);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t example = task / shape.groups, first = task % shape.groups * width;
            std::fill(w.begin(), w.end(), 0.0);
            std::fill(b.begin(), b.end(), 0.0);
            for (int64_t row = 0; row < shape.rows; ++row) {
                const int64_t n = example * shape.rows + row;
                const float* xs = x + n * x_stride.n + first * x_stride.c;
                const float* gs = g + n * g_stride.n + first * g_stride.c;
                if (contiguous) {
                    for (int64_t c = 0; c < width; ++c) {
                        along_positions(xs + c * x_stride.c, gs + c * g_stride.c, shape.positions, &sums[c]);
                    }
                } else {
                    along_channels(xs, gs, x_stride.c, g_stride.c, x_stride.s, g_stride.s, width, shape.positions,
                                   sums.data());
                }
                double sum = 0, squares = 0;
                for (const Sums& s : sums) sum += s.x, squares += s.xx;
                const double mean = sum / count;
                const double scale = 1 / std::sqrt(std::max(0.0, squares / count - mean * mean) + eps);
                for (int64_t c = 0; c < width; ++c) {
                    w[c] += (sums[c].gx - mean * sums[c].g) * scale;
                    b[c] += sums[c].g;
                }
            }
            for (int64_t c = 0; c < width; ++c) {
                weight[example * shape.channels + first + c] = static_cast<float>(w[c]);
                bias[example * shape.channels + first + c] = static_cast<float>(b[c]);
            }
        }
    }
}

}  // namespace dpfast
