#include <cstdio>
#include <exception>
#include <map>
#include <mutex>
#include <new>
#include <string>
#include <utility>

#include "capi/scope.hpp"
#include "core/error.hpp"

namespace tem {
namespace {

thread_local std::shared_ptr<Allocator> current;

struct Defaults {
  std::mutex mutex;
  std::map<int, std::shared_ptr<Allocator>> by_device;
};

/// Leaked: torch frees blocks while static destructors run.
Defaults& defaults() {
  static auto* const made = new Defaults;
  return *made;
}

std::shared_ptr<Allocator> allocator_for(int device) {
  if (current && current->serves_cuda(device)) return current;
  Defaults& all = defaults();
  const std::lock_guard<std::mutex> guard(all.mutex);
  const auto found = all.by_device.find(device);
  return found == all.by_device.end() ? nullptr : found->second;
}

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
    const auto owner = allocator_of(block);
    if (!owner) return 0;
    owner->free(block);
  } catch (const std::exception& error) {
    complain("free", error);
  }
  return 1;
}

}  // namespace

std::shared_ptr<Allocator> exchange_scope(std::shared_ptr<Allocator> allocator) {
  return std::exchange(current, std::move(allocator));
}

void set_device_default(int device, std::shared_ptr<Allocator> allocator) {
  Defaults& all = defaults();
  const std::lock_guard<std::mutex> guard(all.mutex);
  if (allocator) {
    all.by_device[device] = std::move(allocator);
  } else {
    all.by_device.erase(device);
  }
}

const tem_host_api& host_api() {
  static const tem_host_api table = {TEM_HOST_API_VERSION, host_allocate, host_release};
  return table;
}

}  // namespace tem

extern "C" {

__attribute__((visibility("default"))) void* tem_cuda_alloc(size_t bytes, int device, void* stream) {
  if (bytes == 0) return nullptr;
  const auto allocator = tem::allocator_for(device);
  if (!allocator) {
    throw tem::OutOfMemory("no account serves device " + std::to_string(device) +
                           "; pass it to torch_allocator() or enter account.allocations() first");
  }
  try {
    return allocator->allocate(bytes, reinterpret_cast<tem::Stream>(stream));
  } catch (const tem::Error& error) {
    // These words are how Python knows it from other failures: torch passes on nothing but the text.
    const bool full = error.kind() == tem::Kind::kOutOfMemory;
    throw tem::OutOfMemory(full ? std::string("out of memory: ") + error.what() : error.what());
  }
}

__attribute__((visibility("default"))) void tem_cuda_free(void* block, size_t, int, void*) {
  if (block == nullptr) return;
  try {
    const auto owner = tem::allocator_of(block);
    if (!owner) {
      char text[64];
      std::snprintf(text, sizeof text, "%p is not from any account of this process", block);
      throw tem::Error(tem::Kind::kInvalid, text);
    }
    owner->free(block);
  } catch (const std::exception& error) {
    tem::complain("free", error);
  }
}

__attribute__((visibility("default"))) void tem_cuda_record_stream(void* block, void* stream) {
  try {
    if (const auto owner = tem::allocator_of(block)) {
      owner->record_stream(block, reinterpret_cast<tem::Stream>(stream));
    }
  } catch (const std::exception& error) {
    tem::complain("record_stream", error);
  }
}

}  // extern "C"
