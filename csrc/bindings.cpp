#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "dpfast.h"

namespace py = pybind11;

namespace {

using Four = std::array<std::int64_t, 4>;

dpfast::Dims dims(const Four& four) { return {four[0], four[1], four[2], four[3]}; }

void affine_grads(std::uintptr_t a, const Four& a_stride, std::uintptr_t g, const Four& g_stride, const Four& size,
                  std::uintptr_t weight, std::uintptr_t bias, int threads) {
    py::gil_scoped_release release;
    dpfast::affine_grads(reinterpret_cast<const float*>(a), dims(a_stride), reinterpret_cast<const float*>(g),
                         dims(g_stride), dims(size), reinterpret_cast<float*>(weight),
                         reinterpret_cast<float*>(bias), threads);
}

void bias_grads(std::uintptr_t g, const Four& g_stride, const Four& size, int dtype, std::uintptr_t bias, int threads) {
    py::gil_scoped_release release;
    dpfast::bias_grads(reinterpret_cast<const void*>(g), dims(g_stride), dims(size), static_cast<dpfast::Dtype>(dtype),
                       reinterpret_cast<float*>(bias), threads);
}

std::vector<std::uint64_t> fingerprints(const std::vector<std::pair<std::uintptr_t, std::int64_t>>& memory, int threads) {
    std::vector<dpfast::Memory> places;
    for (const auto& [at, bytes] : memory) places.push_back({reinterpret_cast<const void*>(at), bytes});
    std::vector<std::uint64_t> out(memory.size());
    py::gil_scoped_release release;
    dpfast::fingerprints(places.data(), static_cast<std::int64_t>(places.size()), out.data(), threads);
    return out;
}

void noised(std::uintptr_t in, std::uintptr_t out, std::int64_t n, int dtype, const std::array<double, 3>& numbers,
            const std::array<std::uint32_t, 8>& key, int threads) {
    dpfast::Noise noise{numbers[0], numbers[1], numbers[2], {}};
    std::copy(key.begin(), key.end(), noise.key);
    py::gil_scoped_release release;
    dpfast::noised(noise, reinterpret_cast<const void*>(in), reinterpret_cast<void*>(out), n,
                   static_cast<dpfast::Dtype>(dtype), threads);
}

using Three = std::array<std::int64_t, 3>;
void keyed(std::uintptr_t out, std::uintptr_t ids, const Three& sizes, std::int64_t first, std::uint32_t step,
           const std::array<std::uint32_t, 2>& key, bool normal, int threads) {
    const dpfast::Keyed k{sizes[0], sizes[1], sizes[2], first, step, {key[0], key[1]}, normal};
    py::gil_scoped_release release;
    dpfast::keyed(k, reinterpret_cast<const std::int64_t*>(ids), reinterpret_cast<float*>(out), threads);
}

using Five = std::array<std::int64_t, 5>;

dpfast::Conv conv(const Five& sizes, const std::array<Three, 6>& geometry, const Five& x_stride, const Five& y_stride,
                  int dtype, bool patches) {
    dpfast::Conv c{};
    c.examples = sizes[0], c.rows = sizes[1], c.groups = sizes[2], c.c = sizes[3], c.p = sizes[4];
    std::int64_t* to[6] = {c.in, c.out, c.kernel, c.stride, c.dilation, c.pad};
    for (int i = 0; i < 6; ++i) std::copy(geometry[i].begin(), geometry[i].end(), to[i]);
    std::copy(x_stride.begin(), x_stride.end(), c.x_stride);
    std::copy(y_stride.begin(), y_stride.end(), c.y_stride);
    c.dtype = static_cast<dpfast::Dtype>(dtype);
    c.patches = patches;
    return c;
}

void conv_grads(const dpfast::Conv& c, std::uintptr_t x, std::uintptr_t y, std::uintptr_t weights, std::uintptr_t out,
                std::uintptr_t sq, std::uintptr_t scratch, int threads) {
    py::gil_scoped_release release;
    dpfast::conv_grads(c, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(y),
                       reinterpret_cast<const float*>(weights), reinterpret_cast<float*>(out),
                       reinterpret_cast<double*>(sq), reinterpret_cast<double*>(scratch), threads);
}

void sq_norms(std::uintptr_t grads, std::int64_t examples, std::int64_t numbers, std::int64_t stride,
              std::uintptr_t parts, std::uintptr_t sq, int threads) {
    py::gil_scoped_release release;
    dpfast::sq_norms(reinterpret_cast<const float*>(grads), examples, numbers, stride,
                     reinterpret_cast<double*>(parts), reinterpret_cast<double*>(sq), threads);
}

// Of each tensor: where its gradients lie, their numbers and stride, and where the sum goes.
using StoredAt = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::uintptr_t>;

void clipped_sums(const std::vector<StoredAt>& places, std::int64_t examples, std::uintptr_t weights, int threads) {
    std::vector<dpfast::Stored> stored;
    for (const auto& [at, numbers, stride, out] : places) {
        stored.push_back({reinterpret_cast<const float*>(at), numbers, stride, reinterpret_cast<float*>(out)});
    }
    py::gil_scoped_release release;
    dpfast::clipped_sums(stored.data(), static_cast<std::int64_t>(stored.size()), examples,
                         reinterpret_cast<const float*>(weights), threads);
}

void group_norm_backward(const Five& shape, const std::array<Three, 3>& strides, double eps, int dtype,
                         std::uintptr_t x, std::uintptr_t g, std::uintptr_t gamma, std::uintptr_t dx,
                         std::uintptr_t weight, std::uintptr_t bias, int threads) {
    dpfast::Norm norm{};
    norm.shape = {shape[0], shape[1], shape[2], shape[3], shape[4]};
    dpfast::NormStride* to[3] = {&norm.x_stride, &norm.g_stride, &norm.dx_stride};
    for (int i = 0; i < 3; ++i) *to[i] = {strides[i][0], strides[i][1], strides[i][2]};
    norm.eps = eps, norm.dtype = static_cast<dpfast::Dtype>(dtype);
    py::gil_scoped_release release;
    dpfast::group_norm_backward(norm, reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(g),
                                reinterpret_cast<const float*>(gamma), reinterpret_cast<void*>(dx),
                                reinterpret_cast<float*>(weight), reinterpret_cast<float*>(bias), threads);
}

void conv_gram(std::int64_t examples, std::int64_t rows, const std::array<Three, 5>& geometry, std::uintptr_t x,
               std::uintptr_t y, std::uintptr_t sq, std::uintptr_t magnitudes, int threads) {
    dpfast::PixelGram shape{};
    shape.examples = examples, shape.rows = rows;
    std::int64_t* to[5] = {shape.in, shape.out, shape.kernel, shape.dilation, shape.pad};
    for (int i = 0; i < 5; ++i) std::copy(geometry[i].begin(), geometry[i].end(), to[i]);
    py::gil_scoped_release release;
    dpfast::conv_gram(shape, reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(y),
                      reinterpret_cast<double*>(sq), reinterpret_cast<double*>(magnitudes), threads);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of dpfast. Pointers are integers, strides count elements; call through dpfast.kernels.";
    m.attr("abi") = dpfast::kAbi;
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
    m.attr("compiler") = __VERSION__;
    m.attr("instruction_set") = dpfast::instruction_set();
    py::class_<dpfast::Conv>(m, "Conv")
        .def(py::init(&conv), py::arg("sizes"), py::arg("geometry"), py::arg("x_stride"), py::arg("y_stride"),
             py::arg("dtype"), py::arg("patches"))
        .def("scratch", &dpfast::conv_scratch, py::arg("sum"), py::arg("threads"));
    m.def("conv_grads", &conv_grads, py::arg("conv"), py::arg("x"), py::arg("y"), py::arg("weights"), py::arg("out"),
          py::arg("sq"), py::arg("scratch"), py::arg("threads"));
    m.def("square_blocks", &dpfast::square_blocks, py::arg("numbers"));
    m.def("sq_norms", &sq_norms, py::arg("grads"), py::arg("examples"), py::arg("numbers"), py::arg("stride"),
          py::arg("parts"), py::arg("sq"), py::arg("threads"));
    m.def("clipped_sums", &clipped_sums, py::arg("stored"), py::arg("examples"), py::arg("weights"),
          py::arg("threads"));
    m.def("noised", &noised, py::arg("values"), py::arg("out"), py::arg("n"), py::arg("dtype"), py::arg("numbers"),
          py::arg("key"), py::arg("threads"));
    m.def("keyed", &keyed, py::arg("out"), py::arg("ids"), py::arg("sizes"), py::arg("first"), py::arg("step"),
          py::arg("key"), py::arg("normal"), py::arg("threads"));
    m.def("fingerprints", &fingerprints, py::arg("memory"), py::arg("threads"));
    m.def("group_norm_backward", &group_norm_backward, py::arg("shape"), py::arg("strides"), py::arg("eps"),
          py::arg("dtype"), py::arg("x"), py::arg("g"), py::arg("gamma"), py::arg("dx"), py::arg("weight"),
          py::arg("bias"), py::arg("threads"));
    m.def("conv_gram", &conv_gram, py::arg("examples"), py::arg("rows"), py::arg("geometry"), py::arg("x"),
          py::arg("y"), py::arg("sq"), py::arg("magnitudes"), py::arg("threads"));
    m.def("affine_grads", &affine_grads, py::arg("a"), py::arg("a_stride"), py::arg("g"), py::arg("g_stride"),
          py::arg("size"), py::arg("weight"), py::arg("bias"), py::arg("threads"));
    m.def("bias_grads", &bias_grads, py::arg("g"), py::arg("g_stride"), py::arg("size"), py::arg("dtype"),
          py::arg("bias"), py::arg("threads"));
}
