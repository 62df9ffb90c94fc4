// Which live blocks were shared with other processes. A process maps whole extents, so what is shared is the
// run of extents under a block. Nothing pins them: an extent that a live block touches is not idle, so it
// stays until the last block that was shared on it is freed. Thread-safety: none; the owner brings the lock.
#pragma once

#include <array>
#include <cstddef>
#include <map>
#include <unordered_map>
#include <utility>

#include "arena/growth.hpp"

namespace tem {

/// What another process must know to be given a run.
using ShareToken = std::array<unsigned char, 16>;

class SharedRuns {
 public:
  /// Blocks of one run share its token, so that a process that opens several maps it once.
  const ShareToken& add(size_t block, Piece run, const ShareToken& fresh) {
    const Key key{run.offset, run.bytes};
    Run& shared = runs_[key];
    if (shared.blocks == 0) shared.token = fresh;
    if (blocks_.emplace(block, key).second) ++shared.blocks;
    return shared.token;
  }
  /// A block is freed that may have been shared.
  void remove(size_t block) {
    const auto found = blocks_.find(block);
    if (found == blocks_.end()) return;
    const auto run = runs_.find(found->second);
    if (--run->second.blocks == 0) runs_.erase(run);
    blocks_.erase(found);
  }
  bool empty() const { return blocks_.empty(); }
  /// Of no bytes, if all blocks of it have been freed.
  Piece find(const ShareToken& token) const {
    for (const auto& [key, run] : runs_) {
      if (run.token == token) return {key.first, key.second};
    }
    return {};
  }

 private:
  using Key = std::pair<size_t, size_t>;
  struct Run {
    ShareToken token{};
    size_t blocks = 0;
  };
  std::map<Key, Run> runs_;
  std::unordered_map<size_t, Key> blocks_;  // by offset
};

}  // namespace tem
