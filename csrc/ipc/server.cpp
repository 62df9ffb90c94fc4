#include "ipc/server.hpp"

#include <poll.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <exception>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "backend/cuda_abi.hpp"
#include "core/error.hpp"
#include "core/fork.hpp"
#include "ipc/socket.hpp"
#include "ipc/wire.hpp"

namespace tem::ipc {
namespace {

constexpr size_t kMostPeers = 64;
/// A peer that asks nothing for so long is let go.
constexpr auto kPatience = std::chrono::seconds(10);

class Server {
 public:
  explicit Server(const NoFork& no_fork) : name_(random_bytes()), listening_(listen_at(name_, no_fork)) {}

  const SocketName& name() const { return name_; }
  bool here() const { return born_.here(); }

  void start() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error& error) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw Error(Kind::kDriver, std::string("memory cannot be shared between processes: ") + error.what(),
                  cuda::kOperatingSystem);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  /// A number by which a handle names the heap.
  uint64_t number_of(const std::shared_ptr<Heap>& heap) {
    const std::lock_guard<std::mutex> guard(heaps_mutex_);
    for (auto each = heaps_.begin(); each != heaps_.end();) {
      const std::shared_ptr<Heap> known = each->second.lock();
      if (known == heap) return each->first;
      each = known ? std::next(each) : heaps_.erase(each);
    }
    heaps_.emplace(next_heap_, heap);
    return next_heap_++;
  }

 private:
  struct Peer {
    Fd socket;
    Clock::time_point last;
  };

  [[noreturn]] void serve() {
    for (;;) {
      std::vector<pollfd> entries;
      for (const Peer& peer : peers_) entries.push_back({peer.socket.get(), POLLIN, 0});
      if (peers_.size() < kMostPeers) entries.push_back({listening_.get(), POLLIN, 0});
      if (::poll(entries.data(), entries.size(), peers_.empty() ? -1 : 1000) < 0) continue;
      const auto now = Clock::now();
      std::vector<bool> stay;
      for (size_t i = 0; i < peers_.size(); ++i) {
        if (entries[i].revents != 0) peers_[i].last = now;
        stay.push_back(entries[i].revents != 0 ? attend(peers_[i]) : now - peers_[i].last < kPatience);
      }
      const bool more = entries.size() > peers_.size() && entries.back().revents != 0;
      for (size_t i = peers_.size(); i-- > 0;) {
        if (!stay[i]) peers_.erase(peers_.begin() + static_cast<std::ptrdiff_t>(i));
      }
      if (more) admit(now);
    }
  }

  void admit(Clock::time_point now) {
    Fd socket = accept_from(listening_);
    if (!socket) {
      // Out of descriptors, as a rule: the peer waits in line, and asking at once again would burn a core.
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      return;
    }
    if (peer_of(socket) != std::optional(::geteuid())) return;
    peers_.push_back({std::move(socket), now});
  }

  /// Answers what a peer asks. False: let it go.
  bool attend(const Peer& peer) {
    Question asked{};
    const Received got = receive_message(peer.socket.get(), &asked, sizeof asked);
    if (got.error == EAGAIN) return true;
    if (got.error != 0 || !is_question(asked, got.bytes)) return false;
    std::vector<Fd> fds;
    Answer told = answer(Verdict::kGiven, 0, "");
    try {
      fds = export_fds(asked);
      told.count = static_cast<uint32_t>(fds.size());
    } catch (const Error& error) {
      told = answer(error.kind() == Kind::kClosed ? Verdict::kFreed : Verdict::kRefused, 0, error.what());
    } catch (const std::exception& error) {
      told = answer(Verdict::kRefused, 0, error.what());
    }
    int failed = send_message(peer.socket.get(), &told, sizeof told, fds);
    if (failed == 0) return true;
    fds.clear();
    told = failed == ETOOMANYREFS
               ? answer(Verdict::kLater, 0, "")
               : answer(Verdict::kRefused, 0, std::string("sendmsg: ") + std::strerror(failed));
    return send_message(peer.socket.get(), &told, sizeof told, fds) == 0;
  }

  std::vector<Fd> export_fds(const Question& asked) {
    std::shared_ptr<Heap> heap;
    {
      const std::lock_guard<std::mutex> guard(heaps_mutex_);
      const auto found = heaps_.find(asked.heap);
      if (found != heaps_.end()) heap = found->second.lock();
    }
    if (!heap) throw Error(Kind::kClosed, "the account whose block it was has been closed");
    return heap->export_fds(asked.token, asked.first, kBatch);
  }

  const BornHere born_;
  const SocketName name_;
  Fd listening_;
  std::vector<Peer> peers_;  // the thread's own

  std::mutex heaps_mutex_;
  std::map<uint64_t, std::weak_ptr<Heap>> heaps_;
  uint64_t next_heap_ = 1;
};

Server* running = nullptr;  // guarded by NoFork; leaked: its thread never ends

Server& server() {
  std::unique_ptr<Server> made;  // if it fails, its socket closes with the lock let go of
  const NoFork no_fork;
  if (running == nullptr || !running->here()) {
    made = std::make_unique<Server>(no_fork);
    made->start();
    running = made.release();
  }
  return *running;
}

}  // namespace

SharedBlock share(const std::shared_ptr<Heap>& heap, const void* block) {
  const std::string& exchange = heap->device()->backend->capabilities().exchange;
  if (exchange.empty()) {
    throw Error(
        Kind::kDriver,
        heap->name() + ": this device cannot share memory with other processes; send a copy on the host",
        cuda::kNotSupported);
  }
  const Heap::Share shared = heap->share(block, random_bytes());
  Server& serving = server();
  Handle handle;
  handle.process = ::getpid();
  handle.socket = serving.name();
  handle.heap = serving.number_of(heap);
  handle.token = shared.token;
  handle.exchange = exchange;
  handle.extents = shared.extents;
  return {encode(handle), shared.offset};
}

}  // namespace tem::ipc
