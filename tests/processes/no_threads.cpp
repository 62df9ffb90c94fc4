// A process that may have no more threads. Preloaded by tests; it may not while the file TEM_NO_THREADS is
// there. The kernel's own limit does not hold for root.
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>

extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                              void* argument) noexcept {
  static const auto real = reinterpret_cast<decltype(&pthread_create)>(dlsym(RTLD_NEXT, "pthread_create"));
  const char* const file = std::getenv("TEM_NO_THREADS");
  if (file != nullptr && access(file, F_OK) == 0) return EAGAIN;
  return real(thread, attributes, start, argument);
}
