// Per-example gradients of a group norm's affine parameters, from its input.
//
// With the mean and scale of a row's group, x_hat = (x - mean) * scale. A row's group is read twice, the second time
// from the first-level cache: for the mean, then for sums of (x - mean)^2, g and g (x - mean) per channel; the mean is
// rounded to float for the second pass and what that changes is put right in double.
//
// This file is compiled once for each instruction set, into a namespace of its own (DPFAST_ISA).
#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "vec.h"

namespace dpfast {
namespace DPFAST_ISA {
namespace {

using std::int64_t;

constexpr int64_t kSerial = 32768;  // elements below which threads cost more than they save

// What a row's group gives: (x - mean) and g are summed along one axis, lanes lie along it or across.
struct Sums {
    Wide xx, g, gx;
};

// Adds n numbers that follow each other; what is left over after whole vectors goes into the first lane.
template <class T>
inline void add_numbers(const T* x, int64_t n, Wide* out) {
    int64_t s = 0;
    while (s + kLanes <= n) {
        Vec part{};
        for (int i = 0; i < kBrief && s + kLanes <= n; ++i, s += kLanes) part += load(x + s);
        *out += widen(part);
    }
    for (; s < n; ++s) out->low[0] += number(x[s]);
}

// Adds one channel whose positions follow each other.
template <class T>
inline void add_positions(const T* x, const T* g, int64_t n, float mean, Sums* out) {
    int64_t s = 0;
    while (s + kLanes <= n) {
        Vec xx{}, gs{}, gx{};
        for (int i = 0; i < kBrief && s + kLanes <= n; ++i, s += kLanes) {
            const Vec centred = load(x + s) - mean, here = load(g + s);
            xx += centred * centred;
            gs += here;
            gx += here * centred;
        }
        out->xx += widen(xx), out->g += widen(gs), out->gx += widen(gx);
    }
    for (; s < n; ++s) {
        const double centred = number(x[s]) - mean, here = number(g[s]);
        out->xx.low[0] += centred * centred, out->g.low[0] += here, out->gx.low[0] += here * centred;
    }
}

// Adds n positions of kLanes channels that follow each other.
template <class T>
inline void add_channels(const T* x, const T* g, int64_t x_step, int64_t g_step, int64_t n, Vec mean, Sums* out) {
    int64_t s = 0;
    while (s < n) {
        Vec xx{}, gs{}, gx{};
        for (int i = 0; i < kBrief && s < n; ++i, ++s) {
            const Vec centred = load(x + s * x_step) - mean, here = load(g + s * g_step);
            xx += centred * centred;
            gs += here;
            gx += here * centred;
        }
        out->xx += widen(xx), out->g += widen(gs), out->gx += widen(gx);
    }
}

// A row's group in numbers: mean, its value in float, and 1 / sqrt(variance + eps).
struct Moments {
    double mean;
    float rounded;
    double scale;

    Moments(double sum, double count) : mean(sum / count), rounded(static_cast<float>(mean)), scale(0) {}

    // squares: of x - rounded.
    void settle(double squares, double count, double eps) {
        const double off = mean - rounded;
        scale = 1 / std::sqrt(std::max(0.0, squares / count - off * off) + eps);
    }

    // What is added to the weight's gradient, given the sums of g and of g * (x - rounded).
    double weight(double g, double gx) const { return scale * (gx - (mean - rounded) * g); }
    Wide weight(const Wide& g, const Wide& gx) const { return scale * (gx + (rounded - mean) * g); }
};

template <class T>
struct Problem {
    const T* x;
    const T* g;
    NormStride x_stride, g_stride;
    NormShape shape;
    double eps;
    float* weight;
    float* bias;

    int64_t width() const { return shape.channels / shape.groups; }
    double count() const { return static_cast<double>(width() * shape.positions); }
};

// One example and group; positions follow each other.
template <class T>
void along_positions(const Problem<T>& p, int64_t example, int64_t group, std::vector<Sums>* scratch) {
    const int64_t width = p.width(), first = group * width, positions = p.shape.positions;
    scratch->assign(2 * width, Sums{});
    Sums* whole = scratch->data();  // g: of the bias, gx: of the weight, over the rows so far
    Sums* here = whole + width;     // of this row
    for (int64_t row = 0; row < p.shape.rows; ++row) {
        const int64_t n = example * p.shape.rows + row;
        const T* x = p.x + n * p.x_stride.n + first * p.x_stride.c;
        const T* g = p.g + n * p.g_stride.n + first * p.g_stride.c;
        Wide sum;
        for (int64_t c = 0; c < width; ++c) add_numbers(x + c * p.x_stride.c, positions, &sum);
        Moments moments(total(sum), p.count());
        Wide squares;
        for (int64_t c = 0; c < width; ++c) {
            here[c] = Sums{};
            add_positions(x + c * p.x_stride.c, g + c * p.g_stride.c, positions, moments.rounded, &here[c]);
            squares += here[c].xx;
        }
        moments.settle(total(squares), p.count(), p.eps);
        for (int64_t c = 0; c < width; ++c) {
            whole[c].g += here[c].g;
            whole[c].gx += moments.weight(here[c].g, here[c].gx);
        }
    }
    for (int64_t c = 0; c < width; ++c) {
        p.weight[example * p.shape.channels + first + c] = static_cast<float>(total(whole[c].gx));
        p.bias[example * p.shape.channels + first + c] = static_cast<float>(total(whole[c].g));
    }
}

// Numbers per channel of one row, when channels follow each other.
struct Columns {
    std::vector<double> sum, xx, g, gx, weight, bias;
    std::vector<float> mean;

