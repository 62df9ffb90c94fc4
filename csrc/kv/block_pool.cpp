#include "kv/block_pool.hpp"

#include <algorithm>
#include <utility>

#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {

BlockPool::BlockPool(std::shared_ptr<BlockRange> range)
    : range_(std::move(range)), claimed_(range_->geometry().num_blocks, false) {
  const Guard guard(range_->mutex_);
  if (std::exchange(range_->pooled_, true))
    throw Error(Kind::kInUse, range_->name() +
                                  " has a block pool already, and a second would hand out the same blocks; "
                                  "share the first, or delete it");
  for (size_t number = 0; number < range_->slots_.size(); ++number)
    range_->touch(static_cast<int32_t>(number));
}

BlockPool::~BlockPool() {
  const Guard guard(range_->mutex_);
  range_->pooled_ = false;
}

BlockPool::Site BlockPool::site_of(const BlockRange::Slot& slot) const {
  const size_t size = range_->geometry_.block_bytes;
  const auto block_at = [size](size_t offset) { return static_cast<Block>((offset + size - 1) / size); };
  Site site;
  site.first = block_at(slot.piece.offset);
  site.last = std::min(block_at(slot.piece.end()), static_cast<Block>(range_->geometry_.num_blocks)) - 1;
  for (Block block = site.first; block <= site.last; ++block) site.live += usable(block) ? 0 : 1;
  return site;
}

Occupancy BlockPool::occupancy_of(const BlockRange::Slot& slot) const {
  const size_t size = range_->geometry_.block_bytes;
  Occupancy occupancy;
  occupancy.first = static_cast<Block>(slot.piece.offset / size);
  occupancy.last = std::min(static_cast<Block>((slot.piece.end() - 1) / size),
                            static_cast<Block>(range_->geometry_.num_blocks) - 1);
  occupancy.live = slot.live;
  occupancy.bytes = slot.piece.bytes * range_->stripes_.size();
  return occupancy;
}

/// Brings the order of sites up to date with the slots that changed since the last call.
void BlockPool::refresh() {
  key_of_.resize(range_->slots_.size());
  for (const int32_t number : range_->touched_) {
    BlockRange::Slot& slot = range_->slots_[static_cast<size_t>(number)];
    Key& key = key_of_[static_cast<size_t>(number)];
    slot.touched = false;
    if (std::get<0>(key) != 0) sites_.erase(key);
    key = {};
    if (slot.piece.bytes == 0) continue;
    const Site site = site_of(slot);
    const size_t blocks = site.last < site.first ? 0 : static_cast<size_t>(site.last - site.first) + 1;
    if (blocks <= site.live) continue;
    key = {blocks - site.live, slot.piece.offset, number};
    sites_.insert(key);
  }
  range_->touched_.clear();
}

void BlockPool::claim(Block block) {
  claimed_[static_cast<size_t>(block)] = true;
  ++claimed_count_;
  touch(block);
}

void BlockPool::touch(Block block) {
  const int32_t slot = range_->slot_of_[range_->first_granule(block)];
  if (slot != BlockRange::kAbsent) range_->touch(slot);
}

void BlockPool::unclaim(const std::vector<Block>& blocks) {
  const Guard guard(range_->mutex_);
  for (const Block block : blocks) {
    claimed_[static_cast<size_t>(block)] = false;
    --claimed_count_;
    lowest_ = std::min(lowest_, block);
    touch(block);
  }
}

std::vector<Block> BlockPool::choose(size_t count) {
  const Guard guard(range_->mutex_);
  refresh();
  std::vector<Block> chosen;
  chosen.reserve(count);
  for (const Key& key : sites_) {
    if (chosen.size() == count) break;
    const Site site = site_of(range_->slots_[static_cast<size_t>(std::get<2>(key))]);
    for (Block block = site.first; block <= site.last && chosen.size() < count; ++block) {
      if (usable(block) && range_->is_resident(block)) chosen.push_back(block);
    }
  }
  for (const Block block : chosen) claim(block);
  const Block end = static_cast<Block>(range_->geometry_.num_blocks);
  while (lowest_ < end && claimed_[static_cast<size_t>(lowest_)]) ++lowest_;
  for (Block block = lowest_; chosen.size() < count && block < end; ++block) {
    if (!usable(block)) continue;
    claim(block);
    chosen.push_back(block);
  }
  return chosen;
}

std::vector<Block> BlockPool::allocate(size_t count, Stream stream, Deadline deadline) {
  range_->arena();  // refuses a closed range before anything is claimed
  std::vector<Block> blocks;
  {
    const Guard guard(mutex_);
    const size_t left = claimed_.size() - claimed_count_;
    if (count > left) {
      throw Error(Kind::kOutOfMemory, range_->name() + ": " + std::to_string(count) + " blocks asked for, " +
                                          std::to_string(left) + " of " + std::to_string(claimed_.size()) +
                                          " are free; free some, or make the tensor with more blocks");
    }
    blocks = choose(count);
    if (blocks.size() < count) {
      unclaim(blocks);
      throw Error(Kind::kOutOfMemory, range_->name() + ": " + std::to_string(count) +
                                          " blocks asked for, but only " + std::to_string(blocks.size()) +
                                          " are free; others are held outside this pool by ensure()");
    }
  }
  try {
    range_->ensure(blocks, stream, deadline);
  } catch (...) {
    const Guard guard(mutex_);
    unclaim(blocks);
    throw;
  }
  return blocks;
}

