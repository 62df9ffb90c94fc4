// Threads that grow and shrink under a broker that grants, asks and drops the connection, for the sanitizers.
// When all is over the broker has every byte back.
//   leases             the host backend
//   leases LIBRARY     the CUDA backend over the fake driver at this path
#include <unistd.h>

#include <atomic>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "alloc/heap.hpp"
#include "arena/arena.hpp"
#include "check.hpp"
#include "client/client.hpp"
#include "core/sizes.hpp"
#include "kv/block_range.hpp"
#include "small_broker.hpp"
#include "threads.hpp"

using namespace tem;  // NOLINT

namespace {

constexpr size_t kCapacity = 64 * kMiB;
constexpr int kRounds = 1500;

void tolerate_want(const std::function<void()>& step) {
  try {
    step();
  } catch (const Error& error) {
    if (error.kind() != Kind::kOutOfMemory) throw;
  }
}

/// Each thread has blocks of its own, `count` from `first_of_all` on.
void hold_blocks(BlockRange& range, unsigned seed, Block first_of_all, Block count) {
  std::mt19937 random(seed);
  const Block end = first_of_all + count;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<Block> some;
    const Block first = first_of_all + static_cast<Block>(random() % static_cast<unsigned>(count));
    for (Block block = first; block < std::min(end, first + 4); ++block) some.push_back(block);
    bool held = true;
    try {
      range.ensure(some, 0, deadline_in(0.005));
    } catch (const Error& error) {
      if (error.kind() != Kind::kOutOfMemory) throw;
      held = false;
    }
    if (held) range.release(some, 0);
  }
}

void use_malloc(Heap& heap, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<void*> live;
  for (int round = 0; round < kRounds; ++round) {
    tolerate_want([&] { live.push_back(heap.allocate(1 + random() % (6 * kMiB), 0)); });
    if (live.size() > 4 || (random() % 2 == 0 && !live.empty())) {
      const size_t at = random() % live.size();
      heap.free(live[at]);
      live[at] = live.back();
      live.pop_back();
    }
  }
  for (void* block : live) heap.free(block);
}

void change(Arena& arena, AccountId account, const std::atomic<bool>& over) {
  std::mt19937 random(9);
  while (!over) {
    tolerate_want(
        [&] { arena.reserve(account, (1 + random() % 4) << 21, deadline_in(0.005), Rung::kPause, nullptr); });
    arena.unreserve(account);
    arena.wait_for_room(account, 8 * kMiB, deadline_in(0.005));
    arena.state();
    arena.collect();
    const uint64_t number =
        arena.add_reclaimer(account, Rung::kEvict, [&](size_t, Deadline) { arena.trim(account); });
    tolerate_want([&] {
      Limits limits;
      limits.max = 24 * kMiB + (random() % 8 << 21);
      try {
        arena.set_limits(account, limits, deadline_in(0.005));
      } catch (const Error& error) {
        if (error.kind() != Kind::kBroker) throw;  // it was between two connections
      }
    });
    arena.remove_reclaimer(number);
  }
}

void run(const std::shared_ptr<Backend>& backend) {
  const std::string path = "/tmp/tem_leases_" + std::to_string(::getpid()) + ".sock";
  check::SmallBroker broker(path, kCapacity);
  const size_t free_before = backend->memory_info().free;
  {
    const auto link = client::Client::connect(
        path, {"HOST", "host", "memory", "leases", backend->memory_info().total, 2 * kMiB}, deadline_in(5));
    const auto arena = Arena::open(backend, {backend->memory_info().total, 0, 0}, link);
    link->start(arena);
    std::vector<AccountId> accounts;
    for (const char* name : {"first", "second", "third"})
      accounts.push_back(arena->open_account(name, "training", Limits{}));
    {
      const auto kept =
          BlockRange::make(arena, accounts[0], "kept", Geometry{24, 2 * kMiB, 1, 16 * kMiB, 2 * kMiB});
      const auto loose = BlockRange::make(arena, accounts[1], "loose", Geometry{24, 2 * kMiB, 1, 0, 0});
      const auto heap = Heap::make(arena, accounts[2], "heap");
      std::atomic<bool> over{false};
      check::Threads users, changer;
      users.start([&] { hold_blocks(*kept, 1, 0, 24); });
      users.start([&] { hold_blocks(*loose, 2, 0, 12); });
      users.start([&] { hold_blocks(*loose, 3, 12, 12); });
      users.start([&] { use_malloc(*heap, 4); });
      users.start([&] { use_malloc(*heap, 5); });
      changer.start([&] { change(*arena, accounts[0], over); });
      users.join();
      over = true;
      changer.join();
      CHECK_EQ(users.failed() + changer.failed(), 0);
      heap->retire();
      for (const auto& range : {kept, loose}) range->retire();
    }
    broker.rest();
    for (const AccountId account : accounts) arena->close_account(account);
    arena->close();
    CHECK_EQ(arena->handles().created.load(), 0U);
  }
  CHECK_EQ(broker.charged(), 0U);
  CHECK_EQ(broker.wrong(), 0);
  CHECK(broker.asked() > 100);
  CHECK_EQ(backend->memory_info().free, free_before);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string library = argc > 1 ? argv[1] : "";
  check::property("under a broker that asks and goes away, every byte is back", [&] {
    run(library.empty() ? make_host_backend(4 * kCapacity) : make_cuda_backend(0, library));
  });
  std::printf("%d failed\n", check::failures());
  return check::failures() == 0 ? 0 : 1;
}
