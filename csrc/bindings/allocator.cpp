#include <chrono>
#include <thread>
#include <utility>
#include <vector>

#include "bindings/bindings.hpp"
#include "capi/scope.hpp"

namespace tem {
namespace {

using Unlocked = py::call_guard<NoGil>;

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

}  // namespace

void bind_allocator(py::module_& module) {
  py::class_<Heap, std::shared_ptr<Heap>>(module, "Allocator")
      .def(py::init([](AccountHandle& account, const std::string& name) {
             return Heap::make(account.arena, account.id, name);
           }),
           py::arg("account"), py::arg("name"), Unlocked())
      .def(
          "allocate",
          [](Heap& self, size_t bytes, Stream stream) {
            return reinterpret_cast<Address>(self.allocate(bytes, stream));
          },
          py::arg("bytes"), py::arg("stream"), Unlocked())
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
      .def("close", &Heap::retire, Unlocked());
  module.def("bench_malloc", &bench_malloc, py::arg("allocator"), py::arg("bytes"), py::arg("stream"),
             py::arg("pairs"), py::arg("threads"), Unlocked());
  module.def("exchange_scope", &exchange_scope, py::arg("allocator").none(true));
  module.def("set_device_default", &set_device_default, py::arg("device"), py::arg("allocator").none(true));
  module.def("malloc_directory", [] {
    return py::capsule(static_cast<const void*>(&malloc_directory()), TEM_MALLOC_DIRECTORY_NAME);
  });
  module.def("host_api",
             [] { return py::capsule(static_cast<const void*>(&host_api()), TEM_HOST_API_NAME); });
}

}  // namespace tem
