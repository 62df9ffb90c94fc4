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
  /// What `open` opens, kept from children.
  template <class Open>
  static Fd not_for_children(Open open) {
    Fd made;
    const NoFork no_fork;
    made.number_ = open();
    made.keep_from_children(no_fork);
    return made;
  }
  Fd(Fd&& other) noexcept
      : number_(std::exchange(other.number_, -1)), noted_(std::exchange(other.noted_, std::nullopt)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(number_, other.number_);
    std::swap(noted_, other.noted_);
    return *this;
  }
  ~Fd() { close(); }

  int get() const { return number_; }
  explicit operator bool() const { return number_ >= 0; }
  /// Has children of fork() close it: device memory that they kept alive would be nobody's. `no_fork` is held
  /// since before it was opened. It must not be closed under it.
  void keep_from_children(const NoFork& no_fork) {
    if (number_ < 0) return;
    no_fork.note(number_);
    noted_.emplace();
  }
  void close() {
    leave([](int number) { ::close(number); });
  }
  /// Gives the number away, to children too. -1 where there is none.
  int release() {
    int out = -1;
    leave([&](int number) { out = number; });
    return out;
  }

 private:
  template <class Then>
  void leave(Then then) {
    const int number = std::exchange(number_, -1);
    const auto noted = std::exchange(noted_, std::nullopt);
    if (number < 0) return;
    if (!noted) return then(number);
    if (!noted->here()) return;  // closed already, and the number may be another's
    const NoFork no_fork;
    no_fork.forget(number);
    then(number);
  }

  int number_ = -1;
  std::optional<BornHere> noted_;
};

}  // namespace tem
