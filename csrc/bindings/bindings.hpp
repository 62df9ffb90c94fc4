// What the files of this folder share. The only folder that knows Python; below it nobody holds the GIL.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arena/arena.hpp"
#include "kv/block_range.hpp"

namespace tem {

namespace py = pybind11;

void bind_errors(py::module_& module);
void bind_ledger(py::module_& module);
void bind_arena(py::module_& module);
void bind_kv(py::module_& module);
void bind_allocator(py::module_& module);
void bind_shared(py::module_& module);
void bind_broker(py::module_& module);

/// Error{kInvalid} if there is none of that name.
Rung rung_from(const std::string& name);
int send_extents(BlockRange& range, int socket, const std::string& message, size_t first, size_t count);

/// Lets the GIL go for the core's work. In an interpreter that is going down, a thread that asks for the GIL
/// is ended by unwinding (PyEval_RestoreThread, before 3.14), which C++ frames turn into an abort: such a
/// thread sleeps instead.
class NoGil {
 public:
  NoGil() : state_(PyEval_SaveThread()) {}
  NoGil(const NoGil&) = delete;
  NoGil& operator=(const NoGil&) = delete;
  ~NoGil() {
    while (finalizing()) pause();
    PyEval_RestoreThread(state_);
  }

  static bool finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
    return Py_IsFinalizing() != 0;
#else
    return _Py_IsFinalizing() != 0;
#endif
  }

 private:
  PyThreadState* state_;
};

/// What `py::init` takes for an object that `make` makes without the GIL. A call guard would let it go for
/// pybind11's own entry of the object as well, into a table that nothing but the GIL guards.
template <class Made, class... Given>
auto init_unlocked(Made (*make)(Given...)) {
  return py::init([make](Given... given) {
    const NoGil unlocked;
    return make(std::forward<Given>(given)...);
  });
}

/// An account of an open arena, as Python holds it.
struct AccountHandle {
  std::shared_ptr<Arena> arena;
  AccountId id;
};

/// Limits as Python gives them: None where nothing limits.
inline Limits limits_from(int64_t value, size_t min, size_t low, std::optional<size_t> high,
                          std::optional<size_t> max, double weight) {
  return {value, min, low, high.value_or(kUnlimited), max.value_or(kUnlimited), weight};
}

/// Block numbers from a list, a tuple, a range or any sequence or iterable of integers (numpy's and torch's
/// included). A range() that reaches beyond `num_blocks` is refused before its numbers are made.
std::vector<Block> blocks_from(py::handle blocks, size_t num_blocks);

}  // namespace tem
