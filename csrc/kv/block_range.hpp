// Block-granular residency over reserved addresses: which blocks are held, which extents are under them, and
// when an extent may go. One range holds the blocks side by side; with several stripes (one tensor a layer)
// every stripe has the same geometry, and its extents come and go together.
//
// A slot is what comes and goes together: one extent at the same offset of every stripe. Its `live` counts
// the held blocks that touch it. A slot on which nothing lives is idle; it leaves when its fence has passed
// and the arena asks, or at once where it is not kept.
//
// Thread-safe. Lock order: arena, then this; the fast paths of ensure() and release() take only this.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "arena/arena.hpp"

namespace tem {

using Block = int64_t;

struct Geometry {
  size_t num_blocks = 0;
  size_t block_bytes = 0;  // in one stripe
  size_t stripes = 1;
  size_t keep = 0;          // idle bytes that stay mapped until somebody needs them
  size_t extent_bytes = 0;  // 0: extents are chosen; else every extent has this size (measurements)
};

class BlockRange final : public Tenant, public std::enable_shared_from_this<BlockRange> {
 public:
  static std::shared_ptr<BlockRange> make(std::shared_ptr<Arena> arena, AccountId account, std::string name,
                                          const Geometry& geometry);

  /// Makes blocks resident and held; those held already stay so. All or nothing. Memory that somebody else
  /// wrote to is zeroed on `stream`. Error{kBlock} for a block out of range, Error{kOutOfMemory} if the
  /// memory is not to be had.
  void ensure(const std::vector<Block>& blocks, Stream stream, Deadline deadline,
              Rung dearest = Rung::kPause);
  /// Lets held blocks go; work submitted to `stream` so far may still touch them. Error{kBlock} for a block
  /// that is out of range, not held or named twice; then all are held as before.
  void release(const std::vector<Block>& blocks, Stream stream);
  /// True if all of the block's bytes are mapped.
  bool resident(Block block);
  bool held(Block block);

  /// Lets everything go, behind the streams that ensure() and release() were called with. A stream must
  /// outlive the range it was used with.
  void retire();

  // To share a range of one stripe whose blocks are all held. Error{kInvalid} for any other.

  /// The sizes of its extents, in order of address.
  std::vector<size_t> extents();
  /// Descriptors of `count` extents from the one of number `first` on.
  std::vector<Fd> export_fds(size_t first, size_t count, Access access);

  const Geometry& geometry() const { return geometry_; }
  Address base(size_t stripe) const { return stripes_.at(stripe)->base(); }
  size_t bytes() const { return stripes_.front()->bytes(); }
  size_t resident_bytes();
  size_t held_blocks();
  std::shared_ptr<Arena> arena();
  AccountId account() const { return account_; }

  std::string name() const override { return name_; }
  std::vector<Range*> ranges() override;
  Idle idle() override;
  bool waiting() override;
  void trim(size_t bytes, size_t most, bool kept, std::vector<Leaving>& out) override;
  void stay(const Leaving& leaving) override;

 private:
  friend class BlockPool;
  using Guard = std::lock_guard<std::mutex>;
  static constexpr int32_t kAbsent = -1;

  struct Slot {
    Piece piece;           // bytes == 0: the number is free
    size_t live = 0;       // held blocks that touch it
    bool touched = false;  // in touched_
    Fence fence;
  };

  BlockRange(std::shared_ptr<Arena> arena, AccountId account, std::string name, const Geometry& geometry);

  size_t first_granule(Block block) const {
    return static_cast<size_t>(block) * geometry_.block_bytes / granularity_;
  }
  size_t last_granule(Block block) const {
    return ((static_cast<size_t>(block) + 1) * geometry_.block_bytes - 1) / granularity_;
  }
  void check_block(Block block) const;
  template <class Visit>
  void for_each_slot(Block block, Visit visit) const;
  bool hold_resident(const std::vector<Block>& blocks);
  bool is_resident(Block block) const;
  std::vector<Piece> missing(const std::vector<Block>& blocks) const;
  std::vector<Piece> extents_for(const std::vector<Piece>& runs, bool ahead) const;
  bool absent(Piece piece) const;
  void grow(const std::vector<Block>& blocks, Stream stream, Deadline deadline, Rung dearest);
  std::vector<Place> places(const std::vector<Piece>& extents) const;
  std::vector<Place> all_places() const;
  void add_slot(Piece piece);
  void note_stream(Stream stream);
  void touch(int32_t slot);
  void let_go(Block block, const std::vector<std::shared_ptr<Mark>>& marks);
  void leave(int32_t slot, std::vector<Leaving>& out);
  void settle_pending();
  size_t idle_bytes() const { return (ready_bytes_ + pending_bytes_) * stripes_.size(); }

  const Geometry geometry_;
  const AccountId account_;
  const std::string name_;
  const size_t granularity_;
  const BornHere born_;
  std::shared_ptr<Arena> arena_;  // dropped by retire(): a retired range lives in the arena
  WriterId writer_ = kNobody;
  std::vector<std::unique_ptr<Range>> stripes_;

  std::mutex mutex_;  // guards all below
  size_t keep_;
  std::vector<int32_t> slot_of_;  // by granule
  std::vector<Slot> slots_;
  std::vector<int32_t> free_slots_;
  std::vector<uint8_t> held_;  // by block
  size_t held_count_ = 0;
  size_t mapped_ = 0;                             // bytes of one stripe
  uint64_t generation_ = 0;                       // moves when a slot comes or goes
  std::set<std::pair<size_t, int32_t>> ready_;    // idle, fence passed: (offset, slot)
  std::set<std::pair<size_t, int32_t>> pending_;  // idle, fence not passed
  size_t ready_bytes_ = 0;                        // of one stripe
  size_t pending_bytes_ = 0;                      // of one stripe
  std::vector<Stream> streams_;                   // that blocks were ensured or released on
  bool pooled_ = false;                           // a block pool hands out its blocks
  std::vector<int32_t> touched_;  // slots whose live count or presence changed, for the block pool
};

}  // namespace tem
