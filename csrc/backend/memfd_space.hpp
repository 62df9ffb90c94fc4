// Elastic memory out of Linux alone: physical memory is pages of one memfd, a mapping is MAP_FIXED over
// reserved addresses. The host backend stands on it, and so does the fake driver of the tests: both refuse
// what AddressTable refuses.
//
// Facts it rests on:
//  - One file for all allocations, at offsets that are never used twice. A file each would run into the
//    limit on open files (1024 by default) at 2 GiB of 2 MiB extents.
//  - fallocate() takes the pages: want of memory is an error there, not a SIGBUS at the first touch.
//  - FALLOC_FL_PUNCH_HOLE gives them back, and what is allocated at a fresh offset reads as zeros. It takes
//    them from other processes too, so what was exported stays in the file until that goes.
//  - A file opened anew has a position of its own, which travels with the descriptor: an exported one says by
//    it which pages are meant. One that was opened for reading can never be mapped for writing.
//
// Thread-safety: any thread; one mutex.
#pragma once

#include <cstddef>
#include <mutex>

#include "backend/address_table.hpp"
#include "backend/backend.hpp"
#include "core/fd.hpp"

namespace tem {

class MemfdSpace {
 public:
  /// Throws Error{kDriver} when the kernel grants no memfd.
  explicit MemfdSpace(size_t granularity);
  ~MemfdSpace();
  MemfdSpace(const MemfdSpace&) = delete;
  MemfdSpace& operator=(const MemfdSpace&) = delete;

  // Each returns a Refusal with code 0 when it did what it says, and changes nothing otherwise.
  // Outputs are written on success only.
  Refusal reserve(size_t bytes, size_t alignment, Address* base);
  Refusal unreserve(Address base, size_t bytes);
  /// Counts against `budget`, which must outlive the memory. Code 2 when it or the machine has no more.
  Refusal create(size_t bytes, Budget* budget, Handle* handle);
  Refusal release(Handle handle);
  Refusal export_fd(Handle handle, Access access, Fd* fd);
  Refusal import_fd(const Fd& fd, Handle* handle);
  Refusal map(Address at, size_t bytes, size_t offset, Handle handle);
  /// Opens the run to reads, or to writes as well, or closes it again.
  Refusal allow(Address at, size_t bytes, Access access = Access::kReadWrite);
  Refusal unmap(Address at, size_t bytes);

  Refusal check_access(Address at, size_t bytes, Access needed = Access::kReadWrite) const;
  size_t free_bytes(const Budget& budget) const;

  struct Live {
    size_t handles = 0, mappings = 0, reservations = 0;
  };
  Live live() const;

 private:
  Refusal give_back(const std::vector<Allocation>& freed);
  int file_of(const Allocation& memory) const { return memory.file >= 0 ? memory.file : fd_; }

  mutable std::mutex mutex_;
  AddressTable table_;
  size_t granularity_;
  int fd_;
  size_t next_offset_ = 0;
};

}  // namespace tem
