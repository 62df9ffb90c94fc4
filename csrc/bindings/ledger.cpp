#include "ledger/ledger.hpp"

#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "bindings/bindings.hpp"

namespace tem {
namespace {

py::list list_of(const std::vector<Ask>& asks) {
  py::list out;
  for (const Ask& ask : asks) out.append(py::make_tuple(ask.victim, ask.bytes));
  return out;
}

const std::map<AccountId, size_t>* pointer(const std::optional<std::map<AccountId, size_t>>& bytes) {
  return bytes ? &*bytes : nullptr;
}

}  // namespace

/// The ledger by itself, for whoever arbitrates outside an arena. Not thread-safe: the caller brings the
/// lock.
void bind_ledger(py::module_& module) {
  py::class_<Limits>(module, "Limits")
      .def(py::init([](int64_t value, size_t min, size_t low, std::optional<size_t> high,
                       std::optional<size_t> max,
                       double weight) { return limits_from(value, min, low, high, max, weight); }),
           py::arg("value"), py::arg("min") = 0, py::arg("low") = 0, py::arg("high") = py::none(),
           py::arg("max") = py::none(), py::arg("weight") = 1.0);
  py::class_<Ledger, std::shared_ptr<Ledger>>(module, "Ledger")
      .def(py::init<size_t, size_t>(), py::arg("capacity"), py::arg("reserve") = 0)
      .def("open", &Ledger::open, py::arg("name"), py::arg("limits"))
      .def("close", &Ledger::close, py::arg("account"))
      .def("set_limits", &Ledger::set_limits, py::arg("account"), py::arg("limits"))
      .def("set_capacity", &Ledger::set_capacity, py::arg("capacity"), py::arg("reserve"))
      .def(
          "held", [](const Ledger& self, AccountId id) { return self.at(id).held; }, py::arg("account"))
      .def("holds_below", &Ledger::holds_below, py::arg("value"))
      .def("room", &Ledger::room, py::arg("account"))
      .def("grant", &Ledger::grant, py::arg("account"), py::arg("bytes"))
      .def("give_back", &Ledger::give_back, py::arg("account"), py::arg("bytes"))
      .def("charge", &Ledger::charge, py::arg("account"), py::arg("bytes"))
      .def("enqueue", &Ledger::enqueue, py::arg("account"), py::arg("bytes"))
      .def("shortage", &Ledger::shortage, py::arg("ticket"))
      .def("grant_ticket", &Ledger::grant_ticket, py::arg("ticket"))
      .def("withdraw", &Ledger::withdraw, py::arg("ticket"))
      .def("may_pause", &Ledger::may_pause, py::arg("demander"), py::arg("victim"))
      .def(
          "plan",
          [](const Ledger& self, AccountId id, size_t bytes, const std::optional<Givable>& givable,
             const std::optional<Asked>& asked) {
            return list_of(self.plan(id, bytes, pointer(givable), pointer(asked)));
          },
          py::arg("account"), py::arg("bytes"), py::arg("givable") = py::none(),
          py::arg("asked") = py::none())
      .def(
          "plan_shrink",
          [](const Ledger& self, size_t bytes, const std::optional<Givable>& givable,
             const std::optional<Asked>& asked) {
            return list_of(self.plan_shrink(bytes, pointer(givable), pointer(asked)));
          },
          py::arg("bytes"), py::arg("givable") = py::none(), py::arg("asked") = py::none())
      .def("holders", &Ledger::holders)
      .def_property_readonly("capacity", &Ledger::capacity)
      .def_property_readonly("leasable", &Ledger::leasable)
      .def_property_readonly("leased", &Ledger::leased)
      .def_property_readonly("free", &Ledger::free)
      .def_property_readonly("overdrawn", &Ledger::overdrawn);
}

}  // namespace tem