    explicit Columns(int64_t n) : sum(n), xx(n), g(n), gx(n), weight(n), bias(n), mean(n) {}
};

inline void put(const Wide& wide, double* to) {
    std::memcpy(to, &wide.low, sizeof wide.low);
    std::memcpy(to + kLanes / 2, &wide.high, sizeof wide.high);
}

// Sums of x over the positions of each channel.
template <class T>
void sum_columns(const T* x, int64_t step, int64_t channel, int64_t channels, int64_t positions, bool vectors,
                 double* out) {
    int64_t c = 0;
    for (; vectors && c + kLanes <= channels; c += kLanes) {
        Wide sum;
        for (int64_t s = 0; s < positions;) {
            Vec part{};
            for (int i = 0; i < kBrief && s < positions; ++i, ++s) part += load(x + s * step + c);
            sum += widen(part);
        }
        put(sum, out + c);
    }
    for (; c < channels; ++c) {
        out[c] = 0;
        for (int64_t s = 0; s < positions; ++s) out[c] += number(x[s * step + c * channel]);
    }
}

// One example, all groups; fast where channels follow each other, right for any strides.
template <class T>
void along_channels(const Problem<T>& p, int64_t example, Columns* columns) {
    const int64_t channels = p.shape.channels, positions = p.shape.positions, width = p.width();
    const bool vectors = p.x_stride.c == 1 && p.g_stride.c == 1;
    Columns& k = *columns;
    std::fill(k.weight.begin(), k.weight.end(), 0.0);
    std::fill(k.bias.begin(), k.bias.end(), 0.0);
    for (int64_t row = 0; row < p.shape.rows; ++row) {
        const int64_t n = example * p.shape.rows + row;
        const T* x = p.x + n * p.x_stride.n;
        const T* g = p.g + n * p.g_stride.n;
        sum_columns(x, p.x_stride.s, p.x_stride.c, channels, positions, vectors, k.sum.data());
        std::vector<Moments> moments;
        for (int64_t first = 0; first < channels; first += width) {
            double sum = 0;
            for (int64_t c = first; c < first + width; ++c) sum += k.sum[c];
            moments.emplace_back(sum, p.count());
            std::fill(k.mean.begin() + first, k.mean.begin() + first + width, moments.back().rounded);
        }
        int64_t c = 0;
        for (; vectors && c + kLanes <= channels; c += kLanes) {
            Sums sums;
            add_channels(x + c, g + c, p.x_stride.s, p.g_stride.s, positions, load(k.mean.data() + c), &sums);
            put(sums.xx, &k.xx[c]), put(sums.g, &k.g[c]), put(sums.gx, &k.gx[c]);
        }
        for (; c < channels; ++c) {
            k.xx[c] = k.g[c] = k.gx[c] = 0;
            for (int64_t s = 0; s < positions; ++s) {
                const double centred = number(x[s * p.x_stride.s + c * p.x_stride.c]) - k.mean[c];
                const double here = number(g[s * p.g_stride.s + c * p.g_stride.c]);
                k.xx[c] += centred * centred, k.g[c] += here, k.gx[c] += here * centred;
            }
        }
        for (int64_t group = 0; group < p.shape.groups; ++group) {
            double squares = 0;
            for (int64_t i = group * width; i < (group + 1) * width; ++i) squares += k.xx[i];
            moments[group].settle(squares, p.count(), p.eps);
            for (int64_t i = group * width; i < (group + 1) * width; ++i) {
                k.weight[i] += moments[group].weight(k.g[i], k.gx[i]);
                k.bias[i] += k.g[i];
            }
        }
    }
    for (int64_t c = 0; c < channels; ++c) {
        p.weight[example * channels + c] = static_cast<float>(k.weight[c]);
        p.bias[example * channels + c] = static_cast<float>(k.bias[c]);
    }
}

template <class T>
void run(const Problem<T>& p, int threads) {
    const bool positions = p.x_stride.s == 1 && p.g_stride.s == 1;
    const bool parallel =
        threads > 1 && p.shape.examples * p.shape.rows * p.shape.channels * p.shape.positions > kSerial;
    (void)parallel;  // unused without OpenMP
#pragma omp parallel num_threads(threads) if (parallel)
    {
        std::vector<Sums> scratch;
        Columns columns(positions ? 0 : p.shape.channels);
#pragma omp for collapse(2) schedule(static)
        for (int64_t example = 0; example < p.shape.examples; ++example) {
            for (int64_t group = 0; group < (positions ? p.shape.groups : 1); ++group) {
                if (positions) {
                    along_positions(p, example, group, &scratch);
                } else {
                    along_channels(p, example, &columns);
                }
            }
        }
    }
}

}  // namespace

void group_norm_grads(const void* x, NormStride x_stride, const void* g, NormStride g_stride, const NormShape& shape,
                      double eps, Dtype dtype, float* weight, float* bias, int threads) {
    if (dtype == BFloat16) {
        run(Problem<Brain>{static_cast<const Brain*>(x), static_cast<const Brain*>(g), x_stride, g_stride, shape, eps,
                           weight, bias},
            threads);
    } else {
        run(Problem<float>{static_cast<const float*>(x), static_cast<const float*>(g), x_stride, g_stride, shape, eps,
                           weight, bias},
            threads);
    }
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
