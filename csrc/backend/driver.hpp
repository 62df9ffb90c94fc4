// The CUDA driver as a table of entry points, found at run time: nothing here links against it.
//
// Facts:
//  - cuGetProcAddress answers a plain name with the newest variant that the asked version knows, so that
//    "cuMemGetInfo" at 12.0 is the 64-bit cuMemGetInfo_v2. Plain dlsym would give the 32-bit one.
//  - Version and entry points may be asked before cuInit.
//  - The library stays loaded for good: its own threads and exit handlers outlive any handle to it.
#pragma once

#include <string>

#include "backend/cuda_abi.hpp"

// X(name, argument types...)
#define TEM_CUDA_ENTRY_POINTS(X)                                                       \
  X(cuInit, unsigned)                                                                  \
  X(cuGetErrorName, Result, const char**)                                              \
  X(cuGetErrorString, Result, const char**)                                            \
  X(cuDeviceGetCount, int*)                                                            \
  X(cuDeviceGet, Device*, int)                                                         \
  X(cuDeviceGetName, char*, int, Device)                                               \
  X(cuDeviceGetUuid, Uuid*, Device)                                                    \
  X(cuDeviceGetAttribute, int*, int, Device)                                           \
  X(cuDeviceCanAccessPeer, int*, Device, Device)                                       \
  X(cuDevicePrimaryCtxRetain, Context*, Device)                                        \
  X(cuDevicePrimaryCtxRelease, Device)                                                 \
  X(cuCtxGetCurrent, Context*)                                                         \
  X(cuCtxPushCurrent, Context)                                                         \
  X(cuCtxPopCurrent, Context*)                                                         \
  X(cuThreadExchangeStreamCaptureMode, int*)                                           \
  X(cuStreamIsCapturing, StreamPtr, int*)                                              \
  X(cuStreamCreate, StreamPtr*, unsigned)                                              \
  X(cuStreamSynchronize, StreamPtr)                                                    \
  X(cuStreamDestroy, StreamPtr)                                                        \
  X(cuMemGetInfo, size_t*, size_t*)                                                    \
  X(cuMemGetAllocationGranularity, size_t*, const AllocationProp*, int)                \
  X(cuMemAddressReserve, DevicePtr*, size_t, size_t, DevicePtr, unsigned long long)    \
  X(cuMemAddressFree, DevicePtr, size_t)                                               \
  X(cuMemCreate, AllocationHandle*, size_t, const AllocationProp*, unsigned long long) \
  X(cuMemRelease, AllocationHandle)                                                    \
  X(cuMemExportToShareableHandle, void*, AllocationHandle, int, unsigned long long)    \
  X(cuMemImportFromShareableHandle, AllocationHandle*, void*, int)                     \
  X(cuMemMap, DevicePtr, size_t, size_t, AllocationHandle, unsigned long long)         \
  X(cuMemSetAccess, DevicePtr, size_t, const AccessDesc*, size_t)                      \
  X(cuMemUnmap, DevicePtr, size_t)                                                     \
  X(cuMemsetD8Async, DevicePtr, unsigned char, size_t, StreamPtr)                      \
  X(cuMemsetD32Async, DevicePtr, unsigned, size_t, StreamPtr)                          \
  X(cuEventCreate, Event*, unsigned)                                                   \
  X(cuEventRecord, Event, StreamPtr)                                                   \
  X(cuEventQuery, Event)                                                               \
  X(cuEventDestroy, Event)                                                             \
  X(cuCtxSynchronize, )

// The same, of functions that came later, with the version that has them.
#define TEM_CUDA_LATER_ENTRY_POINTS(X) X(cuCtxRecordEvent, 12050, Context, Event)

namespace tem::cuda {

struct Driver {
#define TEM_DECLARE(name, ...) Result (*name)(__VA_ARGS__) = nullptr;
  TEM_CUDA_ENTRY_POINTS(TEM_DECLARE)
#undef TEM_DECLARE
#define TEM_DECLARE_LATER(name, version, ...) \
  Result (*name)(__VA_ARGS__) = nullptr; /* null in an older driver */
  TEM_CUDA_LATER_ENTRY_POINTS(TEM_DECLARE_LATER)
#undef TEM_DECLARE_LATER

  /// "CUDA_ERROR_INVALID_VALUE (1): invalid argument".
  std::string describe(Result code) const;
};

/// Lets this thread call what could block while another, or it itself, captures a graph.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) {
    driver_.cuThreadExchangeStreamCaptureMode(&mode_);
  }
  ~RelaxedCapture() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const Driver& driver_;
  int mode_ = kCaptureModeRelaxed;
};

/// Loads and initialises the driver. `library` is what dlopen is given.
/// Throws Error{kDriverMissing} for no driver, one older than 12.0 or without an entry point, and no device.
Driver load_driver(const std::string& library);

}  // namespace tem::cuda
