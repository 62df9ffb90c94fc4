// Threads at everything at once, for the sanitizers: block ranges, pools, mallocs, limits, capacity,
// reclaimers and the arena's own thread. When all is over every byte is back.
//   stress             the host backend
//   stress LIBRARY     the CUDA backend over the fake driver at this path
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "alloc/directory.hpp"
#include "arena/arena.hpp"
#include "check.hpp"
#include "core/sizes.hpp"
#include "kv/block_pool.hpp"
#include "threads.hpp"

using namespace tem;  // NOLINT

namespace {

constexpr size_t kCapacity = 96 * kMiB;
constexpr int kRounds = 3000;
constexpr double kPatience = 0.002;  // seconds

/// Streams that the test drives by hand, of either backend.
class Streams {
 public:
  explicit Streams(const std::string& library) {
    if (!library.empty()) enter(library);
    for (Stream& stream : streams_) stream = create();
  }
  ~Streams() {
    for (const Stream stream : streams_)
      driver_ ? call("cuStreamDestroy_v2", stream) : host_stream_destroy(stream);
  }
  Streams(const Streams&) = delete;
  Streams& operator=(const Streams&) = delete;

  Stream at(size_t i) const { return streams_[i % kDriven]; }
  /// For growth by threads that write at once. The fake queues memsets: there, streams without pending work.
  Stream growing(size_t i) const { return driver_ ? streams_[kDriven + i % kIdle] : at(i); }
  void submit(size_t i) { driver_ ? call("fake_cuda_stream_submit", at(i)) : host_stream_submit(at(i)); }
  void complete(size_t i) {
    driver_ ? call("fake_cuda_stream_complete", at(i)) : host_stream_complete(at(i));
  }
  void complete_all() {
    for (size_t i = 0; i < kDriven; ++i) complete(i);
  }

 private:
  /// A stream is of the current context, which the backend leaves as it was.
  void enter(const std::string& library) {
    driver_ = dlopen(library.c_str(), RTLD_NOW);
    void* context = nullptr;
    CHECK_EQ(reinterpret_cast<int (*)(void**, int)>(dlsym(driver_, "cuDevicePrimaryCtxRetain"))(&context, 0),
             0);
    CHECK_EQ(reinterpret_cast<int (*)(void*)>(dlsym(driver_, "cuCtxSetCurrent"))(context), 0);
  }
  Stream create() {
    if (driver_ == nullptr) return host_stream_create();
    void* stream = nullptr;
    CHECK_EQ(reinterpret_cast<int (*)(void**, unsigned)>(dlsym(driver_, "cuStreamCreate"))(&stream, 1), 0);
    return reinterpret_cast<Stream>(stream);
  }
  void call(const char* name, Stream stream) {
    CHECK_EQ(reinterpret_cast<int (*)(void*)>(dlsym(driver_, name))(reinterpret_cast<void*>(stream)), 0);
  }

  static constexpr size_t kDriven = 3;
  static constexpr size_t kIdle = 2;

  void* driver_ = nullptr;
  std::array<Stream, kDriven + kIdle> streams_{};
};

using Random = std::mt19937;

size_t below(Random& random, size_t bound) {
  return std::uniform_int_distribution<size_t>(0, bound - 1)(random);
}

Deadline soon() { return deadline_in(kPatience); }

/// Runs `step` and lets pass what a demand may meet. True if nothing was refused.
bool tolerates_want(const std::function<void()>& step) {
  try {
    step();
    return true;
  } catch (const Error& error) {
    if (error.kind() != Kind::kOutOfMemory) throw;
    return false;
  }
}

void mark(Address at, uint64_t value) { std::memcpy(reinterpret_cast<void*>(at), &value, sizeof value); }

uint64_t marked(Address at) {
  uint64_t value = 0;
  std::memcpy(&value, reinterpret_cast<const void*>(at), sizeof value);
  return value;
}

/// A block range that several threads hold blocks of, each its own.
struct Cache {
  Cache(const std::shared_ptr<Arena>& arena, AccountId account, const Geometry& geometry)
      : range(BlockRange::make(arena, account, "a cache", geometry)), pool(range) {}

