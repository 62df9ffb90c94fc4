#include <array>
#include <atomic>
#include <cstdio>
#include <exception>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "alloc/directory.hpp"
#include "capi/peers.hpp"
#include "capi/scope.hpp"
#include "core/error.hpp"
#include "ipc/client.hpp"
#include "ipc/server.hpp"

namespace tem {
namespace {

thread_local std::shared_ptr<Heap> current;

/// More than any machine has.
constexpr int kDevices = 64;

struct Defaults {
  std::mutex mutex;  // of writers
  std::array<std::atomic<Heap*>, kDevices> by_device{};
  // A reader may hold any of them: all stay.
  std::vector<std::shared_ptr<Heap>> kept;
};

/// Leaked: torch frees blocks while static destructors run.
Defaults& defaults() {
  static auto* const made = new Defaults;
  return *made;
}

Heap* serving(int device) noexcept {
  if (current && current->serves_cuda(device)) return current.get();
  if (device < 0 || device >= kDevices) return nullptr;
  Heap* heap = defaults().by_device[static_cast<size_t>(device)].load(std::memory_order_acquire);
  return heap != nullptr && heap->serves_cuda(device) ? heap : nullptr;
}

std::string text_of(const void* pointer) {
  char text[32];
  std::snprintf(text, sizeof text, "%p", pointer);
  return text;
}

class CudaDirectory final : public MallocDirectory {
 public:
  Malloc* owner(const void* block) noexcept override { return directory().owner(block); }
  Malloc* serving(int device) noexcept override { return tem::serving(device); }
  SharedBlock share(const void* block) override {
    Heap* const owner = directory().owner(block);
    if (owner == nullptr)
      throw Error(Kind::kInvalid, text_of(block) + " is not from any account of this process");
    return ipc::share(owner->shared_from_this(), block);
  }
  std::shared_ptr<void> open_shared(int device, const std::string& handle) override {
    return ipc::open(*checked(device).device(), handle);
  }
  void allow_peer(int device, int peer) override {
    remember_peer(device, peer);
    if (Heap* const heap = tem::serving(device)) tell_peers(*heap);
  }

 private:
  static Heap& checked(int device) {
    if (Heap* const heap = tem::serving(device)) return *heap;
    throw Error(Kind::kInvalid, "no account serves device " + std::to_string(device) +
                                    "; pass it to torch_allocator() or enter account.allocations() first");
  }
};

class OutOfMemory final : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_("torch_elastic_mem: " + std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

void complain(const char* what, const std::exception& error) noexcept {
  std::fprintf(stderr, "torch_elastic_mem: %s: %s\n", what, error.what());
}

tem_result host_allocate(size_t bytes, void** block, char* message, size_t message_bytes) {
  if (!current || !current->serves_host()) return TEM_NO_SCOPE;
  try {
    *block = current->allocate(bytes, 0);
    return TEM_OK;
  } catch (const Error& error) {
    std::snprintf(message, message_bytes, "%s", error.what());
    return error.kind() == Kind::kOutOfMemory ? TEM_OUT_OF_MEMORY : TEM_FAILED;
  } catch (const std::exception& error) {
    std::snprintf(message, message_bytes, "%s", error.what());
    return TEM_FAILED;
  }
}

int host_release(void* block) {
  try {
    Heap* owner = directory().owner(block);
    if (owner == nullptr) return 0;
    owner->free(block);
  } catch (const std::exception& error) {
    complain("free", error);
  }
  return 1;
}

}  // namespace

std::shared_ptr<Heap> exchange_scope(std::shared_ptr<Heap> heap) {
  if (heap) tell_peers(*heap);
  return std::exchange(current, std::move(heap));
}

void set_device_default(int device, std::shared_ptr<Heap> heap) {
  if (device < 0 || device >= kDevices)
    throw Error(Kind::kInvalid, "device " + std::to_string(device) + " is none that a process can have");
  if (heap) tell_peers(*heap);
  Defaults& all = defaults();
  const std::lock_guard<std::mutex> guard(all.mutex);
  all.by_device[static_cast<size_t>(device)].store(heap.get(), std::memory_order_release);
  if (heap) all.kept.push_back(std::move(heap));
}

MallocDirectory& malloc_directory() {
  static CudaDirectory made;
  return made;
}

const tem_host_api& host_api() {
  static const tem_host_api table = {TEM_HOST_API_VERSION, host_allocate, host_release};
  return table;
}

}  // namespace tem

extern "C" {

__attribute__((visibility("default"))) void* tem_cuda_alloc(size_t bytes, int device, void* stream) {
  if (bytes == 0) return nullptr;
  tem::Heap* heap = tem::serving(device);
  if (heap == nullptr) {
    throw tem::OutOfMemory("no account serves device " + std::to_string(device) +
                           "; pass it to torch_allocator() or enter account.allocations() first");
  }
  try {
    return heap->allocate(bytes, reinterpret_cast<tem::Stream>(stream));
  } catch (const tem::Error& error) {
    // These words are how Python knows it from other failures: torch passes on nothing but the text.
    const bool full = error.kind() == tem::Kind::kOutOfMemory;
    throw tem::OutOfMemory(full ? std::string("out of memory: ") + error.what() : error.what());
  }
}

__attribute__((visibility("default"))) void tem_cuda_free(void* block, size_t, int, void*) {
  if (block == nullptr) return;
  try {
    tem::Heap* owner = tem::directory().owner(block);
    if (owner == nullptr) {
      throw tem::Error(tem::Kind::kInvalid, tem::text_of(block) + " is not from any account of this process");
    }
    owner->free(block);
  } catch (const std::exception& error) {
    tem::complain("free", error);
  }
}

__attribute__((visibility("default"))) void tem_cuda_record_stream(void* block, void* stream) {
  try {
    if (tem::Heap* owner = tem::directory().owner(block)) {
      owner->record_stream(block, reinterpret_cast<tem::Stream>(stream));
    }
  } catch (const std::exception& error) {
    tem::complain("record_stream", error);
  }
}

}  // extern "C"
