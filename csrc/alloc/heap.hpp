// Malloc over elastic memory: blocks of any size, best fit by size, then lowest address, in one reservation.
// Spans tile the reservation: used, free (mapped, cached) or absent (nothing mapped). Any extent that lies
// within a free span can be given back while its neighbours live; the hole stays an address and is mapped
// again when the space is wanted.
//
// Stream order: a freed block may be used again at once by later work on the stream it was allocated for, so
// free spans are kept by stream and join only within one. A block that other streams were recorded on is
// parked until they have passed. The fence of a free extent is recorded when the free that completes it
// happens.
//
// Thread-safe. Lock order: arena, then this. A growth never calls reclaimers: malloc runs no Python.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "arena/arena.hpp"

namespace tem {

class Heap final : public Tenant, public std::enable_shared_from_this<Heap> {
 public:
  /// `bytes` of addresses are reserved.
  static std::shared_ptr<Heap> make(std::shared_ptr<Arena> arena, AccountId account, std::string name,
                                    size_t bytes);

  /// Bytes of every size are rounded up to this; blocks are aligned to it.
  static constexpr size_t kAlignment = 512;

  /// Error{kOutOfMemory} if the account cannot get the memory before the deadline.
  void* allocate(size_t bytes, Stream stream, Deadline deadline);
  /// Error{kInvalid} for a pointer that is no live block of this heap.
  void free(void* pointer);
  /// The block is also used on `stream`, up to the moment it is freed.
  void record_stream(void* pointer, Stream stream);
  bool contains(const void* pointer) const { return range_->contains(reinterpret_cast<Address>(pointer)); }

  size_t live_bytes();
  size_t live_blocks();
  /// Error{kInUse} while blocks live; else the arena takes the rest behind its fences.
  void retire();

  std::string name() const override { return name_; }
  Idle idle() override;
  bool waiting() override;
  void trim(size_t bytes, size_t most, bool kept, std::vector<Leaving>& out) override;
  void stay(const Leaving& leaving) override;

 private:
  using Guard = std::lock_guard<std::mutex>;
  enum class State { kUsed, kFree, kParked, kAbsent };

  struct Span {
    size_t bytes = 0;
    State state = State::kAbsent;
    Stream stream = 0;
    std::vector<Stream> others;  // streams recorded on a used block
    Fence fence;                 // of a free span; of a parked one, what the other streams still do
    Fence own;                   // of a parked span: its fence once it is free
  };
  using Spans = std::map<size_t, Span>;  // by offset; they tile the range

  Heap(std::shared_ptr<Arena> arena, AccountId account, std::string name, size_t bytes);

  std::shared_ptr<Arena> arena();
  Address address(size_t offset) const { return range_->base() + offset; }
  Spans::iterator used_at(void* pointer, const char* what);
  void* take(size_t bytes, Stream stream);
  void* grow(size_t bytes, Stream stream, Deadline deadline);
  Piece find_absent(size_t bytes, size_t granularity);
  void split(Spans::iterator span, size_t bytes);
  std::shared_ptr<Mark> mark(Stream stream) const { return std::make_shared<Mark>(*device_, stream); }
  bool joins(Spans::const_iterator span, Stream stream) const {
    return span != spans_.end() && span->second.state == State::kFree && span->second.stream == stream;
  }
  Fence fence_of_free(Spans::const_iterator span) const;
  void set_free(Spans::iterator span, Stream stream, Fence fence);
  void unlist(Spans::iterator span);
  void join_absent(Spans::iterator span);
  void unpark();
  template <class Visit>
  void for_each_idle_extent(Visit visit);

  const AccountId account_;
  const std::string name_;
  const BornHere born_;
  const std::shared_ptr<Device> device_;  // records fences also after retire()
  WriterId writer_ = kNobody;
  std::unique_ptr<Range> range_;

  std::mutex mutex_;              // guards all below
  std::shared_ptr<Arena> arena_;  // dropped by retire(): a retired heap lives in the arena
  Spans spans_;
  std::set<std::tuple<Stream, size_t, size_t>> free_;  // (stream, bytes, offset)
  std::set<size_t> parked_;                            // offsets
  std::map<size_t, size_t> extents_;                   // offset -> bytes
  size_t mapped_ = 0;
  size_t live_bytes_ = 0;
  size_t live_blocks_ = 0;
  bool keep_ = true;  // free spans stay mapped until somebody needs them
};

}  // namespace tem
