#include <fcntl.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda_abi.hpp"
#include "bindings/bindings.hpp"
#include "bindings/export.hpp"
#include "core/error.hpp"
#include "core/fd_message.hpp"
#include "ipc/attached.hpp"

namespace tem {
namespace {

using Unlocked = py::call_guard<NoGil>;

/// The end of the last owner may wait for work on the device; a tensor's comes with the GIL held, or without.
void let_go(ipc::Attached* memory) {
  if (PyGILState_Check() == 0 || NoGil::finalizing()) {
    delete memory;
    return;
  }
  const NoGil unlocked;
  delete memory;
}

Fd copy_of(int descriptor) {
  Fd copy(::fcntl(descriptor, F_DUPFD_CLOEXEC, 0));
  if (!copy) {
    throw Error(Kind::kDriver, std::string("no more descriptors: ") + std::strerror(errno),
                cuda::kOperatingSystem);
  }
  return copy;
}

}  // namespace

/// Sends a message with descriptors of a range's extents; returns the system's number of an error, or 0.
int send_extents(BlockRange& range, int socket, const std::string& message, size_t first, size_t count) {
  const Fd copy = copy_of(socket);
  const std::vector<Fd> fds = range.export_fds(first, count, Access::kRead);
  return send_message(copy.get(), message.data(), message.size(), fds);
}

void bind_shared(py::module_& module) {
  using ipc::Attached;
  py::class_<Attached, std::shared_ptr<Attached>>(module, "Attached")
      .def(init_unlocked(+[](std::shared_ptr<Backend> backend, std::vector<size_t> extents) {
             return std::shared_ptr<Attached>(new Attached(std::move(backend), std::move(extents)), let_go);
           }),
           py::arg("backend"), py::arg("extents"))
      .def(
          "receive",
          [](Attached& self, int socket, double timeout) {
            std::string message;
            {
              const NoGil unlocked;
              message = self.receive(copy_of(socket), deadline_in(timeout));
            }
            return py::bytes(message);
          },
          py::arg("socket"), py::arg("timeout"))
      .def("open", &Attached::open, Unlocked())
      .def(
          "farewell",
          [](Attached& self, int socket, const std::string& message) {
            self.set_farewell(copy_of(socket), message);
          },
          py::arg("socket"), py::arg("message"))
      .def(
          "export",
          [](const std::shared_ptr<Attached>& self, size_t offset, size_t bytes) {
            if (offset > self->bytes() || bytes > self->bytes() - offset) {
              throw Error(Kind::kInvalid, std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                                              " are not within " + std::to_string(self->bytes()));
            }
            return export_bytes(self->base() + offset, bytes, self->device(), self);
          },
          py::arg("offset"), py::arg("bytes"))
      .def_property_readonly("address", &Attached::base)
      .def_property_readonly("bytes", &Attached::bytes)
      .def_property_readonly("mapped", &Attached::mapped)
      .def_property_readonly("read_only", &Attached::read_only);
}

}  // namespace tem
