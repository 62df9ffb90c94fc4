#include <utility>

#include "bindings/bindings.hpp"
#include "capi/scope.hpp"

namespace tem {
namespace {

using Unlocked = py::call_guard<NoGil>;

}  // namespace

void bind_allocator(py::module_& module) {
  py::class_<Allocator, std::shared_ptr<Allocator>>(module, "Allocator")
      .def(py::init([](AccountHandle& account, const std::string& name) {
             return Allocator::make(account.arena, account.id, name);
           }),
           py::arg("account"), py::arg("name"), Unlocked())
      .def(
          "allocate",
          [](Allocator& self, size_t bytes, Stream stream) {
            return reinterpret_cast<Address>(self.allocate(bytes, stream));
          },
          py::arg("bytes"), py::arg("stream"), Unlocked())
      .def(
          "free", [](Allocator& self, Address address) { self.free(reinterpret_cast<void*>(address)); },
          py::arg("address"), Unlocked())
      .def(
          "record_stream",
          [](Allocator& self, Address address, Stream stream) {
            self.record_stream(reinterpret_cast<void*>(address), stream);
          },
          py::arg("address"), py::arg("stream"), Unlocked())
      .def_property_readonly("live_bytes", &Allocator::live_bytes)
      .def("close", &Allocator::retire, Unlocked());
  module.def("exchange_scope", &exchange_scope, py::arg("allocator").none(true));
  module.def("set_device_default", &set_device_default, py::arg("device"), py::arg("allocator").none(true));
  module.def("host_api",
             [] { return py::capsule(static_cast<const void*>(&host_api()), TEM_HOST_API_NAME); });
}

}  // namespace tem
