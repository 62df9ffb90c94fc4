#include <pybind11/stl.h>

#include <chrono>
#include <mutex>
#include <set>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "alloc/heap.hpp"
#include "bindings/bindings.hpp"
#include "bindings/export.hpp"
#include "capi/scope.hpp"
#include "ipc/client.hpp"
#include "ipc/server.hpp"

namespace tem {
namespace {

using namespace py::literals;  // NOLINT: the way pybind11 means it
using Unlocked = py::call_guard<NoGil>;
using PoolNumbers = std::pair<uint64_t, uint64_t>;
using Placed = std::tuple<Address, size_t, size_t, Stream, bool, Address>;

PoolId pool_of(PoolNumbers numbers) { return {numbers.first, numbers.second}; }

py::dict stat(const StatBySize& figure) {
  const auto one = [](const Stat& stat) {
    return py::dict("current"_a = stat.current, "peak"_a = stat.peak, "allocated"_a = stat.allocated,
                    "freed"_a = stat.freed);
  };
  return py::dict("all"_a = one(figure.all), "small"_a = one(figure.small), "large"_a = one(figure.large));
}

py::dict stats_of(Heap& heap) {
  const MallocStats stats = [&] {
    const NoGil unlocked;
    return heap.stats();
  }();
  return py::dict("allocation"_a = stat(stats.allocation), "segment"_a = stat(stats.segment),
                  "active"_a = stat(stats.active), "inactive_split"_a = stat(stats.inactive_split),
                  "allocated_bytes"_a = stat(stats.allocated_bytes),
                  "reserved_bytes"_a = stat(stats.reserved_bytes),
                  "active_bytes"_a = stat(stats.active_bytes),
                  "inactive_split_bytes"_a = stat(stats.inactive_split_bytes),
                  "requested_bytes"_a = stat(stats.requested_bytes), "out_of_memory"_a = stats.out_of_memory,
                  "waits"_a = stats.waits, "maps"_a = stats.maps, "unmaps"_a = stats.unmaps);
}

py::list segments_of(Heap& heap, PoolNumbers pool) {
  const std::vector<SegmentView> segments = [&] {
    const NoGil unlocked;
    return heap.segments(pool_of(pool));
  }();
  py::list out;
  for (const SegmentView& segment : segments) {
    py::list blocks;
    for (const BlockView& block : segment.blocks) {
      const char* state = block.allocated ? "live" : block.active ? "parked" : "free";
      blocks.append(py::make_tuple(block.address, block.bytes, block.requested, state));
    }
    out.append(py::dict("address"_a = segment.address, "bytes"_a = segment.bytes, "stream"_a = segment.stream,
                        "small"_a = segment.small,
                        "pool"_a = PoolNumbers(segment.pool.first, segment.pool.second),
                        "blocks"_a = blocks));
  }
  return out;
}

std::vector<Placed> live_in(Heap& heap, PoolNumbers pool) {
  std::vector<Placed> out;
  for (const PlacedBlock& b : heap.live_in(pool_of(pool)))
    out.emplace_back(b.address, b.bytes, b.requested, b.stream, b.small, b.slab);
  return out;
}

std::vector<Address> restore(Heap& heap, PoolNumbers pool, const std::vector<Placed>& checkpoint) {
  std::vector<PlacedBlock> blocks;
  for (const auto& [address, bytes, requested, stream, small, slab] : checkpoint)
    blocks.push_back({address, bytes, requested, stream, small, slab});
  return heap.restore(pool_of(pool), blocks);
}

/// Seconds that a pair of allocate and free takes one thread while `threads` of them do nothing else.
double bench_malloc(Heap& heap, size_t bytes, Stream stream, size_t pairs, size_t threads) {
  const auto run = [&] {
    for (size_t i = 0; i < pairs; ++i) heap.free(heap.allocate(bytes, stream));
  };
  const auto start = Clock::now();
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads; ++i) others.emplace_back(run);
  run();
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(Clock::now() - start).count() / static_cast<double>(pairs);
}

/// Memory of another process, open for as long as this lives.
struct SharedMemory {
  std::shared_ptr<void> memory;
  void close() {
    const NoGil unlocked;
    memory.reset();
  }
  ~SharedMemory() { close(); }
};

/// Keeps what a heap tells, for whoever reads it.
class Recorder final : public MallocObserver {
 public:
  using Entry = std::tuple<const char*, Address, size_t, Stream, PoolNumbers>;

  explicit Recorder(std::shared_ptr<Heap> heap) : heap_(std::move(heap)) { heap_->observe(this); }
  ~Recorder() override { heap_->observe(nullptr); }
  Recorder(const Recorder&) = delete;
  Recorder& operator=(const Recorder&) = delete;

  void on(const MallocEvent& event) noexcept override {
    static constexpr const char* kNames[] = {"allocate", "free", "freed", "map", "unmap"};
    const std::lock_guard<std::mutex> guard(mutex_);
    entries_.emplace_back(kNames[static_cast<size_t>(event.action)], event.address, event.bytes, event.stream,
                          PoolNumbers(event.pool.first, event.pool.second));
  }
  std::vector<Entry> take() {
    const std::lock_guard<std::mutex> guard(mutex_);
    return std::exchange(entries_, {});
  }

