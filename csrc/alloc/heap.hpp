// An account's malloc: a stream-ordered caching allocator over elastic memory, in one reservation.
//
// Small blocks are cut from slabs, larger ones are spans: the smallest free span that fits, the lowest of
// those; one beside absent memory counts as large as it can become, so the edge of what is mapped stays whole
// for the next block that is larger than all before it. Spans split and join; any extent that lies within a
// free span can be given back while its neighbours live, and the hole is mapped again when the space is
// wanted. Growth maps the fewest bytes: it extends a free span at the edge of what is mapped before it starts
// a new one.
//
// A freed block may be used again at once by later work on its stream (see Lane). One that other streams were
// recorded on is parked until they have passed. The fence of an idle extent is the free that left it idle.
//
// The fast path takes one lock for some tens of nanoseconds and looks nothing up but arrays and one small
// ordered set. Thread-safe. Lock order: arena, then this. A growth never calls reclaimers: malloc runs no
// Python.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <memory_resource>
#include <mutex>
#include <string>
#include <vector>

#include "alloc/extent_map.hpp"
#include "alloc/lane.hpp"
#include "alloc/malloc.hpp"
#include "alloc/shared_runs.hpp"
#include "arena/arena.hpp"
#include "core/short_lock.hpp"

namespace tem {

class Heap final : public Malloc, public Tenant, public std::enable_shared_from_this<Heap> {
 public:
  /// Reserves several times the device's memory: addresses cost nothing, and holes may stay where they are.
  static std::shared_ptr<Heap> make(std::shared_ptr<Arena> arena, AccountId account, std::string name);

  void* allocate(size_t bytes, Stream stream) override;
  bool allocate_at(void* address, size_t bytes, Stream stream) override;
  void free(void* block) override;
  void record_stream(void* block, Stream stream) override;
  BlockView block_at(const void* address) override;
  bool contains(const void* pointer) const { return range_->contains(reinterpret_cast<Address>(pointer)); }

  MallocStats stats() override;
  void count_retry() override;
  void count_out_of_memory() override;
  void count_rejection() override;
  void count_provided_segment(PoolId pool, size_t bytes, bool came) override;
  void count_provided_block(size_t bytes, size_t requested, bool taken) override;
  void reset_peak() override;
  void reset_accumulated() override;
  std::vector<SegmentView> segments(PoolId pool) override;
  void observe(MallocObserver* observer) override;
  size_t largest_free(Stream stream) override;

  void empty_cache() override;
  bool wait_for_streams() override;
  void set_limit(size_t bytes) override;
  size_t limit() override;

  void create_pool(PoolId pool) override;
  void release_pool(PoolId pool) override;
  int pool_uses(PoolId pool) override;
  void begin_pool(PoolId pool, std::function<bool(Stream)> filter) override;
  void end_pool(PoolId pool) override;
  void set_use_on_oom(PoolId pool, bool use) override;
  void set_no_split(PoolId pool) override;
  std::vector<PlacedBlock> live_in(PoolId pool) override;
  std::vector<Address> restore(PoolId pool, const std::vector<PlacedBlock>& checkpoint) override;

  /// The run of extents under a block, as another process maps it.
  struct Share {
    ShareToken token{};
    std::vector<size_t> extents;  // their sizes; they lie side by side
    size_t offset = 0;            // where the block starts in the run
  };
  /// Lets the run be exported until the block is freed. `fresh` becomes its token if it has none yet.
  Share share(const void* block, const ShareToken& fresh);
  /// Descriptors of up to `most` extents of a run, from the one numbered `first`. Error{kClosed} if no block
  /// that was shared on it lives.
  std::vector<Fd> export_fds(const ShareToken& token, size_t first, size_t most);
  /// As Arena::allow_peer.
  bool allow_peer(int ordinal) { return arena()->allow_peer(ordinal); }
  /// Of the device that the heap's memory is on.
  const std::shared_ptr<Device>& device() const { return device_; }

  /// Lets all memory go, under blocks that live too, once the device has done what it has been given so far.
  /// Blocks keep their addresses, and nothing may touch them or is allocated before bring_back().
  /// Error{kInUse} while another process may use a block, or a graph is captured.
  void put_away();
  /// Puts memory under all of them again, all or nothing; what they held is lost. Memory that another tenant
  /// wrote to is zeroed on `stream`. Calls reclaimers, unlike a growth. Error{kOutOfMemory} leaves the heap
  /// put away.
  void bring_back(Stream stream, Deadline deadline);

  /// Without what another allocator provides.
  size_t live_bytes();
  size_t live_blocks();
  /// A child of fork() is served by nobody: its allocations go where they went without this package.
  bool serves_host() const { return host_ && born_.here(); }
  bool serves_cuda(int device) const { return !host_ && device_ordinal_ == device && born_.here(); }
  /// Error{kInUse} while blocks live; else the arena takes the rest behind its fences.
  void retire();

  std::string name() const override { return name_; }
  std::vector<Range*> ranges() override { return {range_.get()}; }
  Idle idle() override;
  bool waiting() override;
  void trim(size_t bytes, size_t most, bool kept, std::vector<Leaving>& out) override;
  void stay(const Leaving& leaving) override;

 private:
  using Guard = std::lock_guard<ShortLock>;

