#include "bindings/bindings.hpp"
#include "core/error.hpp"

namespace tem {
namespace {

const char* class_name(Kind kind) {
  switch (kind) {
    case Kind::kInvalid:
      return "InvalidArgument";
    case Kind::kOutOfMemory:
      return "OutOfMemory";
    case Kind::kAdmission:
      return "AdmissionError";
    case Kind::kDriver:
      return "DriverError";
    case Kind::kDriverMissing:
      return "DriverMissing";
    case Kind::kClosed:
      return "ClosedError";
    case Kind::kInUse:
      return "InUseError";
    case Kind::kForked:
      return "ForkedError";
    case Kind::kBlock:
      return "BlockError";
    case Kind::kBroker:
      return "BrokerError";
  }
  return "TemError";
}

void raise(const Error& error) {
  const py::object type = py::module_::import("torch_elastic_mem.errors").attr(class_name(error.kind()));
  const bool has_code = error.kind() == Kind::kDriver || error.kind() == Kind::kDriverMissing;
  const py::object value = has_code ? type(error.what(), error.code()) : type(error.what());
  PyErr_SetObject(type.ptr(), value.ptr());
}

}  // namespace

void bind_errors(py::module_&) {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Error& error) {
      raise(error);
    }
  });
}

}  // namespace tem
