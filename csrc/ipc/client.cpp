#include "ipc/client.hpp"

#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <iterator>
#include <map>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "arena/imported.hpp"
#include "backend/cuda_abi.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"
#include "ipc/leaving.hpp"
#include "ipc/socket.hpp"
#include "ipc/wire.hpp"

namespace tem::ipc {
namespace {

constexpr double kPatience = 10.0;  // seconds, for the other process

struct Imports {
  using Key = std::pair<const Device*, std::string>;

  std::mutex opening;  // one at a time, or two would map the same
  std::mutex mutex;    // guards what follows; taken last
  std::map<Key, std::weak_ptr<Imported>> open;
};

/// Leaked: what was imported may go while static destructors run.
Imports& imports() {
  static auto* const made = new Imports;
  return *made;
}

/// The end of the last owner. Work that was submitted may still touch the memory.
void let_go(Imported* memory, const std::shared_ptr<Device>& device) noexcept {
  if (device->born.here()) {
    Imports& all = imports();
    const std::lock_guard<std::mutex> guard(all.mutex);
    for (auto each = all.open.begin(); each != all.open.end();) {
      each = each->second.expired() ? all.open.erase(each) : std::next(each);
    }
  }
  unmap_behind(std::unique_ptr<Imported>(memory), device);
}

class Visit {
 public:
  explicit Visit(const Handle& handle)
      : handle_(handle), deadline_(deadline_in(kPatience)), socket_(connect_to(handle.socket, deadline_)) {
    if (!socket_) {
      throw Error(Kind::kClosed, text() + ": it has ended, or runs in another network namespace (container)");
    }
    if (peer_of(socket_) != std::optional(::geteuid())) {
      throw Error(Kind::kInvalid,
                  text() + ": another user's process answers for it; have both run as one user");
    }
  }

  /// Takes extents in from `first` on; returns how many.
  size_t take(Imported& memory, size_t first) {
    const Question asked = question(handle_, first);
    if (send_message(socket_.get(), &asked, sizeof asked, {}) != 0) gone();
    for (;;) {
      if (!wait_readable(socket_, deadline_)) late();
      Answer answer{};
      const Received got = receive_message(socket_.get(), &answer, sizeof answer);
      if (got.error == EAGAIN) continue;
      if (got.error != 0 || got.bytes == 0) gone();
      if (!is_answer(answer, got.bytes)) refuse("its answer makes no sense");
      if (answer.verdict == Verdict::kLater) return 0;
      if (answer.verdict == Verdict::kFreed) throw Error(Kind::kClosed, text() + ": " + answer.why);
      if (answer.verdict != Verdict::kGiven) refuse(answer.why);
      if (got.lost) refuse("this process may open no more files; raise its limit (ulimit -n)");
      const size_t missing = handle_.extents.size() - first;
      if (got.fds.empty() || got.fds.size() != answer.count || got.fds.size() > missing) {
        refuse("it sent " + std::to_string(got.fds.size()) + " extents of " + std::to_string(missing));
      }
      for (const Fd& fd : got.fds) memory.add(fd, handle_.extents[first++]);
      return got.fds.size();
    }
  }

  /// Before asking again.
  void wait() const {
    if (Clock::now() >= deadline_) late();
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

 private:
  std::string text() const {
    return "memory of " + format_bytes(bytes_of(handle_)) + " that process " +
           std::to_string(handle_.process) + " shared cannot be opened";
  }
  [[noreturn]] void refuse(const std::string& why) const {
    throw Error(Kind::kDriver, text() + ": " + why, cuda::kOperatingSystem);
  }
  [[noreturn]] void gone() const { throw Error(Kind::kClosed, text() + ": it has ended meanwhile"); }
  [[noreturn]] void late() const {
    refuse("it has not answered for " + std::to_string(static_cast<int>(kPatience)) +
           " seconds; is it stopped?");
  }

  const Handle& handle_;
  const Deadline deadline_;
  const Fd socket_;
};

std::shared_ptr<Imported> find(const Imports::Key& key) {
  Imports& all = imports();
  const std::lock_guard<std::mutex> guard(all.mutex);
  const auto found = all.open.find(key);
  return found == all.open.end() ? nullptr : found->second.lock();
}

std::shared_ptr<void> at_base(std::shared_ptr<Imported> memory) {
  auto* const base = reinterpret_cast<void*>(memory->base());
  return {std::move(memory), base};
}

}  // namespace

std::shared_ptr<void> open(Device& device, const std::string& bytes) {
  device.born.check("this device's memory");
  const Imports::Key key{&device, bytes};
  Imports& all = imports();
  const std::lock_guard<std::mutex> one(all.opening);
  if (auto known = find(key)) return at_base(std::move(known));
  unmap_what_was_left();
  const Handle handle = decode(bytes);
  const Capabilities& own = device.backend->capabilities();
  if (handle.exchange != own.exchange) {
    throw Error(Kind::kInvalid, "process " + std::to_string(handle.process) + " shared memory of " +
                                    handle.exchange + ", and device " + std::to_string(own.ordinal) +
                                    " here is " + own.uuid +
                                    "; show both processes the same devices in the same order "
                                    "(CUDA_VISIBLE_DEVICES)");
  }
  Visit visit(handle);
  auto made = std::make_unique<Imported>(device, bytes_of(handle));
  for (size_t taken = 0; taken < handle.extents.size();) {
    const size_t more = visit.take(*made, taken);
    if (more == 0) visit.wait();
    taken += more;
  }
  made->allow();
  std::shared_ptr<Imported> memory(
      made.release(), [keep = device.shared_from_this()](Imported* last) { let_go(last, keep); });
  const std::lock_guard<std::mutex> guard(all.mutex);
  all.open[key] = memory;
  return at_base(std::move(memory));
}

void allow_again(Device& device) {
  std::vector<std::shared_ptr<Imported>> held;
  Imports& all = imports();
  // Nothing is opened meanwhile that would not know of the peer.
  const std::lock_guard<std::mutex> one(all.opening);
  {
    const std::lock_guard<std::mutex> guard(all.mutex);
    for (const auto& [key, memory] : all.open) {
      if (key.first != &device) continue;
      if (auto live = memory.lock()) held.push_back(std::move(live));
    }
  }
  for (const auto& memory : held) memory->allow();
}

}  // namespace tem::ipc
