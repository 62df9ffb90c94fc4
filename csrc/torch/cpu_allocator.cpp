// torch's CPU allocator over the arena: asks the thread's account first, else the allocator that was there
// before. Thin: it translates between c10 and the C table of the core, which is passed in as a capsule.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>

#include <array>
#include <cstring>

#include "capi/tem.h"

namespace py = pybind11;

namespace {

constexpr size_t kMessageBytes = 2048;
// torch replaces an allocator of the same or a lower priority. Above 0, so that a library that sets its own
// at the default priority afterwards does not take ours away under live tensors.
constexpr uint8_t kPriority = 1;

const tem_host_api* core = nullptr;

class CpuAllocator final : public c10::Allocator {
 public:
  explicit CpuAllocator(c10::Allocator* before) : before_(before) {}

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return before_->allocate(bytes);
    void* block = nullptr;
    std::array<char, kMessageBytes> message{};
    switch (core->allocate(bytes, &block, message.data(), message.size())) {
      case TEM_OK:
        return {block, block, &CpuAllocator::release, c10::Device(c10::DeviceType::CPU)};
      case TEM_NO_SCOPE:
        return before_->allocate(bytes);
      case TEM_OUT_OF_MEMORY:
        TORCH_CHECK_WITH(OutOfMemoryError, false, "torch_elastic_mem: ", message.data());
      case TEM_FAILED:
        break;
    }
    TORCH_CHECK(false, "torch_elastic_mem: ", message.data());
  }

  // One deleter must know both kinds of pointer: raw_deallocate has nothing but the pointer.
  c10::DeleterFnPtr raw_deleter() const override { return &CpuAllocator::release_any; }

  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void release(void* block) { core->release(block); }
  static void release_any(void* block) {
    if (core->release(block) == 0) instance->before_->raw_deallocate(block);
  }

 public:
  static CpuAllocator* instance;

 private:
  c10::Allocator* before_;
};

CpuAllocator* CpuAllocator::instance = nullptr;

void install(const py::capsule& api) {
  const auto* const table = api.get_pointer<const tem_host_api>();
  TORCH_CHECK(std::strcmp(api.name(), TEM_HOST_API_NAME) == 0 && table->version == TEM_HOST_API_VERSION,
              "torch_elastic_mem: _torch and _C are of different builds; install the package again");
  if (CpuAllocator::instance != nullptr) return;
  core = table;
  // Leaked: torch frees tensors while static destructors run.
  CpuAllocator::instance = new CpuAllocator(c10::GetCPUAllocator());
  c10::SetCPUAllocator(CpuAllocator::instance, kPriority);
}

}  // namespace

PYBIND11_MODULE(_torch, module) {
  module.doc() = "What torch_elastic_mem plugs into torch from C++.";
  module.attr("TORCH_VERSION") = TEM_TORCH_VERSION;
  module.def("install_cpu_allocator", &install);
}
