// Forks while descriptors of memory come and go in other threads: no child has one, whatever the moment.
//   forks             the host backend
//   forks LIBRARY     the CUDA backend over the fake driver at this path
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.hpp"
#include "check.hpp"
#include "core/fd_message.hpp"
#include "core/sizes.hpp"
#include "threads.hpp"

using namespace tem;  // NOLINT

namespace {

constexpr size_t kExtent = 2 * kMiB;
constexpr int kForks = 200;
constexpr int kHeld = 8;  // at a time

/// In a child too, where other threads may have held locks of the library's at its birth.
int open_descriptors() {
  int count = 0;
  for (int number = 0; number < 256; ++number) count += ::fcntl(number, F_GETFD) >= 0;
  return count;
}

void export_and_close(Backend& backend, Handle handle, const std::atomic<bool>& over) {
  std::vector<Fd> held;
  while (!over) {
    held.push_back(backend.export_fd(handle));
    if (held.size() == kHeld) held.clear();
  }
}

void receive_and_close(int from, int to, const std::vector<Fd>& sent, const std::atomic<bool>& over) {
  std::vector<Fd> held;
  char text = 'x';
  while (!over) {
    CHECK_EQ(send_message(from, &text, 1, sent), 0);
    for (Fd& each : receive_message(to, &text, 1).fds) held.push_back(std::move(each));
    if (held.size() == kHeld) held.clear();
  }
}

void run(Backend& backend) {
  const Handle handle = backend.create(kExtent);
  const int others = open_descriptors();
  {
    std::vector<Fd> sent;
    sent.push_back(backend.export_fd(handle));
    int ends[2];
    CHECK_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    const Fd from(ends[0]), to(ends[1]);
    std::atomic<bool> over{false};
    check::Threads threads;
    threads.start([&] { export_and_close(backend, handle, over); });
    threads.start([&] { receive_and_close(from.get(), to.get(), sent, over); });
    int inherited = 0;
    for (int i = 0; i < kForks; ++i) {
      const pid_t child = ::fork();
      if (child == 0) ::_exit(open_descriptors() == others + 2 ? 0 : 1);  // the sockets
      int status = 0;
      if (::waitpid(child, &status, 0) != child || status != 0) ++inherited;
    }
    over = true;
    threads.join();
    CHECK_EQ(inherited, 0);
    CHECK_EQ(threads.failed(), 0);
  }
  CHECK_EQ(open_descriptors(), others);
  backend.release(handle);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string library = argc > 1 ? argv[1] : "";
  check::property("a child that is forked at any moment has no descriptor of memory", [&] {
    run(library.empty() ? *make_host_backend(4 * kExtent) : *make_cuda_backend(0, library));
  });
  std::printf("%d failed\n", check::failures());
  return check::failures() == 0 ? 0 : 1;
}
