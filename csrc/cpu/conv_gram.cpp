// Squared norms of convolution gradients from Gram matrices of pixels: a patch is a set of pixels, so
//
//     <patch_t, patch_s> = sum over taps of <x[t + tap], x[s + tap]>,
//
// and one Gram of the C channels of a pixel, looked at through `taps` shifts, does what one of C * taps would.
//
// This file is compiled once for each instruction set, into a namespace of its own (DPFAST_ISA).
#include <algorithm>
#include <cmath>

#include "isa.h"

namespace dpfast {
namespace DPFAST_ISA {
namespace {

using std::int64_t;

// What one example is: Grams of its rows * pixels and of its rows * positions.
struct Example {
    const float* x;
    const float* y;
    const PixelGram* shape;
};

int64_t volume(const int64_t* sizes) { return sizes[0] * sizes[1] * sizes[2]; }

// Output positions [from, to) along a dimension whose pixel, shifted by a tap, lies inside of the image.
void inside(const PixelGram& s, int dim, int64_t shift, int64_t* from, int64_t* to) {
    *from = std::max<int64_t>(0, -shift);
    *to = std::min(s.out[dim], s.in[dim] - shift);
}

typedef float Eight __attribute__((vector_size(32)));
typedef float AnyEight __attribute__((vector_size(32), aligned(4)));
constexpr int64_t kEight = 8;  // numbers in a vector, on every processor: lines of images are short

// The sum of products of `count` lines of n numbers each, all added up.
double dots(const float* x, int64_t x_step, const float* y, int64_t y_step, int64_t n, int64_t count) {
    Eight sum{};
    float rest[kEight] = {};
    for (int64_t line = 0; line < count; ++line, x += x_step, y += y_step) {
        int64_t i = 0;
        for (; i + kEight <= n; i += kEight) {
            sum += *reinterpret_cast<const AnyEight*>(x + i) * *reinterpret_cast<const AnyEight*>(y + i);
        }
        for (int64_t j = 0; i + j < n; ++j) rest[j] += x[i + j] * y[i + j];
    }
    double total = 0;
    for (int j = 0; j < kEight; ++j) total += sum[j] + rest[j];
    return total;
}

// Sum over pairs of positions (t, s), t in row r, of y[t][s] * x[t + tap][s + tap]: one tap. Lines of s behind that of
// t count twice, those before it not at all.
double shifted(const Example& e, int64_t r, int64_t shift_d, int64_t shift_h, int64_t shift_w) {
    const PixelGram& shape = *e.shape;
    const int64_t pixels = volume(shape.in), positions = volume(shape.out);
    const int64_t x_step = shape.rows * pixels, y_step = shape.rows * positions;
    int64_t d0, d1, h0, h1, w0, w1;
    inside(shape, 0, shift_d, &d0, &d1);
    inside(shape, 1, shift_h, &h0, &h1);
    inside(shape, 2, shift_w, &w0, &w1);
    if (w1 <= w0) return 0;
    double once = 0, twice = 0;
    for (int64_t d = d0; d < d1; ++d) {
        for (int64_t h = h0; h < h1; ++h) {
            for (int64_t w = w0; w < w1; ++w) {
                const int64_t t = r * positions + (d * shape.out[1] + h) * shape.out[2] + w;
                const int64_t u = r * pixels + ((d + shift_d) * shape.in[1] + h + shift_h) * shape.in[2] + w + shift_w;
                const auto lines = [&](int64_t row, int64_t at_d, int64_t at_h, int64_t count) {
                    const float* y = e.y + t * y_step + row * positions + (at_d * shape.out[1] + at_h) * shape.out[2] + w0;
                    const float* x = e.x + u * x_step + row * pixels +
                                     ((at_d + shift_d) * shape.in[1] + at_h + shift_h) * shape.in[2] + w0 + shift_w;
                    return dots(x, shape.in[2], y, shape.out[2], w1 - w0, count);
                };
                once += lines(r, d, h, 1);
                twice += lines(r, d, h + 1, h1 - h - 1);
                for (int64_t d2 = d + 1; d2 < d1; ++d2) twice += lines(r, d2, h0, h1 - h0);
                for (int64_t row = r + 1; row < shape.rows; ++row) {
                    for (int64_t d2 = d0; d2 < d1; ++d2) twice += lines(row, d2, h0, h1 - h0);
                }
            }
        }
    }
    return once + 2 * twice;
}

template <class F>
void for_taps(const PixelGram& s, F f) {
    for (int64_t i = 0; i < s.kernel[0]; ++i) {
        for (int64_t j = 0; j < s.kernel[1]; ++j) {
            for (int64_t k = 0; k < s.kernel[2]; ++k) {
                f(i * s.dilation[0] - s.pad[0], j * s.dilation[1] - s.pad[1], k * s.dilation[2] - s.pad[2]);
            }
        }
    }
}

// Sum over positions of row r of |patch_t| |y_t|, from the diagonals.
double magnitude(const Example& e, int64_t r) {
    const PixelGram& s = *e.shape;
    const int64_t pixels = volume(s.in), positions = volume(s.out);
    double total = 0;
    for (int64_t t = 0; t < positions; ++t) {
        const int64_t d = t / s.out[2] / s.out[1], h = t / s.out[2] % s.out[1], w = t % s.out[2];
        double patch = 0;
        for_taps(s, [&](int64_t sd, int64_t sh, int64_t sw) {
            const int64_t a = d + sd, b = h + sh, c = w + sw;
            if (a < 0 || a >= s.in[0] || b < 0 || b >= s.in[1] || c < 0 || c >= s.in[2]) return;
            const int64_t u = r * pixels + (a * s.in[1] + b) * s.in[2] + c;
            patch += e.x[u * (s.rows * pixels + 1)];
        });
        const double y = e.y[(r * positions + t) * (s.rows * positions + 1)];
        total += std::sqrt(std::max(0.0, patch)) * std::sqrt(std::max(0.0, y));
    }
    return total;
}

}  // namespace

void conv_gram(const PixelGram& shape, const float* x, const float* y, double* sq, double* magnitudes, int threads) {
    const int64_t x_size = shape.rows * volume(shape.in), y_size = shape.rows * volume(shape.out);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t i = 0; i < shape.examples; ++i) {
        const Example e{x + i * x_size * x_size, y + i * y_size * y_size, &shape};
        double square = 0, sum = 0;
        for (int64_t r = 0; r < shape.rows; ++r) {
            for_taps(shape, [&](int64_t d, int64_t h, int64_t w) { square += shifted(e, r, d, h, w); });
            sum += magnitude(e, r);
        }
        sq[i] = square;
        magnitudes[i] = sum * sum;
    }
    (void)threads;  // unused without OpenMP
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