  /// A block: a whole span, or one of a slab's.
  struct Spot {
    Span* span = nullptr;
    uint32_t block = Slab::kNone;
    bool in_slab() const { return block != Slab::kNone; }
  };
  struct Parked {
    Spot spot;
    size_t waits = 0;              // marks that have not passed
    std::vector<Stream> unmarked;  // streams that could not be marked: one of them is being captured
  };
  struct Queue {
    Stream stream;
    std::deque<std::pair<std::unique_ptr<Mark>, Parked*>> marks;
  };
  /// Of an idle extent.
  enum class Fence {
    kPassed,
    kPending,
    kUnmarked  // a mark has yet to be made: nobody knows when, so nobody waits for it
  };
  struct Capture {
    PoolId pool;
    std::function<bool(Stream)> filter;
  };

  Heap(std::shared_ptr<Arena> arena, AccountId account, std::string name);

  std::shared_ptr<Arena> arena();
  Address address(size_t offset) const { return range_->base() + offset; }
  size_t offset_of(const void* pointer) const { return reinterpret_cast<Address>(pointer) - range_->base(); }
  Address address_of(Spot spot) const;
  size_t requested_of(Spot spot) const;

  // Blocks, in heap.cpp.
  Spot live_at(const void* pointer, const char* what);
  void* take(Lane& lane, size_t rounded, size_t requested);
  Span* take_span(Lane& lane, size_t bytes);
  bool take_in_slab(Lane& lane, size_t offset, size_t rounded, size_t requested);
  void make_slab(Lane& lane, Span* span, size_t number);
  void release(Spot spot);
  void put(Spot spot);
  void put_in_slab(Spot spot);
  void desert(Slab* slab);
  void drop_slab(Slab* slab);
  void set_free(Span* span);
  Span* list_free(Span* span);
  void stamp(const Span* span);
  bool leaves_extent_idle(const Span* span, size_t begin, size_t end);
  void mark(Lane& lane);
  void count_taken(const Lane& lane, size_t requested);
  void tell(MallocEvent::Action action, Address at, size_t bytes, const Lane& lane);
  void count_segments(PoolId pool, bool small, int64_t segments, int64_t bytes, bool came);
  void forget_gone_pools();

  // Growth, in heap_growth.cpp.
  void* grow(size_t rounded, size_t requested, Stream stream, Deadline deadline);
  Piece plan(Lane& lane, size_t bytes, size_t unit);
  void add_extents(Lane& lane, Piece piece, const std::vector<Piece>& extents, uint64_t stamp);
  Span* cut_absent(Piece piece);
  bool within_limit(size_t bytes);
  void check_limit(Arena& arena, size_t bytes);

  // Other streams, in heap_streams.cpp.
  void park(Spot spot, std::vector<Stream> streams);
  void unpark();
  void mark_streams(Parked& parked);
  void finish(Parked* parked);

  // Giving back, in heap_trim.cpp.
  void settle();
  void drop_empty_slabs(Lane& lane);
  bool comes_free();
  Fence fence_of(const MappedExtent& extent);
  template <class Visit>
  void for_each_idle_extent(Visit visit);
  void drop_extent(Span* span, Piece piece);
  void set_absent(Span* span);

  // Put away, in heap_away.cpp.
  Idle idle_away();
  void trim_away(size_t bytes, size_t most, std::vector<Leaving>& out);
  void stay_away(MappedExtent& extent);
  void count_extent(const MappedExtent& extent, bool came);

  // Pools, in heap_pools.cpp.
  Lane& lane_for(Stream stream, bool small);
  Lane& lane_of(Pool& pool, Stream stream, bool small);
  Pool& pool_for(Stream stream);
  Pool& at(PoolId pool);
  Pool& private_at(PoolId pool);
  /// Whether what a pool has free must stay mapped: a graph may touch it.
  bool stays(const Pool& pool) const { return &pool != &shared_ && !pool.released && !pool.use_on_oom; }
  void drop_pools();
  std::vector<PlacedBlock> live_blocks_of(const Pool& pool);
  void check_restorable(const Pool& pool, const std::vector<PlacedBlock>& checkpoint);
  void claim(Pool& pool, const PlacedBlock& block);
  Span* free_over(Lane& lane, size_t offset, size_t bytes);
  Span* carve(Lane& lane, size_t offset, size_t bytes);
  template <class Visit>
  void for_each_lane(Visit visit);
  template <class Visit>
  void for_each_span(Visit visit);

  const AccountId account_;
  const std::string name_;
  const BornHere born_;
  const std::shared_ptr<Device> device_;  // records marks also after retire()
  const size_t granularity_;
  const bool host_;
  const int device_ordinal_;
  WriterId writer_ = kNobody;
  std::unique_ptr<Range> range_;

  ShortLock mutex_;               // guards all below
  std::shared_ptr<Arena> arena_;  // dropped by retire(): a retired heap lives in the arena
  SpanMap spans_;
  ExtentMap extents_;
  std::pmr::unsynchronized_pool_resource nodes_;
  Pool shared_;
  std::map<PoolId, std::unique_ptr<Pool>> pools_;
  std::vector<std::unique_ptr<Pool>> released_;
  std::vector<Capture> captures_;
  std::map<size_t, Span*> absent_;  // by offset
  std::map<const Parked*, std::unique_ptr<Parked>> parked_;
  std::deque<Queue> queues_;  // marks of parked blocks, by stream
  size_t unmarked_ = 0;       // parked blocks with streams that could not be marked
  SharedRuns shared_runs_;
  MallocStats stats_;
  int64_t provided_blocks_ = 0;  // counted in stats_ too
  int64_t provided_bytes_ = 0;
  MallocObserver* observer_ = nullptr;
  size_t limit_ = SIZE_MAX;
  std::shared_ptr<Mark> away_;  // what the device had been given when the heap was put away; else null
  size_t gone_bytes_ = 0;       // of extents whose memory has gone since
  bool keep_ = true;            // free spans stay mapped until somebody needs them
};

}  // namespace tem
