#include "kv/block_range.hpp"

#include <algorithm>
#include <utility>

#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {
namespace {

constexpr size_t kMaxBlocks = size_t{1} << 31;

size_t total_bytes(const Geometry& geometry) {
  return checked_mul(geometry.num_blocks, geometry.block_bytes);
}

Geometry checked(const Geometry& geometry, size_t granularity) {
  if (geometry.num_blocks == 0 || geometry.block_bytes == 0 || geometry.stripes == 0) {
    throw Error(Kind::kInvalid,
                "a block range needs at least one block, one byte a block and one stripe; asked for " +
                    std::to_string(geometry.num_blocks) + " blocks of " +
                    std::to_string(geometry.block_bytes) + " bytes in " + std::to_string(geometry.stripes) +
                    " stripes");
  }
  if (geometry.extent_bytes != 0 && (!is_pow2(geometry.extent_bytes) || geometry.extent_bytes < granularity ||
                                     geometry.extent_bytes > kMaxExtent)) {
    throw Error(Kind::kInvalid, "an extent of " + format_bytes(geometry.extent_bytes) +
                                    " is not a power of two from " + format_bytes(granularity) + " to " +
                                    format_bytes(kMaxExtent));
  }
  if (geometry.num_blocks > kMaxBlocks) {
    throw Error(Kind::kInvalid, std::to_string(geometry.num_blocks) +
                                    " blocks are more than a range keeps track of, " +
                                    std::to_string(kMaxBlocks) + "; make them larger");
  }
  // What no device can have is a mistake in a size, not a demand.
  constexpr size_t kAddressable = size_t{1} << 47;
  if (checked_mul(total_bytes(geometry), geometry.stripes) > kAddressable) {
    throw Error(Kind::kInvalid, "a block range of " + format_bytes(total_bytes(geometry) * geometry.stripes) +
                                    " exceeds the address space of 128 TiB");
  }
  return geometry;
}

}  // namespace

std::shared_ptr<BlockRange> BlockRange::make(std::shared_ptr<Arena> arena, AccountId account,
                                             std::string name, const Geometry& geometry) {
  (void)arena->account(account);  // refuses before the driver is called, which a forked child may not do
  std::shared_ptr<BlockRange> range(
      new BlockRange(arena, account, std::move(name), checked(geometry, arena->granularity())));
  range->writer_ = arena->attach(range, account);
  return range;
}

BlockRange::BlockRange(std::shared_ptr<Arena> arena, AccountId account, std::string name,
                       const Geometry& geometry)
    : geometry_(geometry),
      account_(account),
      name_(std::move(name)),
      granularity_(arena->granularity()),
      arena_(std::move(arena)),
      keep_(geometry.keep),
      slot_of_(round_up(total_bytes(geometry), granularity_) / granularity_, kAbsent),
      held_(geometry.num_blocks, 0) {
  for (size_t i = 0; i < geometry.stripes; ++i) {
    stripes_.push_back(std::make_unique<Range>(arena_->handles(), total_bytes(geometry)));
  }
}

void BlockRange::check_block(Block block) const {
  if (block >= 0 && static_cast<size_t>(block) < geometry_.num_blocks) return;
  throw Error(Kind::kBlock, name_ + ": block " + std::to_string(block) +
                                " is out of range; it has blocks 0 to " +
                                std::to_string(geometry_.num_blocks - 1));
}

template <class Visit>
void BlockRange::for_each_slot(Block block, Visit visit) const {
  const size_t last = last_granule(block);
  for (size_t granule = first_granule(block); granule <= last;) {
    const int32_t slot = slot_of_[granule];
    granule = slot == kAbsent ? granule + 1 : slots_[static_cast<size_t>(slot)].piece.end() / granularity_;
    visit(slot);
  }
}

bool BlockRange::is_resident(Block block) const {
  bool all = true;
  for_each_slot(block, [&](int32_t slot) { all = all && slot != kAbsent; });
  return all;
}

