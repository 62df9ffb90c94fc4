// Virtual memory management: a thin skin over MemfdSpace, which holds the rules.
#include "fake.hpp"

using namespace fake;  // NOLINT

namespace {

/// kSuccess when a handle can be created from these properties.
Result check_properties(const AllocationProp* prop) {
  if (prop == nullptr || prop->type != kAllocationPinned) return kInvalidValue;
  if (prop->location.type != kLocationDevice) return kInvalidValue;
  return find_device(prop->location.id) == nullptr ? kInvalidDevice : kSuccess;
}

}  // namespace

FAKE_EXPORT Result cuMemGetAllocationGranularity(size_t* granularity, const AllocationProp* prop,
                                                 int option) {
  FAKE_ENTER(cuMemGetAllocationGranularity, kYes);
  if (granularity == nullptr || option < 0 || option > 1) return kInvalidValue;
  if (const Result bad = check_properties(prop); bad != kSuccess) return bad;
  *granularity = kGranularity;
  return kSuccess;
}

FAKE_EXPORT Result cuMemAddressReserve(DevicePtr* base, size_t bytes, size_t alignment, DevicePtr,
                                       unsigned long long flags) {
  FAKE_ENTER(cuMemAddressReserve, kYes);
  if (base == nullptr || flags != 0) return kInvalidValue;
  tem::Address reserved = 0;
  if (const auto bad = call->space.reserve(bytes, alignment, &reserved)) return bad.code;
  *base = reserved;
  return kSuccess;
}

FAKE_EXPORT Result cuMemAddressFree(DevicePtr base, size_t bytes) {
  FAKE_ENTER(cuMemAddressFree, kYes);
  return call->space.unreserve(base, bytes).code;
}

FAKE_EXPORT Result cuMemCreate(AllocationHandle* handle, size_t bytes, const AllocationProp* prop,
                               unsigned long long flags) {
  FAKE_ENTER(cuMemCreate, kYes);
  if (handle == nullptr || flags != 0) return kInvalidValue;
  if (const Result bad = check_properties(prop); bad != kSuccess) return bad;
  tem::Handle created = 0;
  const auto bad = call->space.create(bytes, &find_device(prop->location.id)->budget, &created);
  if (bad) return bad.code;
  *handle = created;
  return kSuccess;
}

FAKE_EXPORT Result cuMemRelease(AllocationHandle handle) {
  FAKE_ENTER(cuMemRelease, kYes);
  return call->space.release(handle).code;
}

FAKE_EXPORT Result cuMemMap(DevicePtr at, size_t bytes, size_t offset, AllocationHandle handle,
                            unsigned long long flags) {
  FAKE_ENTER(cuMemMap, kYes);
  if (flags != 0) return kInvalidValue;
  return call->space.map(at, bytes, offset, handle).code;
}

FAKE_EXPORT Result cuMemSetAccess(DevicePtr at, size_t bytes, const AccessDesc* access, size_t count) {
  FAKE_ENTER(cuMemSetAccess, kYes);
  if (access == nullptr || count == 0) return kInvalidValue;
  for (size_t i = 0; i < count; ++i) {
    if (access[i].location.type != kLocationDevice) return kInvalidValue;
    if (find_device(access[i].location.id) == nullptr) return kInvalidValue;
    if (access[i].flags == kAccessRead) return kNotSupported;  // by the fake: its pages are open or shut
    if (access[i].flags != kAccessReadWrite && access[i].flags != kAccessNone) return kInvalidValue;
  }
  bool open = false;
  for (size_t i = 0; i < count; ++i) open = open || access[i].flags == kAccessReadWrite;
  return call->space.allow(at, bytes, open).code;
}

FAKE_EXPORT Result cuMemUnmap(DevicePtr at, size_t bytes) {
  FAKE_ENTER(cuMemUnmap, kYes);
  return call->space.unmap(at, bytes).code;
}

// Its memory is pages of one file, which cannot be handed out by the piece.
FAKE_EXPORT Result cuMemExportToShareableHandle(void*, AllocationHandle, int, unsigned long long) {
  FAKE_ENTER(cuMemExportToShareableHandle, kYes);
  return kNotSupported;
}

FAKE_EXPORT Result cuMemImportFromShareableHandle(AllocationHandle*, void*, int) {
  FAKE_ENTER(cuMemImportFromShareableHandle, kYes);
  return kNotSupported;
}
