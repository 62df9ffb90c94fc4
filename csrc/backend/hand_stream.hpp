// A stream without a device: work on it is a count that whoever drives the stream moves by hand.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace tem {

struct HandStream {
  std::atomic<uint64_t> submitted{0};
  std::atomic<uint64_t> completed{0};

  void submit() { submitted.fetch_add(1); }
  /// Runs up to `count` pieces of pending work, the oldest first.
  void complete(uint64_t count = UINT64_MAX) {
    uint64_t done = completed.load();
    uint64_t target = 0;
    do {
      const uint64_t pending = submitted.load() - done;
      target = done + (count < pending ? count : pending);
    } while (!completed.compare_exchange_weak(done, target));
  }
};

/// A point in the order of streams, which outlives them. Without any, as for the default stream, it has
/// passed.
struct HandMark {
  std::vector<std::pair<std::shared_ptr<HandStream>, uint64_t>> positions;

  void add(std::shared_ptr<HandStream> stream) {
    const uint64_t submitted = stream->submitted.load();
    positions.emplace_back(std::move(stream), submitted);
  }
  bool passed() const {
    return std::all_of(positions.begin(), positions.end(), [](const auto& position) {
      return position.first->completed.load() >= position.second;
    });
  }
};

}  // namespace tem
