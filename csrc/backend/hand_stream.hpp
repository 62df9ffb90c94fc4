// A stream without a device: work on it is a count that whoever drives the stream moves by hand.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

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

/// A point in a stream's order, which outlives the stream. Without one, the default stream, it has passed.
struct HandMark {
  std::shared_ptr<HandStream> stream;
  uint64_t position = 0;

  bool passed() const { return stream == nullptr || stream->completed.load() >= position; }
};

}  // namespace tem
