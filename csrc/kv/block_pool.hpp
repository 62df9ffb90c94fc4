// Places blocks so that extents fill and empty together, and plans which to move where that does not happen
// by itself.
//
// A new block goes to the resident extent that is fullest, at its lowest free address; with none free there,
// to the lowest address that is not resident. What is freed then leaves whole extents empty at the top.
//
// Thread-safe. Lock order: this, then the range. The range's growth is called with neither.
#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "kv/block_range.hpp"

namespace tem {

/// One extent (in every stripe) and what stands on it.
struct Occupancy {
  Block first = 0;  // blocks that touch it, both ends included
  Block last = 0;
  size_t live = 0;   // of them held
  size_t bytes = 0;  // that come back when it is empty, all stripes
};

/// Copies that empty extents. The destinations are held until commit or abort.
struct CompactionPlan {
  std::vector<std::pair<Block, Block>> copies;  // (from, to)
  size_t freed_bytes = 0;
};

class BlockPool {
 public:
  /// Error{kInUse} while the range has another.
  explicit BlockPool(std::shared_ptr<BlockRange> range);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;
  ~BlockPool();

  /// `count` blocks, resident and held. Error{kOutOfMemory} if there are not as many, or no memory for them;
  /// then nothing is taken.
  std::vector<Block> allocate(size_t count, Stream stream, Deadline deadline);
  void free(const std::vector<Block>& blocks, Stream stream);
  size_t num_blocks() const { return range_->geometry().num_blocks; }
  size_t free_blocks();
  size_t live_blocks();

  /// Extents with live blocks, cheapest to empty first: fewest live blocks for the bytes that come back.
  std::vector<Occupancy> cheapest();

  /// Which blocks to copy where so that whole extents come free, at most `max_copies` of them. Only resident
  /// blocks are filled. An empty plan means there is nothing to gain.
  CompactionPlan plan_compaction(size_t max_copies, Stream stream, Deadline deadline);
  /// The copies have been submitted to `stream`: the sources go.
  void commit(const CompactionPlan& plan, Stream stream);
  /// The copies were not made: the destinations go.
  void abort(const CompactionPlan& plan, Stream stream);

 private:
  using Guard = std::lock_guard<std::mutex>;
  using Key = std::tuple<size_t, size_t, int32_t>;  // (free blocks, offset, slot): fullest first, then lowest

  struct Site {
    Block first = 0, last = 0;  // blocks whose first byte lies in the slot
    size_t live = 0;
  };

  Site site_of(const BlockRange::Slot& slot) const;
  Occupancy occupancy_of(const BlockRange::Slot& slot) const;
  std::vector<Occupancy> occupied() const;
  void refresh();
  std::vector<Block> choose(size_t count);
  bool usable(Block block) const {
    return !claimed_[static_cast<size_t>(block)] && !range_->held_[static_cast<size_t>(block)];
  }
  void claim(Block block);
  void touch(Block block);
  void unclaim(const std::vector<Block>& blocks);

  const std::shared_ptr<BlockRange> range_;
  std::mutex mutex_;           // guards all below
  std::vector<bool> claimed_;  // handed out, or about to be
  size_t claimed_count_ = 0;
  std::set<Key> sites_;      // resident slots with free blocks
  std::vector<Key> key_of_;  // by slot; free blocks 0: not in sites_
  Block lowest_ = 0;         // no block below it is free
};

}  // namespace tem