 private:
  const std::shared_ptr<Heap> heap_;
  std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace

void bind_allocator(py::module_& module) {
  py::class_<Heap, std::shared_ptr<Heap>>(module, "Allocator")
      .def(init_unlocked(+[](AccountHandle& account, const std::string& name) {
             return Heap::make(account.arena, account.id, name);
           }),
           py::arg("account"), py::arg("name"))
      .def(
          "allocate",
          [](Heap& self, size_t bytes, Stream stream) {
            return reinterpret_cast<Address>(self.allocate(bytes, stream));
          },
          py::arg("bytes"), py::arg("stream"), Unlocked())
      .def(
          "allocate_at",
          [](Heap& self, Address address, size_t bytes, Stream stream) {
            return self.allocate_at(reinterpret_cast<void*>(address), bytes, stream);
          },
          py::arg("address"), py::arg("bytes"), py::arg("stream"), Unlocked())
      .def(
          "free", [](Heap& self, Address address) { self.free(reinterpret_cast<void*>(address)); },
          py::arg("address"), Unlocked())
      .def(
          "record_stream",
          [](Heap& self, Address address, Stream stream) {
            self.record_stream(reinterpret_cast<void*>(address), stream);
          },
          py::arg("address"), py::arg("stream"), Unlocked())
      .def_property_readonly("live_bytes", &Heap::live_bytes)
      .def("stats", &stats_of)
      .def("reset_peak", &Heap::reset_peak, Unlocked())
      .def("reset_accumulated", &Heap::reset_accumulated, Unlocked())
      .def("segments", &segments_of, py::arg("pool") = PoolNumbers())
      .def("largest_free", &Heap::largest_free, py::arg("stream"), Unlocked())
      .def("empty_cache", &Heap::empty_cache, Unlocked())
      .def("wait_for_streams", &Heap::wait_for_streams, Unlocked())
      .def_property("limit", &Heap::limit, &Heap::set_limit)
      .def(
          "create_pool", [](Heap& self, PoolNumbers pool) { self.create_pool(pool_of(pool)); },
          py::arg("pool"), Unlocked())
      .def(
          "begin_pool",
          [](Heap& self, PoolNumbers pool, std::set<Stream> streams) {
            self.begin_pool(pool_of(pool), [streams](Stream stream) { return streams.count(stream) != 0; });
          },
          py::arg("pool"), py::arg("streams"), Unlocked())
      .def(
          "end_pool", [](Heap& self, PoolNumbers pool) { self.end_pool(pool_of(pool)); }, py::arg("pool"),
          Unlocked())
      .def(
          "release_pool", [](Heap& self, PoolNumbers pool) { self.release_pool(pool_of(pool)); },
          py::arg("pool"), Unlocked())
      .def(
          "pool_uses", [](Heap& self, PoolNumbers pool) { return self.pool_uses(pool_of(pool)); },
          py::arg("pool"), Unlocked())
      .def(
          "share",
          [](const std::shared_ptr<Heap>& self, Address address) {
            SharedBlock shared;
            {
              const NoGil unlocked;
              shared = ipc::share(self, reinterpret_cast<void*>(address));
            }
            return py::make_tuple(py::bytes(shared.handle), shared.offset);
          },
          py::arg("address"))
      .def(
          "open_shared",
          [](Heap& self, const std::string& handle) {
            return std::unique_ptr<SharedMemory>(new SharedMemory{ipc::open(*self.device(), handle)});
          },
          py::arg("handle"), Unlocked())
      .def(
          "allow_peer",
          [](Heap& self, int ordinal) {
            if (self.allow_peer(ordinal)) ipc::allow_again(*self.device());
          },
          py::arg("ordinal"), Unlocked())
      .def("put_away", &Heap::put_away, Unlocked())
      .def(
          "bring_back",
          [](Heap& self, Stream stream, double timeout) { self.bring_back(stream, deadline_in(timeout)); },
          py::arg("stream"), py::arg("timeout"), Unlocked())
      .def(
          "export",
          [](const std::shared_ptr<Heap>& self, Address address, size_t bytes) {
            if (!self->contains(reinterpret_cast<void*>(address)))
              throw Error(Kind::kInvalid, self->name() + " are not at " + std::to_string(address));
            return export_bytes(address, bytes, self->device()->backend->capabilities(), self);
          },
          py::arg("address"), py::arg("bytes"))
      .def("live_in", &live_in, py::arg("pool"), Unlocked())
      .def("restore", &restore, py::arg("pool"), py::arg("checkpoint"), Unlocked())
      .def("close", &Heap::retire, Unlocked());
  py::class_<SharedMemory>(module, "SharedMemory")
      .def_property_readonly(
          "address", [](const SharedMemory& self) { return reinterpret_cast<Address>(self.memory.get()); })
      .def("close", &SharedMemory::close);
  py::class_<Recorder>(module, "MallocRecorder")
      .def(py::init<std::shared_ptr<Heap>>(), py::arg("allocator"))
      .def("take", &Recorder::take);
  module.def("bench_malloc", &bench_malloc, py::arg("allocator"), py::arg("bytes"), py::arg("stream"),
             py::arg("pairs"), py::arg("threads"), Unlocked());
  module.def(
      "allow_peer", [](int device, int peer) { malloc_directory().allow_peer(device, peer); },
      py::arg("device"), py::arg("peer"), Unlocked());
  module.def("exchange_scope", &exchange_scope, py::arg("allocator").none(true));
  module.def("set_device_default", &set_device_default, py::arg("device"), py::arg("allocator").none(true));
  module.def("malloc_directory", [] {
    return py::capsule(static_cast<const void*>(&malloc_directory()), TEM_MALLOC_DIRECTORY_NAME);
  });
  module.def("host_api",
             [] { return py::capsule(static_cast<const void*>(&host_api()), TEM_HOST_API_NAME); });
}

}  // namespace tem
