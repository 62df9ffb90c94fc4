#include "backend/driver.hpp"

#include <dlfcn.h>

#include "core/error.hpp"

namespace tem::cuda {

namespace {

constexpr int kOldest = 12000;

[[noreturn]] void missing(const std::string& message, Result code = kSuccess) {
  throw Error(Kind::kDriverMissing, message, code);
}

template <class Function>
Function symbol(void* handle, const std::string& library, const char* name) {
  void* found = dlsym(handle, name);
  if (found == nullptr)
    missing(library + " has no " + name + "; a CUDA driver of version 12.0 or newer is needed");
  return reinterpret_cast<Function>(found);
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string Driver::describe(Result code) const {
  const char* name = nullptr;
  const char* text = nullptr;
  if (cuGetErrorName(code, &name) != kSuccess || name == nullptr) name = "unknown CUDA error";
  if (cuGetErrorString(code, &text) != kSuccess || text == nullptr) text = "no description";
  return std::string(name) + " (" + std::to_string(code) + "): " + text;
}

Driver load_driver(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    const char* why = dlerror();
    missing("no CUDA driver: " + (why != nullptr ? std::string(why) : "cannot open " + library));
  }
  int version = 0;
  const auto get_version = symbol<Result (*)(int*)>(handle, library, "cuDriverGetVersion");
  if (const Result code = get_version(&version); code != kSuccess) {
    missing("cuDriverGetVersion of " + library + " fails with error " + std::to_string(code), code);
  }
  if (version < kOldest) {
    missing("the CUDA driver is of version " + version_text(version) + "; " + version_text(kOldest) +
            " or newer is needed");
  }
  const auto get_address =
      symbol<Result (*)(const char*, void**, int, uint64_t, int*)>(handle, library, "cuGetProcAddress_v2");
  Driver driver;
  const auto look_up = [&](const char* name, int as_of, void** found) {
    int status = 0;
    return get_address(name, found, as_of, kProcAddressDefault, &status);
  };
  const auto find = [&](const char* name) {
    void* found = nullptr;
    const Result code = look_up(name, kOldest, &found);
    if (code != kSuccess || found == nullptr) {
      missing("the CUDA driver " + version_text(version) + " has no " + name, code);
    }
    return found;
  };
#define TEM_RESOLVE(name, ...) driver.name = reinterpret_cast<Result (*)(__VA_ARGS__)>(find(#name));
  TEM_CUDA_ENTRY_POINTS(TEM_RESOLVE)
#undef TEM_RESOLVE
  const auto find_later = [&](const char* name, int since) {
    void* found = nullptr;
    return version >= since && look_up(name, since, &found) == kSuccess ? found : nullptr;
  };
#define TEM_RESOLVE_LATER(name, since, ...) \
  driver.name = reinterpret_cast<Result (*)(__VA_ARGS__)>(find_later(#name, since));
  TEM_CUDA_LATER_ENTRY_POINTS(TEM_RESOLVE_LATER)
#undef TEM_RESOLVE_LATER
  if (const Result code = driver.cuInit(0); code != kSuccess) {
    missing("the CUDA driver does not start: cuInit: " + driver.describe(code), code);
  }
  return driver;
}

}  // namespace tem::cuda
