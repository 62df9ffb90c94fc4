// What a framework's allocator asks of an account's malloc. Pure virtual, so that another extension module
// can call it without sharing a symbol with this one; the values cross by copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "backend/backend.hpp"

namespace tem {

/// A pool of its own, as for the captures of a CUDA graph; {0, 0} is the pool of everybody.
struct PoolId {
  uint64_t first = 0;
  uint64_t second = 0;
  bool shared() const { return first == 0 && second == 0; }
  bool operator==(const PoolId& other) const { return first == other.first && second == other.second; }
  bool operator<(const PoolId& other) const {
    return first != other.first ? first < other.first : second < other.second;
  }
};

/// A figure with its history: peak since the last reset_peak(), sums since the last reset_accumulated().
struct Stat {
  int64_t current = 0, peak = 0, allocated = 0, freed = 0;
  void add(int64_t n) {
    current += n;
    if (current > peak) peak = current;
    allocated += n;
  }
  void sub(int64_t n) {
    current -= n;
    freed += n;
  }
};

/// One figure for all blocks, and for small and large ones alone.
struct StatBySize {
  Stat all, small, large;
  void add(bool is_small, int64_t n) {
    all.add(n);
    (is_small ? small : large).add(n);
  }
  void sub(bool is_small, int64_t n) {
    all.sub(n);
    (is_small ? small : large).sub(n);
  }
};

/// Active is what is allocated and what was freed but is used by other streams still. Inactive split is what
/// is free and cannot go back to the arena, for a block lives on the same extent.
struct MallocStats {
  StatBySize allocation, segment, active, inactive_split;  // counts; a segment is an extent
  StatBySize allocated_bytes, reserved_bytes, active_bytes, inactive_split_bytes, requested_bytes;
  /// Of private pools, and of those that have gone since both resets.
  std::map<PoolId, StatBySize> reserved_bytes_by_pool;
  int64_t retries = 0, out_of_memory = 0, rejections = 0, waits = 0, maps = 0, unmaps = 0;
};

struct BlockView {
  Address address = 0;
  size_t bytes = 0;
  size_t requested = 0;  // as asked for; 0 if it is free
  bool allocated = false;
  bool active = false;  // allocated, or freed and still used by another stream
};

/// A run of neighbouring extents of one stream and pool; its blocks tile it.
struct SegmentView {
  Address address = 0;
  size_t bytes = 0;
  Stream stream = 0;
  PoolId pool;
  bool small = false;
  std::vector<BlockView> blocks;
};

/// A live block of a pool, with what it takes to put it in the same place again.
struct PlacedBlock {
  Address address = 0;
  size_t bytes = 0;
  size_t requested = 0;
  Stream stream = 0;
  bool small = false;
  Address slab = 0;  // of a block in a slab, where that starts; else 0
};

struct MallocEvent {
  enum class Action { kAllocate, kFree, kFreed, kMap, kUnmap };
  Action action = Action::kAllocate;
  Address address = 0;
  size_t bytes = 0;  // of a block, as requested
  Stream stream = 0;
  PoolId pool;
};

/// Sees what a malloc does, in order, under its lock: it must be short, and must not call it back.
class MallocObserver {
 public:
  virtual ~MallocObserver() = default;
  virtual void on(const MallocEvent& event) noexcept = 0;
};

/// Thread-safe. Errors are tem::Error; after one, everything is as it was.
class Malloc {
 public:
  virtual ~Malloc() = default;

  /// A block for work on `stream`. Error{kOutOfMemory} if the account cannot get the memory.
  virtual void* allocate(size_t bytes, Stream stream) = 0;
  /// As that, at an address whose memory is mapped and free for the stream. False, with nothing changed, if a
  /// block of this size cannot start there.
  virtual bool allocate_at(void* address, size_t bytes, Stream stream) = 0;
  /// Work submitted to the block's stream, and to those recorded, may still touch it. Error{kInvalid} for a
  /// pointer that is no live block.
  virtual void free(void* block) = 0;
  /// The block is also used on `stream`, up to the moment it is freed.
  virtual void record_stream(void* block, Stream stream) = 0;
  /// The block that holds an address, live or not; bytes == 0 if there is none.
  virtual BlockView block_at(const void* address) = 0;

