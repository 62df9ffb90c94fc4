// Who reserved what, what is mapped there, and whether a call may go through: the driver's rules of virtual
// memory as pure bookkeeping. It touches no memory and makes no system call.
//
// Codes and rules are what an H100 with driver 580 (CUDA 13.0) answered. It is stricter in four places where
// that driver shrugs or crashes, so that a caller that goes wrong is told: unmapping what is not mapped and a
// run with a gap (success there), a mapping that hangs over the end of its reservation (success there), and a
// stale handle (a crash there, or success while its memory is still mapped).
//
// Each check_* answers whether a call is legal; the verb of the same name then enters it. The two are apart
// so that the caller can put its system call between them and leave everything as it was when that fails.
//
// Thread-safety: none; the owner brings the lock.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "backend/backend.hpp"

namespace tem {

/// Why a call is refused, and the CUDA driver's number for that misuse. Code 0: it is not.
struct Refusal {
  int code = 0;
  std::string reason;
  explicit operator bool() const { return code != 0; }
};

/// Physical memory of one device. `used` counts what is created and not yet given back.
struct Budget {
  size_t capacity = 0;
  size_t used = 0;
};

struct Allocation {
  size_t bytes = 0;
  size_t offset = 0;         // where its bytes lie in the owner's backing store
  Budget* budget = nullptr;  // null: imported, and counted where it was created
  size_t mappings = 0;
  bool released = false;
  int file = -1;          // of an import: its pages; else they are in the owner's file
  bool exported = false;  // another process may have it
};

class AddressTable {
 public:
  explicit AddressTable(size_t granularity) : granularity_(granularity) {}

  Refusal check_reserve(size_t bytes, size_t alignment) const;
  void reserve(Address base, size_t bytes) { reservations_.emplace(base, bytes); }
  Refusal check_unreserve(Address base, size_t bytes) const;
  void unreserve(Address base) { reservations_.erase(base); }

  Refusal check_create(size_t bytes) const;
  Handle create(const Allocation& allocation);
  Refusal check_release(Handle handle) const;
  /// Marks the handle dead. Returns what must be given back now: nothing while it is mapped.
  std::vector<Allocation> release(Handle handle);

  Refusal check_map(Address at, size_t bytes, size_t offset, Handle handle) const;
  void map(Address at, size_t bytes, Handle handle);
  const Allocation& allocation(Handle handle) const { return allocations_.at(handle); }
  void set_exported(Handle handle) { allocations_.at(handle).exported = true; }

  /// Legal when [at, at + bytes) is made of whole neighbouring mappings.
  Refusal check_run(Address at, size_t bytes) const;
  /// Drops the run. Returns the released allocations whose last mapping went with it.
  std::vector<Allocation> unmap(Address at, size_t bytes);
  void set_access(Address at, size_t bytes, Access access);
  /// Calls fn(address, bytes, access) for each mapping of a legal run.
  template <class Fn>
  void for_each_mapping(Address at, size_t bytes, Fn fn) const {
    const auto last = mappings_.lower_bound(at + bytes);
    for (auto it = mappings_.lower_bound(at); it != last; ++it)
      fn(it->first, it->second.bytes, it->second.access);
  }

  /// Legal when every byte of [at, at + bytes) is mapped and may be read, or written as well.
  Refusal check_access(Address at, size_t bytes, Access needed) const;

  const std::map<Address, size_t>& reservations() const { return reservations_; }
  size_t handle_count() const;
  size_t mapping_count() const { return mappings_.size(); }

 private:
  struct Mapping {
    size_t bytes = 0;
    Handle handle = 0;
    Access access = Access::kNone;
  };
  using Mappings = std::map<Address, Mapping>;

  Refusal check_multiple(const char* what, size_t n) const;
  /// The first mapping that overlaps [at, at + bytes), or end().
  Mappings::const_iterator first_overlap(Address at, size_t bytes) const;
  /// The mapping that holds `at`, or end().
  Mappings::const_iterator holding(Address at) const;

  size_t granularity_;
  std::map<Address, size_t> reservations_;
  std::unordered_map<Handle, Allocation> allocations_;
  Mappings mappings_;
  Handle next_handle_ = 1;  // never used twice, so a stale handle is always seen
};

/// "0x7f00deadb000", for messages.
std::string hex(Address at);

}  // namespace tem
