// Per-example gradients of a norm's affine parameters, in one pass over a and g, and of biases.
//
// Three kernels for three layouts: positions contiguous (NCHW), channels contiguous (channels_last, LayerNorm), and
// anything else. All multiply and add in double: products are exact, results are rounded once, and reading memory
// still takes longer than the arithmetic. Biases add up kBrief floats before they go into a double.
//
// This file is compiled once for each instruction set, into a namespace of its own (DPFAST_ISA).
#include <algorithm>

#include "isa.h"
#include "vec.h"

namespace dpfast {
namespace DPFAST_ISA {
namespace {

constexpr std::int64_t kRun = 16;               // positions that the channels-contiguous kernel takes at a time
constexpr std::int64_t kTile = 64;              // positions that the general kernel gathers at a time
constexpr std::int64_t kColumns = 256;          // channels per task where channels are contiguous
constexpr std::int64_t kRows = 16;              // channels per task elsewhere
constexpr std::int64_t kSerial = 32768;         // elements below which threads cost more than they save

// Where one task reads (at its example and first channel) and writes.
struct Task {
    const float* a;
    const float* g;
    Dims a_stride, g_stride;
    std::int64_t rows, channels, positions;
    float* weight;
    float* bias;
};

inline Wide wide(const float* at) { return widen(load(at)); }

// Positions contiguous in a and g.
void positions_contiguous(const Task& t) {
    for (std::int64_t c = 0; c < t.channels; ++c) {
        Wide w0, w1, b0, b1;
        for (std::int64_t m = 0; m < t.rows; ++m) {
            const float* a = t.a + c * t.a_stride.c + m * t.a_stride.m;
            const float* g = t.g + c * t.g_stride.c + m * t.g_stride.m;
            std::int64_t s = 0;
            for (; s + 2 * kLanes <= t.positions; s += 2 * kLanes) {
                const Wide g0 = wide(g + s), g1 = wide(g + s + kLanes);
                w0 += wide(a + s) * g0;
                w1 += wide(a + s + kLanes) * g1;
                b0 += g0;
                b1 += g1;
            }
            for (; s < t.positions; ++s) {
                w0.low[0] += static_cast<double>(a[s]) * g[s];
                b0.low[0] += g[s];
            }
        }
        t.weight[c] = static_cast<float>(total(w0 + w1));
        t.bias[c] = static_cast<float>(total(b0 + b1));
    }
}

inline void put(const Wide& from, float* to) {
    for (int i = 0; i < kLanes / 2; ++i) {
        to[i] = static_cast<float>(from.low[i]), to[kLanes / 2 + i] = static_cast<float>(from.high[i]);
    }
}

// Adds `count` positions of N * kLanes contiguous channels to the totals.
template <int N>
inline void add_positions(const float* a, const float* g, std::int64_t a_step,
                                                         std::int64_t g_step, std::int64_t count, Wide* weight,
                                                         Wide* bias) {
    Wide w[N], b[N];
    for (int n = 0; n < N; ++n) w[n] = weight[n], b[n] = bias[n];
    for (std::int64_t s = 0; s < count; ++s) {
        for (int n = 0; n < N; ++n) {
            const Wide gn = wide(g + s * g_step + n * kLanes);
            w[n] += wide(a + s * a_step + n * kLanes) * gn;
            b[n] += gn;
        }
    }
    for (int n = 0; n < N; ++n) weight[n] = w[n], bias[n] = b[n];
}

// Channels contiguous in a and g; a multiple of kLanes, at most kColumns. A few positions of all channels at a time keep
// the reads in memory order.
void channels_contiguous(const Task& t) {
    const int lanes = static_cast<int>(t.channels / kLanes);
    Wide weight[kColumns / kLanes], bias[kColumns / kLanes];
    for (std::int64_t m = 0; m < t.rows; ++m) {
        for (std::int64_t s = 0; s < t.positions; s += kRun) {
            const std::int64_t count = std::min(kRun, t.positions - s);
            const float* a = t.a + m * t.a_stride.m + s * t.a_stride.s;
            const float* g = t.g + m * t.g_stride.m + s * t.g_stride.s;
            int n = 0;
            for (; n + 4 <= lanes; n += 4) {
                add_positions<4>(a + n * kLanes, g + n * kLanes, t.a_stride.s, t.g_stride.s, count, weight + n,
                                 bias + n);
            }
            for (; n < lanes; ++n) {
                add_positions<1>(a + n * kLanes, g + n * kLanes, t.a_stride.s, t.g_stride.s, count, weight + n,
                                 bias + n);
            }
        }
    }
    for (int n = 0; n < lanes; ++n) {
        put(weight[n], t.weight + n * kLanes);
        put(bias[n], t.bias + n * kLanes);
    }
}

// Any strides, at most kRows channels: tiles of positions are gathered, so that each cache line of a
// channels-contiguous operand serves all the channels of the task.
void any_layout(const Task& t) {
    Wide weight[kRows], bias[kRows];
    const std::int64_t every = t.rows * t.positions;
    for (std::int64_t first = 0; first < every; first += kTile) {
        const int count = static_cast<int>(std::min(kTile, every - first));
        std::int64_t a_at[kTile], g_at[kTile];
        std::int64_t m = first / t.positions, s = first % t.positions;
        for (int i = 0; i < count; ++i) {
            a_at[i] = m * t.a_stride.m + s * t.a_stride.s;
            g_at[i] = m * t.g_stride.m + s * t.g_stride.s;
            if (++s == t.positions) {
                s = 0;
                ++m;
            }
        }
        for (std::int64_t c = 0; c < t.channels; ++c) {
            float a[kTile] = {}, g[kTile] = {};
            for (int i = 0; i < count; ++i) {
                a[i] = t.a[c * t.a_stride.c + a_at[i]];
                g[i] = t.g[c * t.g_stride.c + g_at[i]];
            }
            for (int i = 0; i < count; i += kLanes) {
                const Wide gi = wide(g + i);
                weight[c] += wide(a + i) * gi;
                bias[c] += gi;
            }
        }
    }
    for (std::int64_t c = 0; c < t.channels; ++c) {
        t.weight[c] = static_cast<float>(total(weight[c]));
        t.bias[c] = static_cast<float>(total(bias[c]));
    }
}

enum class Layout { positions, channels, any };

Layout layout_of(Dims a, Dims g, Dims size) {
    if (a.s == 1 && g.s == 1 && size.s >= kLanes) return Layout::positions;
    if (a.c == 1 && g.c == 1 && size.c >= kLanes) return Layout::channels;
    return Layout::any;
}

// Rows that follow each other as positions do are positions: longer runs for the kernels.
void join_rows(Dims* a, Dims* g, Dims* size) {
    if (size->s != 1 && (a->m != a->s * size->s || g->m != g->s * size->s)) return;
    if (size->s == 1) a->s = a->m, g->s = g->m;
    size->s *= size->m;
    size->m = 1;
}

// Adds up `count` vectors, `step` numbers from one to the next, lane by lane.
template <class T>
inline Wide sum_of(const T* g, std::int64_t step, std::int64_t count) {
    Wide sum;
    for (std::int64_t s = 0; s < count;) {
        Vec part{};
        for (int i = 0; i < kBrief && s < count; ++i, ++s) part += load(g + s * step);
        sum += widen(part);
    }
    return sum;
}

// bias[c] of one example, for some channels.
template <class T>
void sum_channels(const T* g, Dims step, const Dims& size, std::int64_t channels, float* bias) {
    std::int64_t c = 0;
    if (step.c == 1 && step.s != 1) {
        for (; c + kLanes <= channels; c += kLanes) {
            Wide sum;
            for (std::int64_t m = 0; m < size.m; ++m) sum += sum_of(g + m * step.m + c, step.s, size.s);
            put(sum, bias + c);
        }
    }
    for (; c < channels; ++c) {
        Wide sum;
        for (std::int64_t m = 0; m < size.m; ++m) {
            const T* from = g + m * step.m + c * step.c;
            const std::int64_t whole = step.s == 1 ? size.s / kLanes : 0;
            sum += sum_of(from, kLanes, whole);
            for (std::int64_t s = whole * kLanes; s < size.s; ++s) sum.low[0] += number(from[s * step.s]);
        }
        bias[c] = static_cast<float>(total(sum));
    }
}

template <class T>
void sum_all(const T* g, Dims step, Dims size, float* bias, int threads) {
    Dims same = step;  // of the other operand, if there were one
    join_rows(&same, &step, &size);
    const std::int64_t blocks = (size.c + kRows - 1) / kRows;
    const bool parallel = threads > 1 && size.b * size.m * size.c * size.s > kSerial;
    (void)parallel;  // unused without OpenMP
#pragma omp parallel for collapse(2) num_threads(threads) if (parallel)
    for (std::int64_t b = 0; b < size.b; ++b) {
        for (std::int64_t block = 0; block < blocks; ++block) {
            const std::int64_t c = block * kRows;
            sum_channels(g + b * step.b + c * step.c, step, size, std::min(kRows, size.c - c), bias + b * size.c + c);
        }
    }
}

}  // namespace

void bias_grads(const void* g, Dims g_stride, Dims size, Dtype dtype, float* bias, int threads) {
    if (dtype == BFloat16) {
        sum_all(static_cast<const Brain*>(g), g_stride, size, bias, threads);
    } else {
        sum_all(static_cast<const float*>(g), g_stride, size, bias, threads);
    }
}

void affine_grads(const float* a, Dims a_stride, const float* g, Dims g_stride, Dims size, float* weight, float* bias,
                  int threads) {
    join_rows(&a_stride, &g_stride, &size);
    const Layout layout = layout_of(a_stride, g_stride, size);
    const std::int64_t width = layout == Layout::channels ? kColumns : kRows;
    const std::int64_t blocks = (size.c + width - 1) / width;
    const bool parallel = threads > 1 && size.b * size.m * size.c * size.s > kSerial;
    (void)parallel;  // unused without OpenMP
#pragma omp parallel for collapse(2) num_threads(threads) if (parallel)
    for (std::int64_t b = 0; b < size.b; ++b) {
        for (std::int64_t block = 0; block < blocks; ++block) {
            std::int64_t c = block * width;
            const auto task = [&](std::int64_t from, std::int64_t channels) {
                return Task{a + b * a_stride.b + from * a_stride.c,
                            g + b * g_stride.b + from * g_stride.c,
                            a_stride,
                            g_stride,
                            size.m,
                            channels,
                            size.s,
                            weight + b * size.c + from,
                            bias + b * size.c + from};
            };
            const std::int64_t channels = std::min(width, size.c - c);
            if (layout == Layout::positions) {
                positions_contiguous(task(c, channels));
            } else if (layout == Layout::channels) {
                const std::int64_t whole = channels / kLanes * kLanes;
                channels_contiguous(task(c, whole));
                if (whole < channels) any_layout(task(c + whole, channels - whole));
            } else {
                any_layout(task(c, channels));
            }
        }
    }
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
