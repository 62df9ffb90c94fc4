#include <pybind11/stl.h>

#include <atomic>
#include <string>
#include <utility>

#include "bindings/bindings.hpp"
#include "bindings/export.hpp"
#include "core/error.hpp"
#include "kv/block_pool.hpp"

namespace tem {
namespace {

using Unlocked = py::call_guard<NoGil>;

/// A block range as Python and the tensors over it hold it: the last one to go retires it.
struct RangeHandle {
  std::shared_ptr<BlockRange> range;
  std::atomic<size_t> exports{0};

  explicit RangeHandle(std::shared_ptr<BlockRange> the_range) : range(std::move(the_range)) {}
  RangeHandle(const RangeHandle&) = delete;
  RangeHandle& operator=(const RangeHandle&) = delete;
  ~RangeHandle() {
    try {
      range->retire();
    } catch (const Error&) {
      // Without a fence nothing may be unmapped: the range keeps its memory, and the account shows it.
    }
  }

  void close() {
    if (exports != 0) {
      throw Error(Kind::kInUse, range->name() + " still has " + std::to_string(exports) +
                                    " tensors over it; delete them and their views first");
    }
    range->retire();
  }
};

/// One stripe as bytes, without a copy.
py::capsule export_stripe(const std::shared_ptr<RangeHandle>& handle, size_t stripe) {
  BlockRange& range = *handle->range;
  const Geometry& geometry = range.geometry();
  ++handle->exports;
  const std::shared_ptr<void> owner(handle.get(), [handle](void*) { --handle->exports; });
  return export_bytes(range.base(stripe), geometry.num_blocks * geometry.block_bytes, range.arena()->device(),
                      owner);
}

double bench_ensure(RangeHandle& self, const std::vector<Block>& blocks, size_t iterations) {
  const auto start = Clock::now();
  for (size_t i = 0; i < iterations; ++i) self.range->ensure(blocks, 0, Deadline::max());
  const auto taken = std::chrono::duration<double, std::nano>(Clock::now() - start);
  return taken.count() / static_cast<double>(iterations);
}

/// A block number from an integer: Python's, or numpy's and torch's, which are numbers by __index__.
Block block_from(PyObject* item) {
  if (PyLong_CheckExact(item) != 0) {
    const Block block = PyLong_AsLongLong(item);
    if (block != -1 || PyErr_Occurred() == nullptr) return block;
    PyErr_Clear();
  }
  const auto kept = py::reinterpret_borrow<py::object>(item);
  const auto index =
      py::reinterpret_steal<py::object>(PyBool_Check(item) != 0 ? nullptr : PyNumber_Index(item));
  if (!index) {
    PyErr_Clear();
    throw Error(Kind::kInvalid, "block numbers are integers; got " + std::string(py::str(kept)) + " of " +
                                    Py_TYPE(item)->tp_name);
  }
  const Block block = PyLong_AsLongLong(index.ptr());
  if (block == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw Error(Kind::kBlock, "block " + std::string(py::str(index)) + " is out of range");
  }
  return block;
}

/// Python's range(), without making its numbers.
std::vector<Block> blocks_of_range(py::handle blocks, size_t num_blocks) {
  std::vector<Block> out;
  const Py_ssize_t size = PyObject_Size(blocks.ptr());
  if (size < 0 || static_cast<size_t>(size) > num_blocks) {
    PyErr_Clear();
    throw Error(Kind::kBlock, std::string(py::str(blocks)) + " goes out of range; there are " +
                                  std::to_string(num_blocks) + " blocks");
  }
  if (size == 0) return out;
  const Block first = block_from(py::object(blocks[py::int_(0)]).ptr());
  const Block last = block_from(py::object(blocks[py::int_(size - 1)]).ptr());
  for (const Block end : {first, last}) {
    if (end >= 0 && static_cast<size_t>(end) < num_blocks) continue;
    throw Error(Kind::kBlock, "block " + std::to_string(end) + " is out of range; there are " +
                                  std::to_string(num_blocks) + " blocks");
  }
  const Block step = size == 1 ? 0 : (last - first) / (size - 1);
  out.reserve(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) out.push_back(first + i * step);
  return out;
}

}  // namespace

std::vector<Block> blocks_from(py::handle blocks, size_t num_blocks) {
  if (PyRange_Check(blocks.ptr()) != 0) return blocks_of_range(blocks, num_blocks);
  std::vector<Block> out;
  // A list is walked without pybind11's caster: it is what engines pass on every step.
  if (PyList_CheckExact(blocks.ptr()) != 0) {
    out.reserve(static_cast<size_t>(PyList_GET_SIZE(blocks.ptr())));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(blocks.ptr()); ++i) {
      out.push_back(block_from(PyList_GET_ITEM(blocks.ptr(), i)));
    }
    return out;
  }
  // The elements of torch's masks are numbers by __index__.
  const py::object dtype = py::getattr(blocks, "dtype", py::none());
  if (std::string(py::str(dtype)).find("bool") != std::string::npos) {
    throw Error(Kind::kInvalid,
                "block numbers are integers; got a mask of dtype " + std::string(py::str(dtype)));
  }
  PyObject* const iterator = PyObject_GetIter(blocks.ptr());
  if (iterator == nullptr) {
    PyErr_Clear();
    throw Error(Kind::kInvalid,
                std::string("blocks are a sequence of integers; got ") + Py_TYPE(blocks.ptr())->tp_name);
  }
  for (const py::handle item : py::reinterpret_steal<py::iterator>(iterator)) {
    out.push_back(block_from(item.ptr()));
  }
  return out;
}

