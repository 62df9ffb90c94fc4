#include "alloc/lane.hpp"

#include "core/error.hpp"

namespace tem {

bool Lane::mark() noexcept {
  try {
    auto made = std::make_unique<Mark>(device_, stream);
    marks_.emplace_back(next_mark_, std::move(made));
  } catch (const std::exception&) {
    return false;
  }
  ++next_mark_;
  unmarked = false;
  if (marks_.size() > kMarksKept && marks_[kMarksKept / 2].second->passed()) {
    passed_ = marks_[kMarksKept / 2].first;
    marks_.erase(marks_.begin(), marks_.begin() + kMarksKept / 2 + 1);
  }
  return true;
}

/// Marks of one stream pass in their order.
void Lane::poll() noexcept {
  while (!marks_.empty() && marks_.front().second->passed()) {
    passed_ = marks_.front().first;
    marks_.pop_front();
  }
}

}  // namespace tem
