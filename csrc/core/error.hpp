// The one channel for failure below the bindings: core code throws tem::Error,
// csrc/bindings turns its kind into a class of torch_elastic_mem.errors, and
// csrc/capi turns it into what a C caller understands.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace tem {

enum class Kind {
  kInvalid,        // an argument that can never be right
  kOutOfMemory,    // refused by the ledger, or by the driver after a grant
  kAdmission,      // a `min` that does not fit
  kDriver,         // the driver answered with an error; `code` is its number
  kDriverMissing,  // no libcuda, or one too old, or a device without VMM
  kClosed,         // used after close
  kInUse,          // closed while something still lives in it
  kForked,         // used in a child of fork()
  kBlock,          // a KV block out of range, or released while not held
  kBroker,         // no broker, one that does not answer, or one that does not permit it
};

class Error : public std::runtime_error {
 public:
  Error(Kind kind, std::string message, int code = 0)
      : std::runtime_error(std::move(message)), kind_(kind), code_(code) {}

  Kind kind() const noexcept { return kind_; }
  /// The driver's error number for kDriver, else 0.
  int code() const noexcept { return code_; }

 private:
  Kind kind_;
  int code_;
};

}  // namespace tem
