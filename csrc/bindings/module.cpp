#include "bindings/bindings.hpp"

// No module-level state beyond types: importing touches no driver, reads no environment and starts no thread.
PYBIND11_MODULE(_C, module) {
  module.doc() = "The core of torch_elastic_mem: arena, ledger, residency and allocator.";
  tem::bind_errors(module);
  tem::bind_ledger(module);
  tem::bind_arena(module);
  tem::bind_kv(module);
  tem::bind_allocator(module);
  tem::bind_shared(module);
  tem::bind_broker(module);
}
