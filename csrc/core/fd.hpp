// A file descriptor that closes when it goes.
#pragma once

#include <unistd.h>

#include <optional>
#include <utility>

#include "core/fork.hpp"

namespace tem {

class Fd {
 public:
  Fd() = default;
  explicit Fd(int number) : number_(number) {}
  /// One that a child of fork() closes at once: device memory that it kept alive would be nobody's.
  static Fd not_for_children(int number) {
    Fd made(number);
    if (number >= 0 && close_in_children(number)) made.marked_.emplace();
    return made;
  }
  Fd(Fd&& other) noexcept
      : number_(std::exchange(other.number_, -1)), marked_(std::exchange(other.marked_, std::nullopt)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(number_, other.number_);
    std::swap(marked_, other.marked_);
    return *this;
  }
  ~Fd() { close(); }

  int get() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }
  void close() {
    if (const int number = release(); number >= 0) ::close(number);
  }
  int release() {
    const int number = std::exchange(number_, -1);
    const auto marked = std::exchange(marked_, std::nullopt);
    if (!marked) return number;
    if (!marked->here()) return -1;  // closed already, and the number may be another's
    leave_to_children(number);
    return number;
  }

 private:
  int number_ = -1;
  std::optional<BornHere> marked_;
};

}  // namespace tem
