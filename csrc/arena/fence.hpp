// The point in each stream's order after which an extent is no longer touched.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

#include "arena/handles.hpp"
#include "core/error.hpp"

namespace tem {

/// An event recorded on a stream; owns it. Thread-safe.
class Mark {
 public:
  Mark(Device& device, Stream stream) : Mark(device, stream, false) {}
  /// What all streams have reached. Null if the driver refuses, as while one is captured.
  static std::shared_ptr<Mark> everything(Device& device) noexcept {
    try {
      return std::shared_ptr<Mark>(new Mark(device, 0, true));
    } catch (const std::exception&) {
      return nullptr;
    }
  }
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;
  ~Mark() {
    if (device_->born.here()) device_->backend->forget(event_);
  }

  /// Whether this mark passes no sooner than `other`: on the same stream, and recorded after it. Two that
  /// were recorded at the same time say nothing of each other.
  bool covers(const Mark& other) const { return stream_ == other.stream_ && began_ > other.ended_; }
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
  Mark(Device& device, Stream stream, bool all)
      : device_(device.shared_from_this()),
        stream_(stream),
        began_(++device.marks),
        event_(all ? device.backend->record_all() : device.backend->record(stream)),
        ended_(++device.marks) {}

  std::shared_ptr<Device> device_;
  Stream stream_;
  uint64_t began_;  // the recording's place among all: before it,
  EventId event_;
  uint64_t ended_;  // and after it
  std::atomic<bool> passed_{false};
};

/// The marks of one extent, without those that another covers: few, one a stream as a rule.
class Fence {
 public:
  void add(std::shared_ptr<Mark> mark) {
    for (const auto& held : marks_) {
      if (held == mark || held->covers(*mark)) return;
    }
    marks_.erase(
        std::remove_if(marks_.begin(), marks_.end(), [&](const auto& held) { return mark->covers(*held); }),
        marks_.end());
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
