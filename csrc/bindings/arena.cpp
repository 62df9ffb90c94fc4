#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>

#include "arena/growth.hpp"
#include "bindings/bindings.hpp"
#include "client/client.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {
namespace {

using Unlocked = py::call_guard<NoGil>;

Rung reclaimer_rung(const std::string& name) {
  for (const Rung rung : {Rung::kEvict, Rung::kSpill, Rung::kShrink, Rung::kPause}) {
    if (name == rung_name(rung)) return rung;
  }
  throw Error(Kind::kInvalid,
              "unknown rung '" + name + "'; a reclaimer is one of evict, spill, shrink, pause");
}

std::optional<size_t> bounded(size_t limit) {
  return limit == kUnlimited ? std::nullopt : std::optional<size_t>(limit);
}

/// A Python callable as a reclaimer: takes the GIL to run it and to let it go. What it raises is reported
/// where unraisable exceptions go, because its caller is another account's demand.
ReclaimFn reclaim_fn(py::function function) {
  const std::shared_ptr<py::function> held(new py::function(std::move(function)), [](py::function* owned) {
    // An interpreter that goes down takes its objects along, and lets no other thread have the GIL.
    if (NoGil::finalizing()) return;
    const py::gil_scoped_acquire gil;
    delete owned;
  });
  return [held](size_t bytes, Deadline deadline) {
    // A demand of another process may come while the interpreter goes down, and ends this thread then.
    if (NoGil::finalizing()) return;
    const py::gil_scoped_acquire gil;
    try {
      (*held)(bytes, std::max(0.0, seconds_until(deadline)));
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable(*held);
    }
  };
}

py::dict dict_of(const AccountState& account) {
  py::dict out;
  out["name"] = account.holding.name;
  out["value"] = account.holding.limits.value;
  out["priority"] = account.priority;
  out["held"] = account.holding.held;
  out["lease"] = bounded(account.holding.lease);
  out["idle"] = account.idle.ready + account.idle.pending;
  out["pending"] = account.idle.pending;
  out["min"] = account.holding.limits.min;
  out["low"] = account.holding.limits.low;
  out["high"] = bounded(account.holding.limits.high);
  out["max"] = bounded(account.holding.limits.max);
  out["weight"] = account.holding.limits.weight;
  out["given"] = account.given;
  out["taken"] = account.taken;
  out["yields"] = account.yields;
  out["denied"] = account.denied;
  return out;
}

py::dict dict_of(const ArenaState& state) {
  py::dict out;
  out["capacity"] = state.capacity;
  out["leased"] = state.leased;
  out["free"] = state.free;
  out["reserve_low"] = state.reserve_low;
  out["reserve_high"] = state.reserve_high;
  out["spare"] = state.spare;
  out["created"] = state.created;
  out["lost"] = state.lost;
  out["faults"] = state.faults;
  out["last_fault"] = state.last_fault;
  py::list accounts;
  for (const AccountState& account : state.accounts) accounts.append(dict_of(account));
  out["accounts"] = accounts;
  return out;
}

py::dict dict_of(const Yield& yield) {
  py::dict out;
  out["seq"] = yield.seq;
  out["start_ns"] = yield.start_ns;
  out["duration_ns"] = yield.duration_ns;
  out["demander"] = yield.demander;
  out["victim"] = yield.victim;
  out["rung"] = rung_name(yield.rung);
  out["asked"] = yield.asked;
  out["given"] = yield.given;
  return out;
}

}  // namespace

Rung rung_from(const std::string& name) {
  for (const Rung rung : {Rung::kTrim, Rung::kEvict, Rung::kSpill, Rung::kShrink, Rung::kPause}) {
    if (name == rung_name(rung)) return rung;
  }
  throw Error(Kind::kInvalid, "unknown rung '" + name + "'; the rungs are trim, evict, spill, shrink, pause");
}