  virtual MallocStats stats() = 0;
  /// What only the caller knows of: a refused allocation that it tried again, one that it gave up, and one
  /// that it gave up because of the limit alone.
  virtual void count_retry() = 0;
  virtual void count_out_of_memory() = 0;
  virtual void count_rejection() = 0;
  /// Memory for a pool that another allocator provides, and blocks of it: they are in the figures alone.
  virtual void count_provided_segment(PoolId pool, size_t bytes, bool came) = 0;
  virtual void count_provided_block(size_t bytes, size_t requested, bool taken) = 0;
  virtual void reset_peak() = 0;
  virtual void reset_accumulated() = 0;
  /// Segments of one pool, or of all with {0, 0}.
  virtual std::vector<SegmentView> segments(PoolId pool) = 0;
  /// Null: nobody looks. The observer must live as long as the malloc.
  virtual void observe(MallocObserver* observer) = 0;
  /// Bytes of the largest block that is free for `stream`.
  virtual size_t largest_free(Stream stream) = 0;

  /// Gives back all that is free, waiting for the streams that may still touch it, except within a capture.
  virtual void empty_cache() = 0;
  /// Waits for other streams' use of freed blocks. False within a capture, where nothing may wait.
  virtual bool wait_for_streams() = 0;
  /// Maps no more than so many bytes in all.
  virtual void set_limit(size_t bytes) = 0;
  virtual size_t limit() = 0;

  /// Private pools. A pool lives while it has uses; its memory stays mapped, for a captured graph will touch
  /// it when it runs again. create_pool() and begin_pool() add a use, release_pool() takes one away.
  virtual void create_pool(PoolId pool) = 0;
  virtual void release_pool(PoolId pool) = 0;
  virtual int pool_uses(PoolId pool) = 0;
  /// From now on allocations on streams that pass the filter come from the pool.
  virtual void begin_pool(PoolId pool, std::function<bool(Stream)> filter) = 0;
  virtual void end_pool(PoolId pool) = 0;
  /// The pool's free memory may go to others, as that of the shared pool. No graph must rely on it.
  virtual void set_use_on_oom(PoolId pool, bool use) = 0;
  virtual void set_no_split(PoolId pool) = 0;
  /// The live blocks of a pool, by address.
  virtual std::vector<PlacedBlock> live_in(PoolId pool) = 0;
  /// Frees all live blocks of the pool and makes those of the checkpoint live, at their addresses. Returns
  /// the addresses freed. Error{kInvalid}, with nothing changed, if blocks wait for other streams.
  virtual std::vector<Address> restore(PoolId pool, const std::vector<PlacedBlock>& checkpoint) = 0;
};

/// A live block as another process may open it.
struct SharedBlock {
  std::string handle;  // bytes for open_shared() there
  size_t offset = 0;   // where the block starts in what that maps
};

/// How another module finds an account's malloc. Thread-safe.
class MallocDirectory {
 public:
  virtual ~MallocDirectory() = default;
  /// Whose block this is; null if nobody's. Takes no lock.
  virtual Malloc* owner(const void* block) noexcept = 0;
  /// What this thread allocates from on a CUDA device; null if no account serves it. Takes no lock.
  virtual Malloc* serving(int device) noexcept = 0;

  /// Lets other processes of this user map the extents under a live block, until it is freed.
  virtual SharedBlock share(const void* block) = 0;
  /// Maps memory that another process shared, charged to nobody, on a device that an account serves. Who
  /// holds the same handle open has the same addresses. What was submitted on the device before the last
  /// owner's end may still touch it.
  virtual std::shared_ptr<void> open_shared(int device, const std::string& handle) = 0;
  /// Lets device `peer` reach what accounts have on `device`, and what was opened there, now and later.
  virtual void allow_peer(int device, int peer) = 0;
};

}  // namespace tem
