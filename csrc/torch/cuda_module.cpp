// The module _torch_cuda: hands torch the allocator.
#include <pybind11/pybind11.h>

#include <cstring>

#include "torch/cuda_allocator.hpp"

namespace py = pybind11;

namespace {

constexpr const char* kDirectoryName = "torch_elastic_mem.malloc_directory.v1";

std::shared_ptr<tem::torch_cuda::caching::CUDAAllocator> make_allocator(const py::capsule& capsule) {
  const char* const name = capsule.name();
  TORCH_CHECK(name != nullptr && std::strcmp(name, kDirectoryName) == 0,
              "torch_elastic_mem: _torch_cuda and _C are of different builds; install the package again");
  auto& allocator = tem::torch_cuda::CudaAllocator::over(*capsule.get_pointer<tem::MallocDirectory>());
  // It is never destroyed, whatever torch does with its pointer.
  return {&allocator, [](tem::torch_cuda::caching::CUDAAllocator*) {}};
}

}  // namespace

PYBIND11_MODULE(_torch_cuda, module) {
  module.doc() = "torch's CUDA allocator over accounts of torch_elastic_mem.";
  module.attr("TORCH_VERSION") = TEM_TORCH_VERSION;
  module.def("make_allocator", &make_allocator);
}
