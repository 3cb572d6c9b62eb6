// Which of the compiled instruction sets runs, decided once by what the processor has.
#include <cstdlib>
#include <cstring>

#include "isa.h"

namespace dpfast {
namespace {

enum class Isa { base, v3, v4, v4bf16 };

// DPFAST_ISA=base, v3 or v4 asks for less than the processor has.
Isa detect() {
#ifdef DPFAST_LEVELS
    const char* wanted = std::getenv("DPFAST_ISA");
    const bool any = !wanted || !*wanted;
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#ifdef DPFAST_BF16
    const bool bf16 = v4 && __builtin_cpu_supports("avx512bf16");
    if (bf16 && (any || !std::strcmp(wanted, "v4bf16"))) return Isa::v4bf16;
#endif
    if (v4 && (any || !std::strncmp(wanted, "v4", 2))) return Isa::v4;
    if (v3 && (any || std::strcmp(wanted, "base"))) return Isa::v3;
#endif
    return Isa::base;
}

Isa isa() {
    static const Isa found = detect();
    return found;
}

}  // namespace

const char* instruction_set() {
    switch (isa()) {
        case Isa::v4bf16: return "v4bf16";
        case Isa::v4: return "v4";
        case Isa::v3: return "v3";
        default: return "base";
    }
}

#ifdef DPFAST_LEVELS
#define DPFAST_RUN(call)                \
    switch (isa()) {                    \
        case Isa::v4bf16:               \
        case Isa::v4: return v4::call;  \
        case Isa::v3: return v3::call;  \
        default: return base::call;     \
    }
#else
#define DPFAST_RUN(call) return base::call;
#endif

#ifdef DPFAST_BF16
#define DPFAST_RUN_CONV(call)                                 \
    if (isa() == Isa::v4bf16) return v4bf16::call;            \
    DPFAST_RUN(call)
#else
#define DPFAST_RUN_CONV(call) DPFAST_RUN(call)
#endif

void affine_grads(const float* a, Dims a_stride, const float* g, Dims g_stride, Dims size, float* weight, float* bias,
                  int threads) {
    DPFAST_RUN(affine_grads(a, a_stride, g, g_stride, size, weight, bias, threads))
}

void bias_grads(const void* g, Dims g_stride, Dims size, Dtype dtype, float* bias, int threads) {
    DPFAST_RUN(bias_grads(g, g_stride, size, dtype, bias, threads))
}

void sq_norms(const float* grads, std::int64_t examples, std::int64_t numbers, std::int64_t stride, double* parts,
              double* sq, int threads) {
    DPFAST_RUN(sq_norms(grads, examples, numbers, stride, parts, sq, threads))
}

std::int64_t square_blocks(std::int64_t numbers) { return (numbers + kSquareBlock - 1) / kSquareBlock; }

void clipped_sums(const Stored* stored, std::int64_t count, std::int64_t examples, const float* weights, int threads) {
    DPFAST_RUN(clipped_sums(stored, count, examples, weights, threads))
}

void group_norm_backward(const Norm& norm, const void* x, const void* g, const float* gamma, void* dx, float* weight,
                         float* bias, int threads) {
    DPFAST_RUN(group_norm_backward(norm, x, g, gamma, dx, weight, bias, threads))
}

void noised(const Noise& noise, const void* in, void* out, std::int64_t n, Dtype dtype, int threads) {
    DPFAST_RUN(noised(noise, in, out, n, dtype, threads))
}

void keyed(const Keyed& k, const std::int64_t* ids, float* out, int threads) {
    DPFAST_RUN(keyed(k, ids, out, threads))
}

void fingerprints(const Memory* memory, std::int64_t count, std::uint64_t* out, int threads) {
    DPFAST_RUN(fingerprints(memory, count, out, threads))
}

std::int64_t conv_scratch(const Conv& c, bool sum, int threads) { DPFAST_RUN_CONV(conv_scratch(c, sum, threads)) }

void conv_grads(const Conv& c, const void* x, const void* y, const float* weights, float* out, double* sq,
                double* scratch, int threads) {
    DPFAST_RUN_CONV(conv_grads(c, x, y, weights, out, sq, scratch, threads))
}

void conv_gram(const PixelGram& shape, const float* x, const float* y, double* sq, double* magnitudes, int threads) {
    DPFAST_RUN(conv_gram(shape, x, y, sq, magnitudes, threads))
}

}  // namespace dpfast