  Address at(Block block, size_t stripe) const {
    return range->base(stripe) + static_cast<size_t>(block) * range->geometry().block_bytes;
  }

  std::shared_ptr<BlockRange> range;
  BlockPool pool;
};

void hold_blocks(Cache& cache, Streams& streams, unsigned seed, Block first, Block count) {
  Random random(seed);
  std::vector<Block> mine;
  for (int round = 0; round < kRounds; ++round) {
    const Block block = first + static_cast<Block>(below(random, static_cast<size_t>(count)));
    const bool held = cache.range->held(block);
    if (!held && tolerates_want([&] { cache.range->ensure({block}, streams.growing(round), soon()); })) {
      CHECK(cache.range->resident(block));
      mark(cache.at(block, 0), static_cast<uint64_t>(block) + 1);
    } else if (held) {
      CHECK_EQ(marked(cache.at(block, 0)), static_cast<uint64_t>(block) + 1);
      cache.range->release({block}, streams.at(round + seed));
    }
  }
  for (Block block = first; block < first + count; ++block) {
    if (cache.range->held(block)) cache.range->release({block}, 0);
  }
}

void use_pool(Cache& cache, Streams& streams, unsigned seed, bool compacts) {
  Random random(seed);
  std::vector<Block> mine;
  for (int round = 0; round < kRounds; ++round) {
    const size_t count = 1 + below(random, 6);
    if (mine.size() < 16) {
      tolerates_want([&] {
        const std::vector<Block> got = cache.pool.allocate(count, streams.growing(round), soon());
        for (const Block block : got)
          mark(cache.at(block, 0), (uint64_t{seed} << 32) + static_cast<uint64_t>(block));
        mine.insert(mine.end(), got.begin(), got.end());
      });
    }
    while (mine.size() > 8) {
      const size_t i = below(random, mine.size());
      CHECK_EQ(marked(cache.at(mine[i], 0)), (uint64_t{seed} << 32) + static_cast<uint64_t>(mine[i]));
      cache.pool.free({mine[i]}, streams.at(round));
      mine.erase(mine.begin() + static_cast<std::ptrdiff_t>(i));
    }
    if (compacts && round % 8 == 0) {
      // Others' blocks move only with their leave: this pool's plans are looked at and dropped.
      tolerates_want([&] { cache.pool.abort(cache.pool.plan_compaction(8, 0, soon()), 0); });
      cache.pool.cheapest();
    }
  }
  cache.pool.free(mine, 0);
}

void use_malloc(Heap& allocator, Streams& streams, unsigned seed) {
  Random random(seed);
  std::vector<std::pair<void*, size_t>> mine;
  const auto drop = [&](size_t i) {
    const auto [block, bytes] = mine[i];
    const auto* const text = static_cast<const unsigned char*>(block);
    CHECK(text[0] == seed % 251 && text[bytes - 1] == seed % 251);
    allocator.free(block);
    mine[i] = mine.back();
    mine.pop_back();
  };
  for (int round = 0; round < 2 * kRounds; ++round) {
    const size_t bytes = 1 + below(random, round % 5 == 0 ? 6 * kMiB : 32 * kKiB);
    tolerates_want([&] {
      void* const block = allocator.allocate(bytes, streams.growing(round % 2));
      static_cast<unsigned char*>(block)[0] = static_cast<unsigned char>(seed % 251);
      static_cast<unsigned char*>(block)[bytes - 1] = static_cast<unsigned char>(seed % 251);
      mine.emplace_back(block, bytes);
      if (round % 7 == 0) allocator.record_stream(block, streams.at(2));
    });
    while (mine.size() > 6) drop(below(random, mine.size()));
    if (round % 16 == 0) CHECK(directory().owner(&random) == nullptr);
  }
  while (!mine.empty()) drop(mine.size() - 1);
}

/// Captures as a framework makes them: what the default stream allocates comes from a pool, which is put back
/// as it was, and released while others are at work.
void use_private_pools(Heap& allocator, Streams& streams, unsigned seed) {
  Random random(seed);
  for (uint64_t round = 1; round <= kRounds / 10; ++round) {
    const PoolId pool{seed, round};
    std::vector<void*> mine;
    const auto add = [&](size_t most) {
      tolerates_want([&] { mine.push_back(allocator.allocate(1 + below(random, most), 0)); });
    };
    allocator.begin_pool(pool, [](Stream stream) { return stream == 0; });
    for (const size_t most : {kKiB, 32 * kKiB, kMiB, 3 * kMiB}) add(most);
    const std::vector<PlacedBlock> checkpoint = allocator.live_in(pool);
    CHECK_EQ(checkpoint.size(), mine.size());
    add(2 * kMiB);
    if (!mine.empty()) allocator.free(mine.front());
    allocator.end_pool(pool);
    const size_t live = mine.empty() ? 0 : mine.size() - 1;
    CHECK_EQ(allocator.restore(pool, checkpoint).size(), live);
    CHECK_EQ(allocator.live_in(pool).size(), checkpoint.size());
    CHECK_EQ(allocator.pool_uses(pool), 1);
    if (round % 2 == 0) allocator.release_pool(pool);
    for (const PlacedBlock& block : checkpoint) {
      void* const at = reinterpret_cast<void*>(block.address);
      if (round % 3 == 0) allocator.record_stream(at, streams.at(round));
      allocator.free(at);
    }
    if (round % 2 != 0) allocator.release_pool(pool);
  }
}

/// What is live and mapped by a malloc's events.
class Watcher final : public MallocObserver {
 public:
  void on(const MallocEvent& event) noexcept override {
    const auto bytes = static_cast<int64_t>(event.bytes);
    switch (event.action) {
      case MallocEvent::Action::kAllocate:
        ++live_;
        ++allocated_;
        break;
      case MallocEvent::Action::kFree:
        --live_;
        break;
      case MallocEvent::Action::kFreed:
        break;
      case MallocEvent::Action::kMap:
        mapped_ += bytes;
        break;
      case MallocEvent::Action::kUnmap:
        mapped_ -= bytes;
        break;
    }
  }
  int64_t live() const { return live_; }
  int64_t allocated() const { return allocated_; }
  int64_t mapped() const { return mapped_; }

