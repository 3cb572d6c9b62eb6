// The functions that are compiled once for each instruction set that this build has, in a namespace of each.
#pragma once

#include "dpfast.h"

#define DPFAST_CONV                                                                                                    \
    std::int64_t conv_scratch(const Conv& c, bool sum, int threads);                                                  \
    void conv_grads(const Conv& c, const void* x, const void* y, const float* weights, float* out, double* sq,        \
                    double* scratch, int threads);

#define DPFAST_FUNCTIONS                                                                                              \
    void affine_grads(const float* a, Dims a_stride, const float* g, Dims g_stride, Dims size, float* weight,         \
                      float* bias, int threads);                                                                      \
    void bias_grads(const void* g, Dims g_stride, Dims size, Dtype dtype, float* bias, int threads);                  \
    void sq_norms(const float* grads, std::int64_t examples, std::int64_t numbers, std::int64_t stride,               \
                  double* parts, double* sq, int threads);                                                            \
    void clipped_sums(const Stored* stored, std::int64_t count, std::int64_t examples, const float* weights,          \
                      int threads);                                                                                   \
    void group_norm_backward(const Norm& norm, const void* x, const void* g, const float* gamma, void* dx,            \
                             float* weight, float* bias, int threads);                                                \
    void noised(const Noise& noise, const void* in, void* out, std::int64_t n, Dtype dtype, int threads);             \
    void keyed(const Keyed& k, const std::int64_t* ids, float* out, int threads);                                     \
    void fingerprints(const Memory* memory, std::int64_t count, std::uint64_t* out, int threads);                     \
    void conv_gram(const PixelGram& shape, const float* x, const float* y, double* sq, double* magnitudes, int threads); \
    DPFAST_CONV

namespace dpfast {
constexpr std::int64_t kSquareBlock = 1 << 16;  // numbers of a gradient that one task of sq_norms squares

namespace base {
DPFAST_FUNCTIONS
}
namespace v3 {
DPFAST_FUNCTIONS
}
namespace v4 {
DPFAST_FUNCTIONS
}
namespace v4bf16 {  // the rest is that of v4
DPFAST_CONV
}
}  // namespace dpfast