bool BlockRange::hold_resident(const std::vector<Block>& blocks) {
  bool news = false;
  for (const Block block : blocks) {
    check_block(block);
    if (held_[static_cast<size_t>(block)] != 0) continue;
    if (!is_resident(block)) return false;
    news = true;
  }
  if (!news) return true;
  for (const Block block : blocks) {
    if (std::exchange(held_[static_cast<size_t>(block)], uint8_t{1}) != 0) continue;
    ++held_count_;
    for_each_slot(block, [&](int32_t number) {
      Slot& slot = slots_[static_cast<size_t>(number)];
      touch(number);
      if (slot.live++ != 0) return;
      if (ready_.erase({slot.piece.offset, number}) != 0) ready_bytes_ -= slot.piece.bytes;
      if (pending_.erase({slot.piece.offset, number}) != 0) pending_bytes_ -= slot.piece.bytes;
    });
  }
  return true;
}

void BlockRange::ensure(const std::vector<Block>& blocks, Stream stream, Deadline deadline, Rung dearest) {
  born_.check(name_.c_str());
  {
    const Guard guard(mutex_);
    note_stream(stream);
    if (arena_ && hold_resident(blocks)) return;
  }
  grow(blocks, stream, deadline, dearest);
}

void BlockRange::note_stream(Stream stream) {
  if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) streams_.push_back(stream);
}

void BlockRange::add_slot(Piece piece) {
  int32_t number = 0;
  if (free_slots_.empty()) {
    number = static_cast<int32_t>(slots_.size());
    slots_.emplace_back();
  } else {
    number = free_slots_.back();
    free_slots_.pop_back();
  }
  Slot& slot = slots_[static_cast<size_t>(number)];
  slot.piece = piece;
  slot.live = 0;
  slot.fence = Fence();
  touch(number);
  for (size_t granule = piece.offset / granularity_; granule < piece.end() / granularity_; ++granule) {
    slot_of_[granule] = number;
  }
  ready_.insert({piece.offset, number});
  ready_bytes_ += piece.bytes;
  mapped_ += piece.bytes;
  ++generation_;
}

void BlockRange::touch(int32_t number) {
  Slot& slot = slots_[static_cast<size_t>(number)];
  if (slot.touched) return;
  slot.touched = true;
  touched_.push_back(number);
}

void BlockRange::release(const std::vector<Block>& blocks, Stream stream) {
  const std::shared_ptr<Arena> arena = this->arena();
  const std::vector<std::shared_ptr<Mark>> marks = {arena->mark(stream)};
  bool spare = false;
  {
    const Guard guard(mutex_);
    note_stream(stream);
    size_t checked = 0;
    try {
      for (; checked < blocks.size(); ++checked) {
        check_block(blocks[checked]);
        if (std::exchange(held_[static_cast<size_t>(blocks[checked])], uint8_t{0}) == 0) {
          throw Error(Kind::kBlock,
                      name_ + ": block " + std::to_string(blocks[checked]) +
                          " is released but not held, or named twice; only blocks that ensure() made "
                          "resident can be released, once");
        }
      }
    } catch (const Error&) {
      for (size_t i = 0; i < checked; ++i) held_[static_cast<size_t>(blocks[i])] = 1;
      throw;
    }
    for (const Block block : blocks) let_go(block, marks);
    spare = idle_bytes() > keep_;
  }
  if (spare) arena->collect_quietly();
}

void BlockRange::let_go(Block block, const std::vector<std::shared_ptr<Mark>>& marks) {
  --held_count_;
  for_each_slot(block, [&](int32_t number) {
    Slot& slot = slots_[static_cast<size_t>(number)];
    for (const auto& mark : marks) {
      if (!mark->passed()) slot.fence.add(mark);
    }
    touch(number);
    if (--slot.live != 0) return;
    pending_.insert({slot.piece.offset, number});
    pending_bytes_ += slot.piece.bytes;
  });
}

