// What the native module computes. Every function takes raw pointers, sizes and strides (in elements); memory is
// allocated, checked and kept alive by the Python caller in dpfast/kernels.
#pragma once

#include <cstdint>

namespace dpfast {

enum Dtype : int { Float32 = 0, BFloat16 = 1, Float64 = 2 };

// Raised whenever a signature below changes; dpfast/kernels/dispatch.py refuses another value, so that a module built
// from older sources is never called.
constexpr int kAbi = 8;

// Sizes, or strides in elements, of a tensor [B, M, C, S]: examples, rows of an example, channels, positions.
struct Dims {
    std::int64_t b, m, c, s;
};

// weight[b, c] = sum over m, s of a * g and bias[b, c] = sum over m, s of g, both contiguous [B, C].
// Any strides, 0 included. Uses at most `threads` threads.
void affine_grads(const float* a, Dims a_stride, const float* g, Dims g_stride, Dims size, float* weight, float* bias,
                  int threads);

// bias[b, c] = sum over m, s of g, contiguous [B, C]; g of `dtype`, any strides.
void bias_grads(const void* g, Dims g_stride, Dims size, Dtype dtype, float* bias, int threads);

// sq[e] = the sum of squares of gradient e, added up in double; `parts` has room for examples * square_blocks(numbers).
// A gradient is `numbers` floats in a row, the next one `stride` further.
void sq_norms(const float* grads, std::int64_t examples, std::int64_t numbers, std::int64_t stride, double* parts,
              double* sq, int threads);
std::int64_t square_blocks(std::int64_t numbers);

// Gradients of one tensor, each `numbers` floats in a row and `stride` further than the one before; and their sum.
struct Stored {
    const float* grads;
    std::int64_t numbers, stride;
    float* out;
};

// out = sum over e of weights[e] * gradient e, for `count` tensors; one with weights[e] = 0 is not looked at.
void clipped_sums(const Stored* stored, std::int64_t count, std::int64_t examples, const float* weights, int threads);

// Strides in elements of [rows, channels, positions].
struct NormStride {
    std::int64_t n, c, s;
};

struct NormShape {
    std::int64_t examples, rows, groups, channels, positions;  // rows of an example
};

// A group norm of x with output gradient g.
struct Norm {
    NormShape shape;
    NormStride x_stride, g_stride, dx_stride;
    double eps;
    Dtype dtype;  // of x, g and dx
};

// weight[e, c] = sum of x_hat * g and bias[e, c] = sum of g over the rows and positions of e; and, unless dx is null, the
// gradient of x, where gamma is the norm's weight (null: ones).
void group_norm_backward(const Norm& norm, const void* x, const void* g, const float* gamma, void* dx, float* weight,
                         float* bias, int threads);

// out[i] = (in[i] + scale * z[i]) / divisor of `n` numbers of Float32 or Float64, calculated in double. z: independent
// standard normal numbers from the ChaCha20 stream of `key` (eight words): with m = (n + 7) / 8 blocks, of 8 numbers each,
// z[j * m + b] is number j of block b.
//
// With a grid, a power of two, in[i] and scale * z[i] are first rounded to multiples of it; 0: not.
struct Noise {
    double scale, divisor, grid;
    std::uint32_t key[8];
};
void noised(const Noise& noise, const void* in, void* out, std::int64_t n, Dtype dtype, int threads);

// Random numbers of a key, of `count` for each of the rows of some examples; first: the number of an example's first row.
struct Keyed {
    std::int64_t examples, rows, count, first;
    std::uint32_t step, key[2];
    bool normal;  // or uniform
};

// out[(i * rows + k) * count + n]: with Philox4x32-10 of the counter (n / 4, ids[i], step, first + k) and the key, word
// n % 4: its upper 24 bits times 2^-24; or normal numbers of words 0 and 1 and of words 2 and 3.
void keyed(const Keyed& k, const std::int64_t* ids, float* out, int threads);

struct Memory {
    const void* at;
    std::int64_t bytes;
};

// out[i] = a number by which a change of memory[i] shows.
void fingerprints(const Memory* memory, std::int64_t count, std::uint64_t* out, int threads);

// A convolution x -> y with up to three spatial dimensions (fewer: the first ones are 1); sizes are of one group.
// Strides, in elements, are those of [rows, channels, three dimensions]; the rows of an example follow each other.
struct Conv {
    std::int64_t examples, rows, groups, c, p;  // rows of an example; input and output channels
    std::int64_t in[3], out[3], kernel[3], stride[3], dilation[3], pad[3];  // pad: before
    std::int64_t x_stride[5], y_stride[5];
    Dtype dtype;   // of x and y
    bool patches;  // write patches down, and order a G by channel and tap: for few input channels
};

// Doubles of scratch that conv_grads needs.
std::int64_t conv_scratch(const Conv& c, bool sum, int threads);

// With G[e] the gradient of example e by the weight, from inputs x and output gradients y, sums in float (where the
// processor multiplies bfloat16, numbers and sums below the smallest normal one are 0):
//   weights null:  out (if not null) = G, sq (if not null) = |G[e]|^2, added up in double;
//   else:          out = sum over e of weights[e] * G[e], where examples with weights[e] = 0 are not looked at.
// The same G in both cases, bit by bit. Layout of a G: [taps, groups * p, c] or, with patches, [groups * p, c * taps].
void conv_grads(const Conv& c, const void* x, const void* y, const float* weights, float* out, double* sq,
                double* scratch, int threads);

// Of a convolution with stride 1 and one group: rows of an example, extents of the image and of the output.
struct PixelGram {
    std::int64_t examples, rows;
    std::int64_t in[3], out[3], kernel[3], dilation[3], pad[3];
};

// From Grams x [examples, rows * pixels, rows * pixels] and y [examples, rows * positions, rows * positions]: |G[e]|^2,
// and (sum over positions of |patch| |y|)^2, in which its rounding error is expressed.
void conv_gram(const PixelGram& shape, const float* x, const float* y, double* sq, double* magnitudes, int threads);

// Instruction set in use: "v4bf16" (AVX-512 with bfloat16), "v4" (AVX-512), "v3" (AVX2) or "base".
const char* instruction_set();

}  // namespace dpfast
