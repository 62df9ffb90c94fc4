#include "backend/address_table.hpp"

#include <cstdio>
#include <iterator>

#include "backend/cuda_abi.hpp"
#include "core/sizes.hpp"

namespace tem {

namespace {

Refusal refuse(int code, std::string reason) { return {code, std::move(reason)}; }

bool overflows(Address at, size_t bytes) { return at + bytes < at; }

}  // namespace

std::string hex(Address at) {
  char text[2 + 16 + 1];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<size_t>(at));
  return text;
}

Refusal AddressTable::check_multiple(const char* what, size_t n) const {
  if (n % granularity_ == 0) return {};
  return refuse(cuda::kInvalidValue,
                std::string(what) + " is not a multiple of " + format_bytes(granularity_));
}

Refusal AddressTable::check_reserve(size_t bytes, size_t alignment) const {
  if (bytes == 0) return refuse(cuda::kInvalidValue, "the size is zero");
  if (alignment != 0 && !is_pow2(alignment)) {
    return refuse(cuda::kInvalidValue, "the alignment is not a power of two");
  }
  return check_multiple("the size", bytes);
}

Refusal AddressTable::check_unreserve(Address base, size_t bytes) const {
  const auto found = reservations_.find(base);
  if (found == reservations_.end()) return refuse(cuda::kInvalidValue, "no reservation starts there");
  if (found->second != bytes) {
    return refuse(cuda::kInvalidValue, "the reservation there is of " + format_bytes(found->second));
  }
  const auto inside = first_overlap(base, bytes);
  if (inside != mappings_.end()) {
    return refuse(cuda::kInvalidValue, "memory is still mapped in it, at " + hex(inside->first));
  }
  return {};
}

Refusal AddressTable::check_create(size_t bytes) const {
  if (bytes == 0) return refuse(cuda::kInvalidValue, "the size is zero");
  return check_multiple("the size", bytes);
}

Handle AddressTable::create(const Allocation& allocation) {
  allocations_.emplace(next_handle_, allocation);
  return next_handle_++;
}

Refusal AddressTable::check_release(Handle handle) const {
  const auto found = allocations_.find(handle);
  if (found == allocations_.end() || found->second.released) {
    return refuse(cuda::kInvalidValue, "no such handle, or released before");
  }
  return {};
}

std::vector<Allocation> AddressTable::release(Handle handle) {
  std::vector<Allocation> freed;
  freed.reserve(1);
  const auto found = allocations_.find(handle);
  found->second.released = true;
  if (found->second.mappings == 0) {
    freed.push_back(found->second);
    allocations_.erase(found);
  }
  return freed;
}

Refusal AddressTable::check_map(Address at, size_t bytes, size_t offset, Handle handle) const {
  if (bytes == 0) return refuse(cuda::kInvalidValue, "the size is zero");
  if (auto bad = check_multiple("the address", at)) return bad;
  if (auto bad = check_release(handle)) return bad;
  const size_t whole = allocations_.at(handle).bytes;
  if (offset != 0 || bytes != whole) {
    return refuse(cuda::kNotSupported, "the handle is of " + format_bytes(whole) + ", and is mapped whole");
  }
  const auto after = reservations_.upper_bound(at);
  const auto home = after == reservations_.begin() ? reservations_.end() : std::prev(after);
  if (home == reservations_.end() || overflows(at, bytes) || at + bytes > home->first + home->second) {
    return refuse(cuda::kInvalidValue, "the range does not lie in one reservation");
  }
  const auto inside = first_overlap(at, bytes);
  if (inside != mappings_.end()) {
    return refuse(cuda::kInvalidValue, "memory is already mapped at " + hex(inside->first));
  }
  return {};
}

void AddressTable::map(Address at, size_t bytes, Handle handle) {
  mappings_.emplace(at, Mapping{bytes, handle, Access::kNone});
  ++allocations_.at(handle).mappings;
}

Refusal AddressTable::check_run(Address at, size_t bytes) const {
  if (bytes == 0) return refuse(cuda::kInvalidValue, "the size is zero");
  if (overflows(at, bytes)) return refuse(cuda::kInvalidValue, "the range wraps around");
  const Address end = at + bytes;
  Address next = at;
  for (auto it = mappings_.lower_bound(at); next < end; ++it) {
    if (it == mappings_.end() || it->first != next) {
      const auto holder = holding(next);
      if (holder == mappings_.end()) return refuse(cuda::kInvalidValue, "nothing is mapped at " + hex(next));
      return refuse(cuda::kInvalidValue, "it starts inside the mapping at " + hex(holder->first));
    }
    next += it->second.bytes;
  }
  if (next != end) {
    return refuse(cuda::kInvalidValue, "it ends inside the mapping at " + hex(holding(end)->first));
  }
  return {};
}

std::vector<Allocation> AddressTable::unmap(Address at, size_t bytes) {
  const auto first = mappings_.lower_bound(at);
  const auto last = mappings_.lower_bound(at + bytes);
  std::vector<Allocation> freed;
  freed.reserve(static_cast<size_t>(std::distance(first, last)));
  for (auto it = first; it != last; ++it) {
    const auto found = allocations_.find(it->second.handle);
    if (--found->second.mappings != 0 || !found->second.released) continue;
    freed.push_back(found->second);
    allocations_.erase(found);
  }
  mappings_.erase(first, last);
  return freed;
}

void AddressTable::set_access(Address at, size_t bytes, Access access) {
  const auto last = mappings_.lower_bound(at + bytes);
  for (auto it = mappings_.lower_bound(at); it != last; ++it) it->second.access = access;
}

Refusal AddressTable::check_access(Address at, size_t bytes, Access needed) const {
  if (overflows(at, bytes)) return refuse(cuda::kInvalidValue, "the range wraps around");
  for (Address next = at; next < at + bytes;) {
    const auto holder = holding(next);
    if (holder == mappings_.end()) return refuse(cuda::kInvalidValue, "nothing is mapped at " + hex(next));
    if (holder->second.access == Access::kNone) {
      return refuse(cuda::kInvalidValue, "access was never allowed at " + hex(next));
    }
    if (holder->second.access < needed) {
      return refuse(cuda::kInvalidValue, "the memory is read-only at " + hex(next));
    }
    next = holder->first + holder->second.bytes;
  }
  return {};
}

size_t AddressTable::handle_count() const {
  size_t live = 0;
  for (const auto& entry : allocations_) live += entry.second.released ? 0 : 1;
  return live;
}

AddressTable::Mappings::const_iterator AddressTable::first_overlap(Address at, size_t bytes) const {
  const auto holder = holding(at);
  if (holder != mappings_.end()) return holder;
  const auto after = mappings_.lower_bound(at);
  return after != mappings_.end() && after->first < at + bytes ? after : mappings_.end();
}

AddressTable::Mappings::const_iterator AddressTable::holding(Address at) const {
  const auto after = mappings_.upper_bound(at);
  if (after == mappings_.begin()) return mappings_.end();
  const auto before = std::prev(after);
  return at < before->first + before->second.bytes ? before : mappings_.end();
}

}  // namespace tem
