// Numbers by which a change of memory shows: a sum over 32-bit words, each times an odd number that depends on its place.
//
// This file is compiled once for each instruction set, into a namespace of its own (DPFAST_ISA).
//
// One changed word always shows (odd numbers have inverses), exchanged words nearly always; this is no cryptography.
#include <algorithm>
#include <cstring>

#include "isa.h"

namespace dpfast {
namespace DPFAST_ISA {
namespace {

using std::int64_t;
using std::uint32_t;
using std::uint64_t;

constexpr int64_t kWords = 1 << 30;    // at a time: places are counted in 32 bits
constexpr int64_t kSerial = 1 << 20;   // bytes below which threads cost more than they save

uint64_t words(const char* memory, int64_t first, int64_t count) {
    uint64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t word;
        std::memcpy(&word, memory + 4 * i, sizeof word);  // at any address
        const uint32_t odd = static_cast<uint32_t>(first + i) * 0x9E3779B2u | 1u;
        sum += static_cast<uint64_t>(word) * odd;
    }
    return sum;
}

}  // namespace

void fingerprints(const Memory* memory, int64_t count, uint64_t* out, int threads) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; ++i) bytes += memory[i].bytes;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1 && bytes > kSerial)
    for (int64_t i = 0; i < count; ++i) {
        const char* at = static_cast<const char*>(memory[i].at);
        const int64_t whole = memory[i].bytes / 4, rest = memory[i].bytes % 4;
        uint64_t sum = 0;
        for (int64_t first = 0; first < whole; first += kWords) {
            sum += words(at + 4 * first, first, std::min(kWords, whole - first));
        }
        uint32_t last = 0;
        if (rest) std::memcpy(&last, at + 4 * whole, rest);
        out[i] = sum + last * 0x9E3779B1ull + static_cast<uint64_t>(memory[i].bytes);
    }
    (void)threads;  // unused without OpenMP
}

}  // namespace DPFAST_ISA
}  // namespace dpfast
