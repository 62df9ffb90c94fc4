// Memory as a capsule that torch makes a tensor of, without a copy.
#pragma once

#include <memory>
#include <utility>

#include "backend/backend.hpp"
#include "bindings/bindings.hpp"
#include "bindings/dlpack.hpp"

namespace tem {

/// A one-dimensional DLPack tensor of bytes; torch views it as what it is. It keeps `owner` while it lives.
inline py::capsule export_bytes(Address at, size_t bytes, const Capabilities& device,
                                std::shared_ptr<void> owner) {
  struct Export {
    dlpack::ManagedTensor managed;
    int64_t shape;
    std::shared_ptr<void> owner;
  };
  const bool host = device.backend == "host";
  auto owned = std::make_unique<Export>();
  owned->shape = static_cast<int64_t>(bytes);
  owned->owner = std::move(owner);
  owned->managed.tensor = {reinterpret_cast<void*>(at),
                           {host ? dlpack::kCPU : dlpack::kCUDA, host ? 0 : device.ordinal},
                           1,
                           {dlpack::kUInt, 8, 1},
                           &owned->shape,
                           nullptr,
                           0};
  owned->managed.manager = owned.get();
  owned->managed.deleter = [](dlpack::ManagedTensor* managed) {
    delete static_cast<Export*>(managed->manager);
  };
  // A consumer renames the capsule when it takes the tensor over.
  return py::capsule(&owned.release()->managed, "dltensor", [](PyObject* capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor") == 0) return;
    auto* const managed = static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

}  // namespace tem
