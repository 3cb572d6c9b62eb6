// The functions of conv.cpp, once for each instruction set that this build has.
#pragma once

#include "dpfast.h"

#define DPFAST_CONV_FUNCTIONS                                                                                         \
    std::int64_t conv_scratch(const Conv& c, bool sum, int threads);                                                  \
    void conv_grads(const Conv& c, const void* x, const void* y, const float* weights, float* out, double* sq,        \
                    double* scratch, int threads);

namespace dpfast {
namespace base {
DPFAST_CONV_FUNCTIONS
}
namespace v3 {
DPFAST_CONV_FUNCTIONS
}
namespace v4 {
DPFAST_CONV_FUNCTIONS
}
}  // namespace dpfast
