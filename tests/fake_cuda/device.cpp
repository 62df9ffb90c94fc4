// Starting up, devices, primary contexts and the stack of contexts that each thread has.
#include <cstring>
#include <string>

#include "fake.hpp"

using namespace fake;  // NOLINT

namespace {

constexpr int kAttributeComputeMajor = 75;
constexpr int kAttributeComputeMinor = 76;
constexpr int kAttributeMultiprocessors = 16;
constexpr int kAttributeUnifiedAddressing = 41;
constexpr int kLastAttribute = 150;

}  // namespace

FAKE_EXPORT Result cuDriverGetVersion(int* version) {
  if (version == nullptr) return kInvalidValue;
  *version = static_cast<int>(environment("FAKE_CUDA_VERSION", 13000));
  return kSuccess;
}

FAKE_EXPORT Result cuInit(unsigned flags) {
  State& all = state();
  const std::lock_guard<std::mutex> lock(all.mutex);
  if (flags != 0) return kInvalidValue;
  if (all.shut_down) return kDeinitialized;
  if (all.initialized) return kSuccess;
  const size_t count = environment("FAKE_CUDA_DEVICES", 2);
  if (count == 0) return kNoDevice;
  for (size_t i = 0; i < count; ++i) {
    FakeDevice& device = all.devices.emplace_back();
    device.ordinal = static_cast<int>(i);
    device.budget.capacity = environment("FAKE_CUDA_MEMORY", size_t{1} << 30);
    std::memcpy(device.uuid.bytes, "fake cuda device", sizeof device.uuid.bytes);
    device.uuid.bytes[15] = static_cast<unsigned char>(i);
  }
  all.initialized = true;
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetCount(int* count) {
  FAKE_ENTER(cuDeviceGetCount, kNo);
  if (count == nullptr) return kInvalidValue;
  *count = static_cast<int>(call->devices.size());
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGet(int* device, int ordinal) {
  FAKE_ENTER(cuDeviceGet, kNo);
  if (device == nullptr) return kInvalidValue;
  if (find_device(ordinal) == nullptr) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetName(char* name, int length, int device) {
  FAKE_ENTER(cuDeviceGetName, kNo);
  if (name == nullptr || length <= 0) return kInvalidValue;
  if (find_device(device) == nullptr) return kInvalidDevice;
  const std::string text = "Fake CUDA Device " + std::to_string(device);
  name[text.copy(name, static_cast<size_t>(length) - 1)] = '\0';
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetUuid_v2(Uuid* uuid, int device) {
  FAKE_ENTER(cuDeviceGetUuid, kNo);
  const FakeDevice* found = find_device(device);
  if (uuid == nullptr) return kInvalidValue;
  if (found == nullptr) return kInvalidDevice;
  *uuid = found->uuid;
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetUuid(Uuid* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

FAKE_EXPORT Result cuDeviceTotalMem_v2(size_t* bytes, int device) {
  FAKE_ENTER(cuDeviceTotalMem, kNo);
  const FakeDevice* found = find_device(device);
  if (bytes == nullptr) return kInvalidValue;
  if (found == nullptr) return kInvalidDevice;
  *bytes = found->budget.capacity;
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  FAKE_ENTER(cuDeviceGetAttribute, kNo);
  if (value == nullptr || attribute <= 0 || attribute > kLastAttribute) return kInvalidValue;
  if (find_device(device) == nullptr) return kInvalidDevice;
  switch (attribute) {
    case kAttributeVmmSupported:
      *value = environment("FAKE_CUDA_NO_VMM", 0) == 0 ? 1 : 0;
      break;
    case kAttributePosixFdSupported:
    case kAttributeUnifiedAddressing:
    case kAttributeMultiprocessors:
      *value = 1;
      break;
    case kAttributeComputeMajor:
      *value = 9;
      break;
    case kAttributeComputeMinor:
    default:
      *value = 0;
  }
  return kSuccess;
}

FAKE_EXPORT Result cuDeviceCanAccessPeer(int* can, int device, int peer) {
  FAKE_ENTER(cuDeviceCanAccessPeer, kNo);
  if (can == nullptr) return kInvalidValue;
  if (find_device(device) == nullptr || find_device(peer) == nullptr) return kInvalidDevice;
  *can = device != peer && environment("FAKE_CUDA_NO_PEERS", 0) == 0 ? 1 : 0;
  return kSuccess;
}

FAKE_EXPORT Result cuDevicePrimaryCtxRetain(Context* context, int device) {
  FAKE_ENTER(cuDevicePrimaryCtxRetain, kNo);
  FakeDevice* found = find_device(device);
  if (context == nullptr) return kInvalidValue;
  if (found == nullptr) return kInvalidDevice;
  ++found->primary_references;
  *context = context_of(*found);
  return kSuccess;
}

FAKE_EXPORT Result cuDevicePrimaryCtxRelease_v2(int device) {
  FAKE_ENTER(cuDevicePrimaryCtxRelease, kNo);
  FakeDevice* found = find_device(device);
  if (found == nullptr) return kInvalidDevice;
  if (found->primary_references == 0) return kInvalidContext;
  --found->primary_references;
  return kSuccess;
}

FAKE_EXPORT Result cuCtxGetCurrent(Context* context) {
  FAKE_ENTER(cuCtxGetCurrent, kNo);
  if (context == nullptr) return kInvalidValue;
  *context = context_stack().empty() ? nullptr : context_stack().back();
  return kSuccess;
}

FAKE_EXPORT Result cuCtxSetCurrent(Context context) {
  FAKE_ENTER(cuCtxSetCurrent, kNo);
  auto& stack = context_stack();
  if (context != nullptr && device_in(context) == nullptr) return kInvalidContext;
  if (!stack.empty()) stack.pop_back();
  if (context != nullptr) stack.push_back(context);
  return kSuccess;
}

FAKE_EXPORT Result cuCtxPushCurrent_v2(Context context) {
  FAKE_ENTER(cuCtxPushCurrent, kNo);
  if (context == nullptr) return kInvalidValue;
  if (device_in(context) == nullptr) return kInvalidContext;
  context_stack().push_back(context);
  return kSuccess;
}

FAKE_EXPORT Result cuCtxPopCurrent_v2(Context* context) {
  FAKE_ENTER(cuCtxPopCurrent, kNo);
  auto& stack = context_stack();
  if (stack.empty()) return kInvalidContext;
  if (context != nullptr) *context = stack.back();
  stack.pop_back();
  return kSuccess;
}

FAKE_EXPORT Result cuCtxGetDevice(int* device) {
  FAKE_ENTER(cuCtxGetDevice, kNo);
  const FakeDevice* current = current_device();
  if (device == nullptr) return kInvalidValue;
  if (current == nullptr) return kInvalidContext;
  *device = current->ordinal;
  return kSuccess;
}

FAKE_EXPORT Result cuCtxSynchronize() {
  FAKE_ENTER(cuCtxSynchronize, kNo);
  if (current_device() == nullptr) return kInvalidContext;
  if (const Result bad = forbid_in_capture(*call); bad != kSuccess) return bad;
  call->streams.for_each([&](uint64_t, StreamState& stream) { run_pending(*call, stream); });
  return call->sticky;
}
