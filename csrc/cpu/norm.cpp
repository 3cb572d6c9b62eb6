// The backward pass of a group norm: per-example gradients of its affine parameters, and the gradient of its input.
//
// With the mean and scale of a row's group, x_hat = (x - mean) * scale, and with h = gamma * g
//
//     dx = scale * (h - mean(h) - x_hat * mean(h * x_hat))
//
// whose means follow from the sums that the affine parameters need. Three passes: for the mean; for sums of
// (x - mean)^2, g and g (x - mean) per channel; for dx. Where positions follow each other a pass is over one row's
// group, which stays in the first-level cache; else over a row. The mean is rounded to float after the first pass, and
// what that changes is put right in double.
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

    // The sum of x_hat * g, given those of g and of g * (x - rounded).
    double weight(double g, double gx) const { return scale * (gx - (mean - rounded) * g); }
};

// dx = of_g * g + (of_x * (x - rounded) + rest), in one channel.
struct Line {
    float of_g, of_x, rest;
};

// The lines of a group's channels, from mean(h) and mean(h * x_hat).
struct GroupLine {
    double scale, of_x, rest;

    GroupLine(const Moments& m, double h, double hx)
        : scale(m.scale), of_x(-m.scale * m.scale * hx), rest(m.scale * (m.scale * hx * (m.mean - m.rounded) - h)) {}

    Line of(double gamma) const {
        return {static_cast<float>(scale * gamma), static_cast<float>(of_x), static_cast<float>(rest)};
    }
};

template <class T>
inline void write_positions(const T* x, const T* g, int64_t n, float mean, Line line, T* dx) {
    int64_t s = 0;
    for (; s + kLanes <= n; s += kLanes) {
        store(dx + s, line.of_g * load(g + s) + (line.of_x * (load(x + s) - mean) + line.rest));
    }
    for (; s < n; ++s) {
        put_number(dx + s, line.of_g * number(g[s]) + (line.of_x * (number(x[s]) - mean) + line.rest));
    }
}

template <class T>
struct Problem {
    const T* x;
    const T* g;
    const float* gamma;  // null: ones
    T* dx;               // null: not wanted
    NormStride x_stride, g_stride, dx_stride;
    NormShape shape;
    double eps;

    int64_t width() const { return shape.channels / shape.groups; }
    double count() const { return static_cast<double>(width() * shape.positions); }
    double scaled_by(int64_t channel) const { return gamma ? gamma[channel] : 1; }
};

// Rows of one example, from `first` up to `last`, and its gradients by them, [channels] each.
struct Part {
    int64_t first, last;
    double* weight;
    double* bias;
};

// Numbers per channel of one row.
struct Columns {
    std::vector<double> sum, xx, g, gx;
    std::vector<float> mean, of_g, of_x, rest;  // the last three: of each channel's Line

    explicit Columns(int64_t n) : sum(n), xx(n), g(n), gx(n), mean(n), of_g(n), of_x(n), rest(n) {}
};

// One group of a part; positions follow each other.
template <class T>
void along_positions(const Problem<T>& p, const Part& part, int64_t group, Columns* columns) {
    const int64_t width = p.width(), first = group * width, positions = p.shape.positions;
    Columns& k = *columns;
    for (int64_t n = part.first; n < part.last; ++n) {
        const T* x = p.x + n * p.x_stride.n + first * p.x_stride.c;
        const T* g = p.g + n * p.g_stride.n + first * p.g_stride.c;
        Wide sum;
        for (int64_t c = 0; c < width; ++c) add_numbers(x + c * p.x_stride.c, positions, &sum);
        Moments moments(total(sum), p.count());
        Wide squares;
        for (int64_t c = 0; c < width; ++c) {
            Sums sums;
            add_positions(x + c * p.x_stride.c, g + c * p.g_stride.c, positions, moments.rounded, &sums);
            squares += sums.xx;
            k.g[c] = total(sums.g), k.gx[c] = total(sums.gx);
        }
        moments.settle(total(squares), p.count(), p.eps);
        double h = 0, hx = 0;
        for (int64_t c = 0; c < width; ++c) {
            const double weight = moments.weight(k.g[c], k.gx[c]);
            part.weight[first + c] += weight;
            part.bias[first + c] += k.g[c];
            h += p.scaled_by(first + c) * k.g[c];
            hx += p.scaled_by(first + c) * weight;
        }
        if (!p.dx) continue;
        const GroupLine of_group(moments, h / p.count(), hx / p.count());
        T* dx = p.dx + n * p.dx_stride.n + first * p.dx_stride.c;
        for (int64_t c = 0; c < width; ++c) {
            write_positions(x + c * p.x_stride.c, g + c * p.g_stride.c, positions, moments.rounded,
                            of_group.of(p.scaled_by(first + c)), dx + c * p.dx_stride.c);
        }
    }
}

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