void bind_arena(py::module_& module) {
  py::class_<Backend, std::shared_ptr<Backend>>(module, "Backend")
      .def_property_readonly("name", [](const Backend& self) { return self.capabilities().backend; })
      .def_property_readonly("device_name", [](const Backend& self) { return self.capabilities().device; })
      .def_property_readonly("uuid", [](const Backend& self) { return self.capabilities().uuid; })
      .def_property_readonly("ordinal", [](const Backend& self) { return self.capabilities().ordinal; })
      .def_property_readonly("granularity",
                             [](const Backend& self) { return self.capabilities().granularity; })
      .def("memory_info", [](Backend& self) {
        const MemoryInfo info = self.memory_info();
        return std::make_pair(info.free, info.total);
      });
  module.def("host_backend", &make_host_backend, py::arg("capacity"), Unlocked());
  module.def("cuda_backend", &make_cuda_backend, py::arg("ordinal"), py::arg("library"), Unlocked());
  module.def("host_stream_create", &host_stream_create);
  module.def("host_stream_submit", &host_stream_submit);
  module.def("host_stream_complete", &host_stream_complete, py::arg("stream"), py::arg("count") = UINT64_MAX);
  module.def("host_stream_destroy", &host_stream_destroy);
  module.attr("MAX_EXTENT") = kMaxExtent;

  py::class_<AccountHandle>(module, "Account")
      .def_property_readonly("held",
                             [](AccountHandle& self) {
                               const NoGil unlocked;
                               return self.arena->account(self.id).held;
                             })
      .def(
          "room", [](AccountHandle& self) { return self.arena->room(self.id); }, Unlocked())
      .def(
          "wait",
          [](AccountHandle& self, size_t bytes, double timeout) {
            // Waits in slices, so that a signal can end a long one.
            const Deadline deadline = deadline_in(timeout);
            for (;;) {
              bool reached = false;
              {
                const NoGil unlocked;
                reached = self.arena->wait_for_room(self.id, bytes, std::min(deadline, deadline_in(0.1)));
              }
              if (PyErr_CheckSignals() != 0) throw py::error_already_set();
              if (reached) return true;
              if (Clock::now() >= deadline) return false;
            }
          },
          py::arg("bytes"), py::arg("timeout"))
      .def(
          "reserve",
          [](AccountHandle& self, size_t bytes, double timeout, const std::string& rung,
             const std::string& group, uint32_t members, uint64_t round) {
            const Group together{group, members, round};
            self.arena->reserve(self.id, bytes, deadline_in(timeout), rung_from(rung),
                                group.empty() ? nullptr : &together);
          },
          py::arg("bytes"), py::arg("timeout"), py::arg("rung"), py::arg("group"), py::arg("members"),
          py::arg("round"), Unlocked())
      .def(
          "unreserve", [](AccountHandle& self) { return self.arena->unreserve(self.id); }, Unlocked())
      .def("limits",
           [](AccountHandle& self) {
             Limits limits;
             std::string priority;
             {
               const NoGil unlocked;
               limits = self.arena->account(self.id).limits;
               priority = self.arena->priority(self.id);
             }
             py::dict out;
             out["name"] = priority;
             out["value"] = limits.value;
             out["min"] = limits.min;
             out["low"] = limits.low;
             out["high"] = bounded(limits.high);
             out["max"] = bounded(limits.max);
             out["weight"] = limits.weight;
             return out;
           })
      .def(
          "note_blocks",
          [](AccountHandle& self, uint32_t in_use, uint32_t cached, uint32_t free, uint32_t parked) {
            self.arena->note_blocks(self.id, {in_use, cached, free, parked});
          },
          py::arg("in_use"), py::arg("cached"), py::arg("free"), py::arg("parked"), Unlocked())
      .def(
          "trim", [](AccountHandle& self) { return self.arena->trim(self.id); }, Unlocked())
      .def(
          "close", [](AccountHandle& self) { self.arena->close_account(self.id); }, Unlocked())
      .def(
          "set_limits",
          [](AccountHandle& self, int64_t value, size_t min, size_t low, std::optional<size_t> high,
             std::optional<size_t> max, double weight, double timeout) {
            return self.arena->set_limits(self.id, limits_from(value, min, low, high, max, weight),
                                          deadline_in(timeout));
          },
          py::arg("value"), py::arg("min"), py::arg("low"), py::arg("high"), py::arg("max"),
          py::arg("weight"), py::arg("timeout"), Unlocked())
      .def(
          "add_reclaimer",
          [](AccountHandle& self, const std::string& rung, py::function function) {
            const Rung checked = reclaimer_rung(rung);
            ReclaimFn fn = reclaim_fn(std::move(function));
            const NoGil unlocked;
            return self.arena->add_reclaimer(self.id, checked, std::move(fn));
          },
          py::arg("rung"), py::arg("function"))
      .def(
          "remove_reclaimer",
          [](AccountHandle& self, uint64_t number) { self.arena->remove_reclaimer(number); }, Unlocked());

  py::class_<client::Client, std::shared_ptr<client::Client>>(module, "Broker")
      .def(init_unlocked(+[](const std::string& path, const std::string& device, const std::string& backend,
                             const std::string& label, const std::string& process, size_t total,
                             size_t granularity, double timeout) {
             return client::Client::connect(path, {device, backend, label, process, total, granularity},
                                            deadline_in(timeout));
           }),
           py::arg("path"), py::arg("device"), py::arg("backend"), py::arg("label"), py::arg("process"),
           py::arg("total"), py::arg("granularity"), py::arg("timeout"))
      .def_property_readonly("path", &client::Client::path)
      .def_property_readonly("connected", &client::Client::connected)
      .def_property_readonly("capacity", &client::Client::capacity);
  py::class_<Arena, std::shared_ptr<Arena>>(module, "Arena")
      .def(init_unlocked(+[](std::shared_ptr<Backend> backend, size_t capacity, size_t low, size_t high) {
             return Arena::open(std::move(backend), {capacity, low, high});
           }),
           py::arg("backend"), py::arg("capacity"), py::arg("reserve_low"), py::arg("reserve_high"))
      .def_static(
          "under",
          [](std::shared_ptr<Backend> backend, const std::shared_ptr<client::Client>& broker) {
            const size_t total = backend->memory_info().total;
            auto arena = Arena::open(std::move(backend), {total, 0, 0}, broker);
            broker->start(arena);
            return arena;
          },
          py::arg("backend"), py::arg("broker"), Unlocked())
      .def(
          "open_account",
          [](const std::shared_ptr<Arena>& self, const std::string& name, const std::string& priority,
             int64_t value, size_t min, size_t low, std::optional<size_t> high, std::optional<size_t> max,
             double weight) {
            const Limits limits = limits_from(value, min, low, high, max, weight);
            return AccountHandle{self, self->open_account(name, priority, limits)};
          },
          py::arg("name"), py::arg("priority"), py::arg("value"), py::arg("min"), py::arg("low"),
          py::arg("high"), py::arg("max"), py::arg("weight"), Unlocked())
      .def(
          "set_capacity",
          [](Arena& self, size_t capacity, size_t low, size_t high, double timeout) {
            return self.set_capacity({capacity, low, high}, deadline_in(timeout));
          },
          py::arg("capacity"), py::arg("reserve_low"), py::arg("reserve_high"), py::arg("timeout"),
          Unlocked())
      .def("collect", &Arena::collect, Unlocked())
      .def("refill", &Arena::refill, Unlocked())
      .def("close", &Arena::close, Unlocked())
      .def("state",
           [](Arena& self) {
             ArenaState state;
             {
               const NoGil unlocked;
               state = self.state();
             }
             return dict_of(state);
           })
      .def(
          "yields",
          [](Arena& self, uint64_t since) {
            std::vector<Yield> yields;
            {
              const NoGil unlocked;
              yields = self.yields(since);
            }
            py::list out;
            for (const Yield& yield : yields) out.append(dict_of(yield));
            return out;
          },
          py::arg("since"));
}

}  // namespace tem
