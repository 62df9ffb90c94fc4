// The part of the CUDA driver's C ABI that this project calls, so that it builds where no toolkit is.
//
// Values and layouts are those of cuda.h since CUDA 11.2; the driver keeps them stable across versions.
// Enumerations of the C header are four bytes wide and are plain ints here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tem::cuda {

using Result = int;
using Device = int;
using DevicePtr = unsigned long long;
using AllocationHandle = unsigned long long;
using Context = struct ContextOpaque*;
using StreamPtr = struct StreamOpaque*;
using Event = struct EventOpaque*;

constexpr Result kSuccess = 0;
constexpr Result kInvalidValue = 1;
constexpr Result kOutOfMemory = 2;
constexpr Result kNotInitialized = 3;
constexpr Result kDeinitialized = 4;
constexpr Result kNoDevice = 100;
constexpr Result kInvalidDevice = 101;
constexpr Result kInvalidContext = 201;
constexpr Result kOperatingSystem = 304;
constexpr Result kInvalidHandle = 400;
constexpr Result kNotFound = 500;
constexpr Result kNotReady = 600;
constexpr Result kIllegalAddress = 700;
constexpr Result kNotSupported = 801;
constexpr Result kCaptureUnsupported = 900;
constexpr Result kCaptureInvalidated = 901;
constexpr Result kCapturedEvent = 907;

struct Uuid {
  unsigned char bytes[16];
};

constexpr int kLocationDevice = 1;
struct MemLocation {
  int type;
  int id;
};

constexpr int kAllocationPinned = 1;
constexpr int kHandleTypeNone = 0;
constexpr int kHandleTypePosixFd = 1;
struct AllocationProp {
  int type;
  int requested_handle_types;
  MemLocation location;
  void* win32_metadata;
  unsigned char compression_type;
  unsigned char gpu_direct_rdma_capable;
  unsigned short usage;
  unsigned char reserved[4];
};

constexpr int kAccessNone = 0;
constexpr int kAccessRead = 1;
constexpr int kAccessReadWrite = 3;
struct AccessDesc {
  MemLocation location;
  int flags;
};

constexpr int kGranularityMinimum = 0;
constexpr int kAttributeVmmSupported = 102;
constexpr int kAttributePosixFdSupported = 103;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kStreamNonBlocking = 1;

constexpr int kCaptureModeGlobal = 0;
constexpr int kCaptureModeRelaxed = 2;
constexpr int kCaptureNone = 0;
constexpr int kCaptureActive = 1;
constexpr int kCaptureStatusInvalidated = 2;

constexpr uint64_t kProcAddressDefault = 0;

}  // namespace tem::cuda
