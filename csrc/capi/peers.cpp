#include "capi/peers.hpp"

#include <atomic>
#include <mutex>
#include <set>
#include <utility>

#include "ipc/client.hpp"

namespace tem {
namespace {

struct Peers {
  std::atomic<bool> any{false};
  std::mutex mutex;
  std::set<std::pair<int, int>> pairs;
};

/// Leaked: threads may allocate while static destructors run.
Peers& peers() {
  static auto* const made = new Peers;
  return *made;
}

}  // namespace

void remember_peer(int device, int peer) {
  Peers& all = peers();
  const std::lock_guard<std::mutex> guard(all.mutex);
  all.pairs.insert({device, peer});
  all.any = true;
}

void tell_peers(Heap& heap) {
  Peers& all = peers();
  if (!all.any.load(std::memory_order_relaxed)) return;
  std::set<std::pair<int, int>> pairs;
  {
    const std::lock_guard<std::mutex> guard(all.mutex);
    pairs = all.pairs;
  }
  for (const auto& [device, peer] : pairs) {
    if (heap.serves_cuda(device) && heap.allow_peer(peer)) ipc::allow_again(*heap.device());
  }
}

}  // namespace tem