void BlockPool::free(const std::vector<Block>& blocks, Stream stream) {
  {
    const Guard guard(mutex_);
    for (const Block block : blocks) {
      range_->check_block(block);
      if (claimed_[static_cast<size_t>(block)]) continue;
      throw Error(Kind::kBlock, range_->name() + ": block " + std::to_string(block) +
                                    " is freed but was not allocated from this pool");
    }
  }
  range_->release(blocks, stream);
  const Guard guard(mutex_);
  unclaim(blocks);
}

size_t BlockPool::free_blocks() {
  const Guard guard(mutex_);
  return claimed_.size() - claimed_count_;
}

size_t BlockPool::live_blocks() {
  const Guard guard(mutex_);
  return claimed_count_;
}

std::vector<Occupancy> BlockPool::cheapest() {
  const Guard guard(range_->mutex_);
  return occupied();
}

std::vector<Occupancy> BlockPool::occupied() const {
  std::vector<Occupancy> sites;
  for (const BlockRange::Slot& slot : range_->slots_) {
    if (slot.piece.bytes != 0 && slot.live != 0) sites.push_back(occupancy_of(slot));
  }
  std::sort(sites.begin(), sites.end(), [](const Occupancy& a, const Occupancy& b) {
    const size_t left = a.live * b.bytes;
    const size_t right = b.live * a.bytes;
    return left != right ? left < right : a.first > b.first;
  });
  return sites;
}

CompactionPlan BlockPool::plan_compaction(size_t max_copies, Stream stream, Deadline deadline) {
  CompactionPlan plan;
  std::vector<Block> targets;
  {
    const Guard guard(mutex_);
    const Guard range_guard(range_->mutex_);
    const std::vector<Occupancy> sites = occupied();
    // Sources from the cheapest extent on, targets from the fullest on. A source that finds no room stays and
    // may take blocks itself: a large extent cannot always be emptied, but it can empty small ones. Where
    // blocks do not divide extents a block touches two of them, so each is looked at as a source, a target
    // and a neighbour.
    std::vector<uint32_t> leaving(claimed_.size(), 0);  // how many chosen sources the block touches
    std::vector<bool> moved(claimed_.size(), false);
    std::vector<bool> target(claimed_.size(), false);
    size_t fullest = sites.size();
    Block next = 0;
    Block last = -1;
    const auto next_target = [&]() -> Block {
      for (;;) {
        for (; next <= last; ++next) {
          const auto i = static_cast<size_t>(next);
          if (usable(next) && leaving[i] == 0 && !target[i] && range_->is_resident(next)) return next++;
        }
        if (fullest == 0) return -1;
        --fullest;
        next = sites[fullest].first;
        last = sites[fullest].last;
      }
    };
    size_t room = 0;  // blocks that could be targets, those of sources included
    for (size_t i = 0; i < claimed_.size(); ++i) {
      const auto block = static_cast<Block>(i);
      if (usable(block) && range_->is_resident(block)) ++room;
    }
    for (const Occupancy& site : sites) {
      const size_t before = plan.copies.size();
      bool complete = true;
      for (Block block = site.first; block <= site.last; ++block) {
        ++leaving[static_cast<size_t>(block)];
        complete = complete && !target[static_cast<size_t>(block)];
      }
      complete = complete && site.live <= room;
      for (Block block = site.first; block <= site.last && complete; ++block) {
        const auto i = static_cast<size_t>(block);
        if (!range_->held_[i] || moved[i]) continue;
        // Held outside this pool: its owner would not follow the move.
        complete = claimed_[i] && plan.copies.size() < max_copies;
        const Block to = complete ? next_target() : -1;
        complete = to >= 0;
        if (!complete) break;
        plan.copies.emplace_back(block, to);
        moved[i] = target[static_cast<size_t>(to)] = true;
      }
      if (complete) {
        plan.freed_bytes += site.bytes;
        room -= plan.copies.size() - before;
        continue;
      }
      for (size_t i = before; i < plan.copies.size(); ++i) {
        moved[static_cast<size_t>(plan.copies[i].first)] =
            target[static_cast<size_t>(plan.copies[i].second)] = false;
      }
      plan.copies.resize(before);
      for (Block block = site.first; block <= site.last; ++block) --leaving[static_cast<size_t>(block)];
      // Later targets start over: what this source would have taken is free again.
      fullest = sites.size();
      last = -1;
      next = 0;
    }
    for (const auto& copy : plan.copies) {
      claim(copy.second);
      targets.push_back(copy.second);
    }
  }
  try {
    range_->ensure(targets, stream, deadline);
  } catch (...) {
    const Guard guard(mutex_);
    unclaim(targets);
    throw;
  }
  return plan;
}

void BlockPool::commit(const CompactionPlan& plan, Stream stream) {
  std::vector<Block> sources;
  for (const auto& copy : plan.copies) sources.push_back(copy.first);
  free(sources, stream);
}

void BlockPool::abort(const CompactionPlan& plan, Stream stream) {
  std::vector<Block> targets;
  for (const auto& copy : plan.copies) targets.push_back(copy.second);
  free(targets, stream);
}

}  // namespace tem
