#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <utility>

#include "bindings/bindings.hpp"
#include "broker/teller.hpp"
#include "core/fd_table.hpp"
#include "ledger/till.hpp"

namespace tem {
namespace {

/// The message, and its descriptors, which are the caller's to close.
py::tuple message_of(broker::Teller::Letter& letter) {
  py::list descriptors;
  for (Fd& each : letter.descriptors) descriptors.append(each.release());
  return py::make_tuple(py::bytes(letter.message.data(), letter.message.size()), std::move(descriptors));
}

py::tuple tuple_of(const Till::Notes& notes) {
  py::list grants, reports;
  for (const Till::Grant& each : notes.grants)
    grants.append(py::make_tuple(each.account, each.bytes, each.at));
  for (const auto& [account, each] : notes.reports)
    reports.append(py::make_tuple(account, each.rungs, each.held, each.idle, each.blocks[0], each.blocks[1],
                                  each.blocks[2], each.blocks[3]));
  return py::make_tuple(grants, reports);
}

/// The teller, until close(). It never takes the GIL, so to wait for it with the GIL is no deadlock, and
/// short.
class TellerHandle {
 public:
  broker::Teller& operator*() const {
    if (!teller_) throw Error(Kind::kClosed, "the teller has been closed");
    return *teller_;
  }
  broker::Teller* operator->() const { return &**this; }
  void close() { teller_.reset(); }

 private:
  std::unique_ptr<broker::Teller> teller_ = std::make_unique<broker::Teller>();
};

}  // namespace

/// The broker's. A till is its teller's too: it is touched in the books' turn alone.
void bind_broker(py::module_& module) {
  py::class_<Till, std::shared_ptr<Till>>(module, "Till")
      .def(py::init<std::shared_ptr<Ledger>>(), py::arg("ledger"))
      .def("open", &Till::open, py::arg("spare"))
      .def("close", &Till::close)
      .def("admit", &Till::admit, py::arg("account"), py::arg("session"), py::arg("step"))
      .def("dismiss", &Till::dismiss, py::arg("account"))
      .def(
          "grant",
          [](Till& self, uint64_t session, AccountId account, size_t bytes, size_t want,
             int64_t now) -> py::object {
            const auto granted = self.grant(session, account, bytes, want, now);
            return granted ? py::object(py::int_(*granted)) : py::none();
          },
          py::arg("session"), py::arg("account"), py::arg("bytes"), py::arg("want"), py::arg("now"))
      .def("undo", &Till::undo)
      .def("take_back", &Till::take_back, py::arg("session"), py::arg("account"), py::arg("bytes"))
      .def(
          "report",
          [](Till& self, uint64_t session, AccountId account, uint32_t rungs, size_t held, size_t idle,
             const std::array<uint32_t, 4>& blocks) {
            return self.report(session, account, {rungs, held, idle, blocks});
          },
          py::arg("session"), py::arg("account"), py::arg("rungs"), py::arg("held"), py::arg("idle"),
          py::arg("blocks"))
      .def("take_notes", [](Till& self) { return tuple_of(self.take_notes()); });
  py::class_<TellerHandle>(module, "Teller")
      .def(py::init<>())
      .def_property_readonly("descriptor", [](const TellerHandle& self) { return self->descriptor(); })
      .def("begin_turn", [](TellerHandle& self) { self->begin_turn(); })
      .def("end_turn", [](TellerHandle& self) { self->end_turn(); })
      .def(
          "add", [](TellerHandle& self, uint64_t number, int socket) { self->add(number, socket); },
          py::arg("number"), py::arg("socket"))
      .def(
          "seat",
          [](TellerHandle& self, uint64_t number, std::shared_ptr<Till> till, uint64_t session) {
            self->seat(number, std::move(till), session);
          },
          py::arg("number"), py::arg("till"), py::arg("session"))
      .def(
          "mute", [](TellerHandle& self, uint64_t number, bool muted) { self->mute(number, muted); },
          py::arg("number"), py::arg("muted"))
      .def(
          "resume", [](TellerHandle& self, uint64_t number) { self->resume(number); }, py::arg("number"))
      .def(
          "remove",
          [](TellerHandle& self, uint64_t number) -> py::object {
            auto letter = self->remove(number);
            return letter ? py::object(message_of(*letter)) : py::none();
          },
          py::arg("number"))
      .def("take",
           [](TellerHandle& self) -> py::object {
             auto letter = self->take();
             return letter ? py::object(py::make_tuple(letter->number, message_of(*letter))) : py::none();
           })
      .def("close", &TellerHandle::close);
  module.def("widen_descriptor_table", &widen_descriptor_table, py::arg("descriptors"));
}

}  // namespace tem
