// The point in each stream's order after which an extent is no longer touched.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "arena/handles.hpp"
#include "core/error.hpp"

namespace tem {

/// An event recorded on a stream; owns it. Thread-safe.
class Mark {
 public:
  Mark(Device& device, Stream stream)
      : device_(device.shared_from_this()), stream_(stream), event_(device.backend->record(stream)) {}
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;
  ~Mark() {
    if (device_->born.here()) device_->backend->forget(event_);
  }

  Stream stream() const { return stream_; }
  /// A driver that cannot say counts as not yet: what waits for the mark stays mapped.
  bool passed() noexcept {
    if (passed_.load(std::memory_order_acquire)) return true;
    try {
      if (!device_->backend->passed(event_)) return false;
    } catch (const Error&) {
      return false;
    }
    passed_.store(true, std::memory_order_release);
    return true;
  }

 private:
  std::shared_ptr<Device> device_;
  Stream stream_;
  EventId event_;
  std::atomic<bool> passed_{false};
};

/// The marks of one extent, at most one a stream: a later mark on a stream implies the earlier one.
class Fence {
 public:
  void add(std::shared_ptr<Mark> mark) {
    for (auto& held : marks_) {
      if (held->stream() == mark->stream()) {
        held = std::move(mark);
        return;
      }
    }
    marks_.push_back(std::move(mark));
  }

  void add(const Fence& other) {
    for (const auto& mark : other.marks_) add(mark);
  }

  bool passed() {
    marks_.erase(
        std::remove_if(marks_.begin(), marks_.end(), [](const auto& mark) { return mark->passed(); }),
        marks_.end());
    return marks_.empty();
  }

 private:
  std::vector<std::shared_ptr<Mark>> marks_;
};

}  // namespace tem
