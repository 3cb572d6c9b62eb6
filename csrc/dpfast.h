// What the native module computes. Every function takes raw pointers, sizes and strides (in elements); memory is
// allocated, checked and kept alive by the Python caller in dpfast/kernels.
#pragma once

#include <cstdint>

namespace dpfast {

// Raised whenever a signature below changes; dpfast/kernels/dispatch.py refuses another value, so that a module built
// from older sources is never called.
constexpr int kAbi = 1;

// Sizes, or strides in elements, of a tensor [B, M, C, S]: examples, rows of an example, channels, positions.
struct Dims {
    std::int64_t b, m, c, s;
};

// weight[b, c] = sum over m, s of a * g and bias[b, c] = sum over m, s of g, both contiguous [B, C].
// Any strides, 0 included. Uses at most `threads` threads.
void affine_grads(const float* a, Dims a_stride, const float* g, Dims g_stride, Dims size, float* weight, float* bias,
                  int threads);

}  // namespace dpfast
