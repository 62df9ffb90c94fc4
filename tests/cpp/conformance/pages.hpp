// A reservation of some pages, with fresh memory mapped in it, for the length of a property.
#pragma once

#include <cstdio>
#include <exception>
#include <map>

#include "backend/backend.hpp"
#include "check.hpp"

/// Given back, with whatever is mapped in it, at the end of the scope. As the backend, it does not wait: a
/// property that queued work on the memory settles it first.
class Pages {
 public:
  Pages(tem::Backend& floor, size_t pages, size_t alignment = 0)
      : floor_(floor), page_(floor.capabilities().granularity), bytes_(pages * page_) {
    base_ = floor.reserve(bytes_, alignment);
  }
  ~Pages() {
    try {
      for (const auto& [at, bytes] : mapped_) floor_.unmap(at, bytes);
      floor_.unreserve(base_, bytes_);
    } catch (const std::exception& error) {  // a property that failed halfway may leave more behind
      ++check::failures();
      std::printf("FAILED  to give a reservation back: %s\n", error.what());
    }
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  tem::Address at(size_t page) const { return base_ + page * page_; }
  size_t bytes() const { return bytes_; }

  /// Maps fresh memory, which the mapping alone keeps alive.
  void map(size_t page, size_t pages, bool allowed = true) {
    const tem::Handle handle = floor_.create(pages * page_);
    floor_.map(at(page), pages * page_, handle);
    floor_.release(handle);
    mapped_[at(page)] = pages * page_;
    if (allowed) floor_.allow(at(page), pages * page_);
  }

 private:
  tem::Backend& floor_;
  size_t page_;
  size_t bytes_;
  tem::Address base_ = 0;
  std::map<tem::Address, size_t> mapped_;
};
