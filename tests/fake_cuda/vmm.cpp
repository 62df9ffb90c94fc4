// Virtual memory management: a thin skin over MemfdSpace, which holds the rules.
#include <algorithm>

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
  if (prop->requested_handle_types == kHandleTypePosixFd) call->exportable.insert(created);
  return kSuccess;
}

FAKE_EXPORT Result cuMemRelease(AllocationHandle handle) {
  FAKE_ENTER(cuMemRelease, kYes);
  const Result code = call->space.release(handle).code;
  if (code == kSuccess) call->exportable.erase(handle);
  return code;
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
    const int flags = access[i].flags;
    if (flags != kAccessReadWrite && flags != kAccessRead && flags != kAccessNone) return kInvalidValue;
    if (flags == kAccessRead && environment("FAKE_CUDA_NO_READ_ONLY", 0) != 0) return kNotSupported;
  }
  // All devices of the fake reach a page through the one mapping, so the widest access counts.
  int widest = kAccessNone;
  for (size_t i = 0; i < count; ++i) widest = std::max(widest, access[i].flags);
  const auto level = widest == kAccessNone   ? tem::Access::kNone
                     : widest == kAccessRead ? tem::Access::kRead
                                             : tem::Access::kReadWrite;
  if (const auto bad = call->space.allow(at, bytes, level)) return bad.code;
  for (DevicePtr page = at; page < at + bytes; page += kGranularity) {
    for (size_t i = 0; i < count; ++i) {
      const auto grant = std::make_pair(page, access[i].location.id);
      if (access[i].flags == kAccessNone) {
        call->access.erase(grant);
      } else {
        call->access[grant] = access[i].flags;
      }
    }
  }
  return kSuccess;
}

FAKE_EXPORT Result cuMemGetAccess(unsigned long long* flags, const MemLocation* location, DevicePtr at) {
  FAKE_ENTER(cuMemGetAccess, kNo);
  if (flags == nullptr || location == nullptr || location->type != kLocationDevice) return kInvalidValue;
  if (find_device(location->id) == nullptr) return kInvalidDevice;
  const DevicePtr page = at / kGranularity * kGranularity;
  const auto found = call->access.find({page, location->id});
  *flags = static_cast<unsigned long long>(found == call->access.end() ? kAccessNone : found->second);
  return kSuccess;
}

FAKE_EXPORT Result cuMemUnmap(DevicePtr at, size_t bytes) {
  FAKE_ENTER(cuMemUnmap, kYes);
  if (const auto bad = call->space.unmap(at, bytes)) return bad.code;
  call->access.erase(call->access.lower_bound({at, 0}), call->access.lower_bound({at + bytes, 0}));
  return kSuccess;
}

FAKE_EXPORT Result cuMemExportToShareableHandle(void* out, AllocationHandle handle, int type,
                                                unsigned long long flags) {
  FAKE_ENTER(cuMemExportToShareableHandle, kYes);
  if (out == nullptr || type != kHandleTypePosixFd || flags != 0) return kInvalidValue;
  if (call->exportable.count(handle) == 0) return kInvalidValue;
  tem::Fd fd;
  if (const auto bad = call->space.export_fd(handle, tem::Access::kReadWrite, &fd)) return bad.code;
  *static_cast<int*>(out) = fd.release();
  return kSuccess;
}

FAKE_EXPORT Result cuMemImportFromShareableHandle(AllocationHandle* handle, void* from, int type) {
  FAKE_ENTER(cuMemImportFromShareableHandle, kYes);
  if (handle == nullptr || type != kHandleTypePosixFd) return kInvalidValue;
  tem::Fd fd(static_cast<int>(number_of(from)));
  tem::Handle imported = 0;
  const Result code = call->space.import_fd(fd, &imported).code;
  fd.release();  // it stays the caller's
  if (code != kSuccess) return code;
  *handle = imported;
  call->exportable.insert(imported);
  return kSuccess;
}
