// The CUDA driver's virtual memory calls, one function each. libcuda is opened at run time: no toolkit is
// needed.
#pragma once

#include <dlfcn.h>

#include <stdexcept>
#include <string>

#include "backend/cuda_abi.hpp"

namespace tem_floor {

class CudaDriver {
 public:
  explicit CudaDriver(int ordinal) {
    library_ = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) throw std::runtime_error(std::string("no CUDA driver: ") + dlerror());
    load(&init_, "cuInit");
    load(&device_get_, "cuDeviceGet");
    load(&retain_, "cuDevicePrimaryCtxRetain");
    load(&drop_, "cuDevicePrimaryCtxRelease_v2");
    load(&set_current_, "cuCtxSetCurrent");
    load(&reserve_, "cuMemAddressReserve");
    load(&unreserve_, "cuMemAddressFree");
    load(&create_, "cuMemCreate");
    load(&release_, "cuMemRelease");
    load(&map_, "cuMemMap");
    load(&allow_, "cuMemSetAccess");
    load(&unmap_, "cuMemUnmap");

    check("cuInit", init_(0));
    check("cuDeviceGet", device_get_(&device_, ordinal));
    tem::cuda::Context context = nullptr;
    check("cuDevicePrimaryCtxRetain", retain_(&context, device_));
    check("cuCtxSetCurrent", set_current_(context));

    property_.type = tem::cuda::kAllocationPinned;
    property_.requested_handle_types = tem::cuda::kHandleTypePosixFd;
    property_.location = {tem::cuda::kLocationDevice, device_};
    access_.location = property_.location;
    access_.flags = tem::cuda::kAccessReadWrite;
  }

  // libcuda stays open: it does not survive being unloaded.
  ~CudaDriver() { drop_(device_); }

  CudaDriver(const CudaDriver&) = delete;
  CudaDriver& operator=(const CudaDriver&) = delete;

  uintptr_t reserve(size_t bytes) {
    tem::cuda::DevicePtr base = 0;
    // Aligned as the arena's ranges are: the driver's own placement is 2 MiB, and larger pages want more.
    check("cuMemAddressReserve", reserve_(&base, bytes, kAlignment, 0, 0));
    return base;
  }
  void unreserve(uintptr_t base, size_t bytes) { check("cuMemAddressFree", unreserve_(base, bytes)); }

  uint64_t create(size_t bytes) {
    tem::cuda::AllocationHandle handle = 0;
    check("cuMemCreate", create_(&handle, bytes, &property_, 0));
    return handle;
  }
  void release(uint64_t handle, size_t) { check("cuMemRelease", release_(handle)); }
  void map(uintptr_t at, size_t bytes, uint64_t handle) { check("cuMemMap", map_(at, bytes, 0, handle, 0)); }
  void allow(uintptr_t at, size_t bytes) { check("cuMemSetAccess", allow_(at, bytes, &access_, 1)); }
  void unmap(uintptr_t at, size_t bytes) { check("cuMemUnmap", unmap_(at, bytes)); }

 private:
  using Result = tem::cuda::Result;
  using DevicePtr = tem::cuda::DevicePtr;
  using Handle = tem::cuda::AllocationHandle;
  static constexpr size_t kAlignment = size_t{64} << 20;

  template <class Function>
  void load(Function* slot, const char* name) {
    *slot = reinterpret_cast<Function>(dlsym(library_, name));
    if (*slot == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
  }

  static void check(const char* call, Result result) {
    if (result != tem::cuda::kSuccess) {
      throw std::runtime_error(std::string(call) + " failed with CUresult " + std::to_string(result));
    }
  }

  void* library_ = nullptr;
  tem::cuda::Device device_ = 0;
  tem::cuda::AllocationProp property_{};
  tem::cuda::AccessDesc access_{};

  Result (*init_)(unsigned) = nullptr;
  Result (*device_get_)(tem::cuda::Device*, int) = nullptr;
  Result (*retain_)(tem::cuda::Context*, tem::cuda::Device) = nullptr;
  Result (*drop_)(tem::cuda::Device) = nullptr;
  Result (*set_current_)(tem::cuda::Context) = nullptr;
  Result (*reserve_)(DevicePtr*, size_t, size_t, DevicePtr, unsigned long long) = nullptr;
  Result (*unreserve_)(DevicePtr, size_t) = nullptr;
  Result (*create_)(Handle*, size_t, const tem::cuda::AllocationProp*, unsigned long long) = nullptr;
  Result (*release_)(Handle) = nullptr;
  Result (*map_)(DevicePtr, size_t, size_t, Handle, unsigned long long) = nullptr;
  Result (*allow_)(DevicePtr, size_t, const tem::cuda::AccessDesc*, size_t) = nullptr;
  Result (*unmap_)(DevicePtr, size_t) = nullptr;
};

}  // namespace tem_floor
