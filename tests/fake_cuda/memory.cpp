// What reads and writes device memory. As the driver does, all of it refuses memory that is not accessible.
#include <cstring>

#include "fake.hpp"

using namespace fake;  // NOLINT

namespace {

void fill(const Fill& what) {
  if (what.width == 1) {
    std::memset(reinterpret_cast<void*>(what.at), static_cast<int>(what.value), what.count);
    return;
  }
  auto* words = reinterpret_cast<uint32_t*>(what.at);
  for (size_t i = 0; i < what.count; ++i) words[i] = what.value;
}

Result memset_async(State& all, const Fill& what, StreamPtr stream) {
  if (is_default(stream) && current_device() == nullptr) return kInvalidContext;
  StreamState* queue = find_stream(stream);
  if (!is_default(stream) && queue == nullptr) return kInvalidHandle;
  size_t bytes = 0;
  if (what.at % what.width != 0 || __builtin_mul_overflow(what.count, what.width, &bytes))
    return kInvalidValue;
  if (const auto bad = all.space.check_access(what.at, bytes)) return bad.code;
  if (queue == nullptr || queue->order->completed.load() >= queue->order->submitted.load()) {
    fill(what);
  } else {
    queue->order->submit();
    queue->fills.push_back(what);
  }
  return kSuccess;
}

}  // namespace

void fake::run_pending(State& all, StreamState& stream) {
  for (const Fill& what : stream.fills) {
    if (all.space.check_access(what.at, what.count * what.width)) {
      all.sticky = kIllegalAddress;
    } else {
      fill(what);
    }
  }
  stream.fills.clear();
  stream.order->complete();
}

FAKE_EXPORT Result cuMemGetInfo_v2(size_t* free, size_t* total) {
  FAKE_ENTER(cuMemGetInfo, kYes);
  const FakeDevice* current = current_device();
  if (current == nullptr) return kInvalidContext;
  if (free == nullptr || total == nullptr) return kInvalidValue;
  *free = call->space.free_bytes(current->budget);
  *total = current->budget.capacity;
  return kSuccess;
}

FAKE_EXPORT Result cuMemsetD8Async(DevicePtr at, unsigned char value, size_t count, StreamPtr stream) {
  FAKE_ENTER(cuMemsetD8Async, kYes);
  return memset_async(*call, Fill{at, count, 1, value}, stream);
}

FAKE_EXPORT Result cuMemsetD32Async(DevicePtr at, unsigned value, size_t count, StreamPtr stream) {
  FAKE_ENTER(cuMemsetD32Async, kYes);
  return memset_async(*call, Fill{at, count, 4, value}, stream);
}

FAKE_EXPORT Result cuMemsetD8_v2(DevicePtr at, unsigned char value, size_t count) {
  FAKE_ENTER(cuMemsetD8, kYes);
  return memset_async(*call, Fill{at, count, 1, value}, nullptr);
}

FAKE_EXPORT Result cuMemsetD32_v2(DevicePtr at, unsigned value, size_t count) {
  FAKE_ENTER(cuMemsetD32, kYes);
  return memset_async(*call, Fill{at, count, 4, value}, nullptr);
}

FAKE_EXPORT Result cuMemcpyDtoH_v2(void* to, DevicePtr from, size_t bytes) {
  FAKE_ENTER(cuMemcpyDtoH, kNo);
  if (current_device() == nullptr) return kInvalidContext;
  if (to == nullptr) return kInvalidValue;
  if (const auto bad = call->space.check_access(from, bytes, tem::Access::kRead)) return bad.code;
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return kSuccess;
}

FAKE_EXPORT Result cuMemcpyHtoD_v2(DevicePtr to, const void* from, size_t bytes) {
  FAKE_ENTER(cuMemcpyHtoD, kNo);
  if (current_device() == nullptr) return kInvalidContext;
  if (from == nullptr) return kInvalidValue;
  if (const auto bad = call->space.check_access(to, bytes)) return bad.code;
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return kSuccess;
}

FAKE_EXPORT Result cuMemcpyDtoH(void* to, DevicePtr from, size_t bytes) {
  return cuMemcpyDtoH_v2(to, from, bytes);
}
FAKE_EXPORT Result cuMemcpyHtoD(DevicePtr to, const void* from, size_t bytes) {
  return cuMemcpyHtoD_v2(to, from, bytes);
}