void bind_kv(py::module_& module) {
  py::class_<RangeHandle, std::shared_ptr<RangeHandle>>(module, "BlockRange")
      .def(init_unlocked(+[](AccountHandle& account, std::string name, size_t num_blocks, size_t block_bytes,
                             size_t stripes, size_t keep, size_t extent_bytes) {
             return std::make_shared<RangeHandle>(
                 BlockRange::make(account.arena, account.id, std::move(name),
                                  {num_blocks, block_bytes, stripes, keep, extent_bytes}));
           }),
           py::arg("account"), py::arg("name"), py::arg("num_blocks"), py::arg("block_bytes"),
           py::arg("stripes") = 1, py::arg("keep") = 0, py::arg("extent_bytes") = 0)
      .def(
          "ensure",
          [](RangeHandle& self, py::handle blocks, Stream stream, double timeout, const std::string& rung) {
            const std::vector<Block> numbers = blocks_from(blocks, self.range->geometry().num_blocks);
            const Rung dearest = rung_from(rung);
            const NoGil unlocked;
            self.range->ensure(numbers, stream, deadline_in(timeout), dearest);
          },
          py::arg("blocks"), py::arg("stream"), py::arg("timeout"), py::arg("rung") = "pause")
      .def(
          "release",
          [](RangeHandle& self, py::handle blocks, Stream stream) {
            const std::vector<Block> numbers = blocks_from(blocks, self.range->geometry().num_blocks);
            const NoGil unlocked;
            self.range->release(numbers, stream);
          },
          py::arg("blocks"), py::arg("stream"))
      .def(
          "resident", [](RangeHandle& self, Block block) { return self.range->resident(block); }, Unlocked())
      .def("held", [](RangeHandle& self, Block block) { return self.range->held(block); })
      .def("base", [](RangeHandle& self, size_t stripe) { return self.range->base(stripe); })
      .def("export_stripe", &export_stripe)
      .def(
          "extents", [](RangeHandle& self) { return self.range->extents(); }, Unlocked())
      .def(
          "send_extents",
          [](RangeHandle& self, int socket, const std::string& message, size_t first, size_t count) {
            return send_extents(*self.range, socket, message, first, count);
          },
          py::arg("socket"), py::arg("message"), py::arg("first"), py::arg("count"), Unlocked())
      .def("close", &RangeHandle::close, Unlocked())
      .def_property_readonly("exports", [](RangeHandle& self) { return self.exports.load(); })
      .def_property_readonly("resident_bytes", [](RangeHandle& self) { return self.range->resident_bytes(); })
      .def_property_readonly("held_blocks", [](RangeHandle& self) { return self.range->held_blocks(); });

  py::class_<CompactionPlan>(module, "CompactionPlan")
      .def_readonly("copies", &CompactionPlan::copies)
      .def_readonly("freed_bytes", &CompactionPlan::freed_bytes);

  py::class_<BlockPool>(module, "BlockPool")
      .def(py::init([](RangeHandle& range) { return std::make_unique<BlockPool>(range.range); }),
           py::keep_alive<1, 2>())
      .def(
          "allocate",
          [](BlockPool& self, size_t count, Stream stream, double timeout) {
            return self.allocate(count, stream, deadline_in(timeout));
          },
          py::arg("count"), py::arg("stream"), py::arg("timeout"), Unlocked())
      .def(
          "free",
          [](BlockPool& self, py::handle blocks, Stream stream) {
            const std::vector<Block> numbers = blocks_from(blocks, self.num_blocks());
            const NoGil unlocked;
            self.free(numbers, stream);
          },
          py::arg("blocks"), py::arg("stream"))
      .def("cheapest",
           [](BlockPool& self) {
             py::list out;
             for (const Occupancy& site : self.cheapest()) {
               out.append(py::make_tuple(site.first, site.last, site.live, site.bytes));
             }
             return out;
           })
      .def(
          "plan_compaction",
          [](BlockPool& self, size_t max_copies, Stream stream, double timeout) {
            return self.plan_compaction(max_copies, stream, deadline_in(timeout));
          },
          py::arg("max_copies"), py::arg("stream"), py::arg("timeout"), Unlocked())
      .def("commit", &BlockPool::commit, Unlocked())
      .def("abort", &BlockPool::abort, Unlocked())
      .def_property_readonly("free_blocks", &BlockPool::free_blocks)
      .def_property_readonly("live_blocks", &BlockPool::live_blocks);

  module.def(
      "bench_ensure",
      [](RangeHandle& range, py::handle blocks, size_t iterations) {
        const std::vector<Block> numbers = blocks_from(blocks, range.range->geometry().num_blocks);
        const NoGil unlocked;
        return bench_ensure(range, numbers, iterations);
      },
      py::arg("range"), py::arg("blocks"), py::arg("iterations"));
}

}  // namespace tem
