// Names of errors, and finding entry points by name.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "fake.hpp"

using namespace fake;  // NOLINT

namespace {

struct ErrorText {
  Result code;
  const char* name;
  const char* text;
};

constexpr ErrorText kErrors[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kDeinitialized, "CUDA_ERROR_DEINITIALIZED", "driver shutting down"},
    {kNoDevice, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kOperatingSystem, "CUDA_ERROR_OPERATING_SYSTEM", "OS call failed or operation not supported on this OS"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {kCaptureUnsupported, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
     "operation not permitted when stream is capturing"},
    {kCaptureInvalidated, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "operation failed due to a previous error during capture"},
    {kCapturedEvent, "CUDA_ERROR_CAPTURED_EVENT",
     "operation not permitted on an event last recorded in a capturing stream"},
};

const ErrorText* find_error(Result code) {
  const auto* found = std::find_if(std::begin(kErrors), std::end(kErrors),
                                   [code](const ErrorText& error) { return error.code == code; });
  return found == std::end(kErrors) ? nullptr : found;
}

/// This library, wherever it was loaded from.
void* self() {
  static void* const handle = [] {
    Dl_info info{};
    return dladdr(reinterpret_cast<const void*>(&find_error), &info) == 0
               ? nullptr
               : dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  return handle;
}

}  // namespace

FAKE_EXPORT Result cuGetErrorName(Result code, const char** name) {
  if (name == nullptr) return kInvalidValue;
  const ErrorText* found = find_error(code);
  *name = found == nullptr ? nullptr : found->name;
  return found == nullptr ? kInvalidValue : kSuccess;
}

FAKE_EXPORT Result cuGetErrorString(Result code, const char** text) {
  if (text == nullptr) return kInvalidValue;
  const ErrorText* found = find_error(code);
  *text = found == nullptr ? nullptr : found->text;
  return found == nullptr ? kInvalidValue : kSuccess;
}

// As the driver: the newest variant of a plain name, and success with a null pointer for an unknown one.
FAKE_EXPORT Result cuGetProcAddress_v2(const char* name, void** function, int, uint64_t, int* status) {
  if (name == nullptr || function == nullptr) return kInvalidValue;
  void* found = nullptr;
  if (std::strncmp(name, "cu", 2) == 0 && self() != nullptr) {
    found = dlsym(self(), (std::string(name) + "_v2").c_str());
    if (found == nullptr) found = dlsym(self(), name);
  }
  *function = found;
  if (status != nullptr) *status = found == nullptr ? 1 : 0;
  return kSuccess;
}

FAKE_EXPORT Result cuGetProcAddress(const char* name, void** function, int version, uint64_t flags) {
  const Result code = cuGetProcAddress_v2(name, function, version, flags, nullptr);
  return code == kSuccess && *function == nullptr ? kNotFound : code;
}