// dx of one row. Coefficients lie in the first-level cache.
template <class T>
void write_channels(const Problem<T>& p, int64_t row, const Columns& k, bool vectors) {
    for (int64_t s = 0; s < p.shape.positions; ++s) {
        const T* x = p.x + row * p.x_stride.n + s * p.x_stride.s;
        const T* g = p.g + row * p.g_stride.n + s * p.g_stride.s;
        T* dx = p.dx + row * p.dx_stride.n + s * p.dx_stride.s;
        int64_t c = 0;
        for (; vectors && c + kLanes <= p.shape.channels; c += kLanes) {
            const Vec centred = load(x + c) - load(&k.mean[c]);
            store(dx + c, load(&k.of_g[c]) * load(g + c) + (load(&k.of_x[c]) * centred + load(&k.rest[c])));
        }
        for (; c < p.shape.channels; ++c) {
            const float centred = number(x[c * p.x_stride.c]) - k.mean[c];
            put_number(dx + c * p.dx_stride.c,
                       k.of_g[c] * number(g[c * p.g_stride.c]) + (k.of_x[c] * centred + k.rest[c]));
        }
    }
}

// A part, all groups; fast where channels follow each other, right for any strides.
template <class T>
void along_channels(const Problem<T>& p, const Part& part, Columns* columns) {
    const int64_t channels = p.shape.channels, positions = p.shape.positions, width = p.width();
    const bool vectors = p.x_stride.c == 1 && p.g_stride.c == 1 && (!p.dx || p.dx_stride.c == 1);
    Columns& k = *columns;
    for (int64_t row = part.first; row < part.last; ++row) {
        const T* x = p.x + row * p.x_stride.n;
        const T* g = p.g + row * p.g_stride.n;
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
            const int64_t first = group * width, end = first + width;
            double squares = 0, h = 0, hx = 0;
            for (int64_t i = first; i < end; ++i) squares += k.xx[i];
            moments[group].settle(squares, p.count(), p.eps);
            for (int64_t i = first; i < end; ++i) {
                const double weight = moments[group].weight(k.g[i], k.gx[i]);
                part.weight[i] += weight;
                part.bias[i] += k.g[i];
                h += p.scaled_by(i) * k.g[i];
                hx += p.scaled_by(i) * weight;
            }
            const GroupLine of_group(moments[group], h / p.count(), hx / p.count());
            for (int64_t i = first; p.dx && i < end; ++i) {
                const Line line = of_group.of(p.scaled_by(i));
                k.of_g[i] = line.of_g, k.of_x[i] = line.of_x, k.rest[i] = line.rest;
            }
        }
        if (p.dx) write_channels(p, row, k, vectors);
    }
}

// weight and bias: [examples, channels]. Where there are fewer examples than threads, an example is cut into parts.
template <class T>
void run(const Problem<T>& p, float* weight, float* bias, int threads) {
    const NormShape& shape = p.shape;
    const bool channels = p.x_stride.c == 1 && p.g_stride.c == 1 && (!p.dx || p.dx_stride.c == 1);
    const bool positions = p.x_stride.s == 1 && p.g_stride.s == 1 && (!p.dx || p.dx_stride.s == 1) &&
                           !(channels && shape.positions == 1);
    const bool parallel = threads > 1 && shape.examples * shape.rows * shape.channels * shape.positions > kSerial;
    const int64_t groups = positions ? shape.groups : 1, tasks = std::max<int64_t>(1, shape.examples * groups);
    const int64_t parts = parallel ? std::min(shape.rows, (threads + tasks - 1) / tasks) : 1;
    const int64_t numbers = shape.examples * shape.channels;
    if (shape.positions == 0) {
        std::fill(weight, weight + numbers, 0.0f), std::fill(bias, bias + numbers, 0.0f);
        return;
    }
    std::vector<double> sums(2 * std::max<int64_t>(1, parts) * numbers);
#pragma omp parallel num_threads(threads) if (parallel)
    {
        Columns columns(shape.channels);
#pragma omp for collapse(3) schedule(static)
        for (int64_t example = 0; example < shape.examples; ++example) {
            for (int64_t i = 0; i < parts; ++i) {
                for (int64_t group = 0; group < groups; ++group) {
                    double* to = sums.data() + 2 * i * numbers + example * shape.channels;
                    const int64_t row = example * shape.rows;
                    const Part part{row + shape.rows * i / parts, row + shape.rows * (i + 1) / parts, to, to + numbers};
                    if (positions) {
                        along_positions(p, part, group, &columns);
                    } else {
                        along_channels(p, part, &columns);
                    }
                }
            }
        }
    }
    for (int64_t i = 0; i < numbers; ++i) {
        double of_weight = 0, of_bias = 0;
        for (int64_t part = 0; part < parts; ++part) {
            of_weight += sums[2 * part * numbers + i];
            of_bias += sums[(2 * part + 1) * numbers + i];
        }
        weight[i] = static_cast<float>(of_weight), bias[i] = static_cast<float>(of_bias);
    }
}

template <class T>
void run(const Norm& n, const void* x, const void* g, const float* gamma, void* dx, float* weight, float* bias,
         int threads) {
    run(Problem<T>{static_cast<const T*>(x), static_cast<const T*>(g), gamma, static_cast<T*>(dx), n.x_stride,
                   n.g_stride, n.dx_stride, n.shape, n.eps},
        weight, bias, threads);
}

}  // namespace

void group_norm_backward(const Norm& norm, const void* x, const void* g, const float* gamma, void* dx, float* weight,
                         float* bias, int threads) {
    if (norm.dtype == BFloat16) {
        run<Brain>(norm, x, g, gamma, dx, weight, bias, threads);
    } else {
        run<float>(norm, x, g, gamma, dx, weight, bias, threads);
    }
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