void BlockRange::settle_pending() {
  for (auto it = pending_.begin(); it != pending_.end();) {
    Slot& slot = slots_[static_cast<size_t>(it->second)];
    if (!slot.fence.passed()) {
      ++it;
      continue;
    }
    ready_.insert(*it);
    ready_bytes_ += slot.piece.bytes;
    pending_bytes_ -= slot.piece.bytes;
    it = pending_.erase(it);
  }
}

Idle BlockRange::idle() {
  const Guard guard(mutex_);
  settle_pending();
  return {ready_bytes_ * stripes_.size(), pending_bytes_ * stripes_.size(), std::min(keep_, idle_bytes())};
}

bool BlockRange::waiting() {
  const Guard guard(mutex_);
  return idle_bytes() > keep_;
}

void BlockRange::leave(int32_t number, std::vector<Leaving>& out) {
  Slot& slot = slots_[static_cast<size_t>(number)];
  out.push_back({places({slot.piece})});
  for (size_t granule = slot.piece.offset / granularity_; granule < slot.piece.end() / granularity_;
       ++granule) {
    slot_of_[granule] = kAbsent;
  }
  mapped_ -= slot.piece.bytes;
  ++generation_;
  touch(number);
  slot.piece = {};
  free_slots_.push_back(number);
}

void BlockRange::trim(size_t bytes, size_t most, bool kept, std::vector<Leaving>& out) {
  const Guard guard(mutex_);
  settle_pending();
  size_t freed = 0;
  // From the top down: the block pool fills from the bottom up.
  for (auto next = ready_.end(); next != ready_.begin() && freed < bytes;) {
    if (!kept && idle_bytes() <= keep_) break;
    --next;
    const int32_t number = next->second;
    const size_t size = slots_[static_cast<size_t>(number)].piece.bytes;
    if (size * stripes_.size() > most - freed) continue;
    next = ready_.erase(next);
    ready_bytes_ -= size;
    freed += size * stripes_.size();
    leave(number, out);
  }
}

void BlockRange::stay(const Leaving& leaving) {
  const Guard guard(mutex_);
  add_slot(leaving.places.front().piece);
}

bool BlockRange::resident(Block block) {
  born_.check(name_.c_str());
  const Guard guard(mutex_);
  check_block(block);
  return is_resident(block);
}

bool BlockRange::held(Block block) {
  born_.check(name_.c_str());
  const Guard guard(mutex_);
  check_block(block);
  return held_[static_cast<size_t>(block)] != 0;
}

std::vector<Range*> BlockRange::ranges() {
  std::vector<Range*> all;
  for (const auto& stripe : stripes_) all.push_back(stripe.get());
  return all;
}

size_t BlockRange::resident_bytes() {
  born_.check(name_.c_str());
  const Guard guard(mutex_);
  return mapped_ * stripes_.size();
}

size_t BlockRange::held_blocks() {
  born_.check(name_.c_str());
  const Guard guard(mutex_);
  return held_count_;
}

std::shared_ptr<Arena> BlockRange::arena() {
  born_.check(name_.c_str());
  const Guard guard(mutex_);
  if (!arena_) throw Error(Kind::kClosed, name_ + " has been closed");
  return arena_;
}

void BlockRange::retire() {
  if (!born_.here()) return;
  std::shared_ptr<Arena> arena;
  std::vector<Stream> streams;
  {
    const Guard guard(mutex_);
    if (!arena_) return;
    arena = arena_;
    streams = streams_;
  }
  std::vector<std::shared_ptr<Mark>> marks;
  for (const Stream stream : streams) marks.push_back(arena->mark(stream));
  {
    const Guard guard(mutex_);
    if (!arena_) return;
    for (size_t block = 0; block < held_.size(); ++block) {
      if (std::exchange(held_[block], uint8_t{0}) != 0) let_go(static_cast<Block>(block), marks);
    }
    keep_ = 0;
    arena_.reset();
  }
  arena->retire(*this);
}

}  // namespace tem
