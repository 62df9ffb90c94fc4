#include <utility>

#include "bindings/bindings.hpp"
#include "capi/scope.hpp"

namespace tem {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

}  // namespace

void bind_allocator(py::module_& module) {
  py::class_<Allocator, std::shared_ptr<Allocator>>(module, "Allocator")
      .def(py::init([](AccountHandle& account, const std::string& name) {
             return Allocator::make(account.arena, account.id, name);
           }),
           py::arg("account"), py::arg("name"), NoGil())
      .def_property_readonly("live_bytes", &Allocator::live_bytes)
      .def("close", &Allocator::retire, NoGil());
  module.def("exchange_scope", &exchange_scope, py::arg("allocator").none(true));
  module.def("set_device_default", &set_device_default, py::arg("device"), py::arg("allocator").none(true));
  module.def("host_api",
             [] { return py::capsule(static_cast<const void*>(&host_api()), TEM_HOST_API_NAME); });
}

}  // namespace tem