 private:
  // Guarded by the malloc's lock, and read when all threads have ended.
  int64_t live_ = 0;
  int64_t allocated_ = 0;
  int64_t mapped_ = 0;
};

void read_and_empty(Heap& allocator, Streams& streams) {
  for (int round = 0; round < kRounds / 30; ++round) {
    size_t end = 0;
    for (const SegmentView& segment : allocator.segments({})) {
      CHECK(segment.address >= end);
      end = segment.address;
      for (const BlockView& block : segment.blocks) {
        CHECK_EQ(block.address, end);
        end += block.bytes;
      }
      CHECK_EQ(end, segment.address + segment.bytes);
    }
    const MallocStats stats = allocator.stats();
    CHECK(stats.allocated_bytes.all.current <= stats.active_bytes.all.current);
    CHECK(stats.active_bytes.all.current <= stats.reserved_bytes.all.current);
    allocator.largest_free(streams.at(static_cast<size_t>(round)));
    allocator.block_at(&allocator);
    allocator.set_limit(round % 4 == 0 ? 32 * kMiB : kUnlimited);
    if (round % 8 == 0) allocator.reset_peak();
    if (round % 5 == 0) {
      allocator.empty_cache();
    } else {
      allocator.wait_for_streams();
    }
  }
  allocator.set_limit(kUnlimited);
}

void turn_knobs(Arena& arena, AccountId account, Streams& streams, const std::atomic<bool>& over) {
  for (unsigned round = 0; !over; ++round) {
    streams.submit(round);
    Limits limits;
    limits.max = round % 3 == 0 ? kUnlimited : (16 + round % 48) * kMiB;
    limits.high = round % 2 == 0 ? kUnlimited : 12 * kMiB;
    arena.set_limits(account, limits, soon());
    arena.set_capacity({kCapacity - round % 4 * 16 * kMiB, 2 * kMiB, (2 + round % 3 * 8) * kMiB}, soon());
    arena.trim(account);
    const ArenaState state = arena.state();
    CHECK(state.created <= kCapacity);
    size_t held = 0;
    for (const AccountState& one : state.accounts) held += one.holding.held;
    CHECK_EQ(held, state.leased);
    arena.room(account);
    arena.wait_for_room(account, 64 * kMiB, soon());
    arena.yields(0);
    streams.complete(round);
    const uint64_t number = arena.add_reclaimer(account, Rung::kEvict, [](size_t, Deadline) {});
    arena.collect();
    arena.remove_reclaimer(number);
  }
}

void run(const std::shared_ptr<Backend>& backend, const std::string& library) {
  const size_t free_before = backend->memory_info().free;
  Streams streams(library);
  {
    const auto arena = Arena::open(backend, {kCapacity, 2 * kMiB, 10 * kMiB});
    Limits lower, upper;
    lower.value = 100;
    upper.value = 1000;
    const AccountId training = arena->open_account("training", "training", lower);
    const AccountId serving = arena->open_account("serving", "serving", upper);
    const AccountId idle = arena->open_account("idle", "idle", Limits{});
    {
      Cache kept(arena, idle, {16, kMiB, 1, 16 * kMiB, 0});
      Cache blocks(arena, training, {32, 3 * kMiB / 4, 2, 0, 0});
      Cache pooled(arena, serving, {64, 5 * kMiB / 8, 1, 8 * kMiB, 0});
      const auto small = Heap::make(arena, training, "training");
      arena->add_reclaimer(idle, Rung::kEvict, [&](size_t, Deadline) { arena->trim(idle); });

      Watcher watcher;
      small->observe(&watcher);
      std::atomic<bool> over{false};
      check::Threads users, knobs;
      users.start([&] { hold_blocks(kept, streams, 1, 0, 16); });
      users.start([&] { hold_blocks(blocks, streams, 2, 0, 16); });
      users.start([&] { hold_blocks(blocks, streams, 3, 16, 16); });
      users.start([&] { use_pool(pooled, streams, 4, false); });
      users.start([&] { use_pool(pooled, streams, 5, true); });
      users.start([&] { use_malloc(*small, streams, 6); });
      users.start([&] { use_malloc(*small, streams, 7); });
      users.start([&] { use_private_pools(*small, streams, 8); });
      users.start([&] { read_and_empty(*small, streams); });
      knobs.start([&] { turn_knobs(*arena, training, streams, over); });
      users.join();
      over = true;
      knobs.join();
      CHECK_EQ(users.failed() + knobs.failed(), 0);
      CHECK_EQ(small->live_bytes(), 0U);
      small->observe(nullptr);
      CHECK_EQ(watcher.live(), 0);
      CHECK(watcher.allocated() > 4 * kRounds / 10);
      CHECK_EQ(watcher.mapped(), small->stats().reserved_bytes.all.current);
      CHECK_EQ(blocks.range->held_blocks() + kept.range->held_blocks() + pooled.range->held_blocks(), 0U);
      CHECK_EQ(pooled.pool.live_blocks(), 0U);

      // Let go while streams are still behind: the arena's thread takes the rest when they have passed.
      streams.submit(0);
      small->retire();
      for (const Cache* cache : {&kept, &blocks, &pooled}) cache->range->retire();
      streams.complete_all();
    }
    for (const AccountId account : {training, serving, idle}) arena->close_account(account);
    const ArenaState state = arena->state();
    CHECK_EQ(state.leased, 0U);
    CHECK_EQ(state.lost, 0U);
    CHECK_EQ(state.faults, 0U);
    arena->close();
    CHECK_EQ(arena->handles().created.load(), 0U);
  }
  CHECK_EQ(backend->memory_info().free, free_before);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string library = argc > 1 ? argv[1] : "";
  check::property("after threads at everything at once, every byte is back", [&] {
    run(library.empty() ? make_host_backend(kCapacity) : make_cuda_backend(0, library), library);
  });
  std::printf("%d failed\n", check::failures());
  return check::failures() == 0 ? 0 : 1;
}
