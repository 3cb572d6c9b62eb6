#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>

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
    m.def("affine_grads", &affine_grads, py::arg("a"), py::arg("a_stride"), py::arg("g"), py::arg("g_stride"),
          py::arg("size"), py::arg("weight"), py::arg("bias"), py::arg("threads"));
}
