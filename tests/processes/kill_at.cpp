// Kills the process at its n-th message to or from the broker, before or after: the n-th step of whatever it
// does there. Preloaded by tests; TEM_KILL_AT is "send 3 before".
#include <dlfcn.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

struct Plan {
  char call[8] = "";
  int number = 0;
  char when[8] = "";
  Plan() {
    const char* text = std::getenv("TEM_KILL_AT");
    if (text != nullptr) std::sscanf(text, "%7s %d %7s", call, &number, when);
  }
};

bool is_broker(int socket) {
  int kind = 0;
  socklen_t bytes = sizeof kind;
  return getsockopt(socket, SOL_SOCKET, SO_TYPE, &kind, &bytes) == 0 && kind == SOCK_SEQPACKET;
}

void step(const char* call, int number, const char* when) {
  static const Plan plan;
  if (number == plan.number && std::strcmp(call, plan.call) == 0 && std::strcmp(when, plan.when) == 0)
    kill(getpid(), SIGKILL);
}

}  // namespace

extern "C" ssize_t sendmsg(int socket, const msghdr* message, int flags) {
  static const auto real =
      reinterpret_cast<ssize_t (*)(int, const msghdr*, int)>(dlsym(RTLD_NEXT, "sendmsg"));
  static std::atomic<int> count{0};
  if (!is_broker(socket)) return real(socket, message, flags);
  const int number = ++count;
  step("send", number, "before");
  const ssize_t sent = real(socket, message, flags);
  step("send", number, "after");
  return sent;
}

extern "C" ssize_t recvmsg(int socket, msghdr* message, int flags) {
  static const auto real = reinterpret_cast<ssize_t (*)(int, msghdr*, int)>(dlsym(RTLD_NEXT, "recvmsg"));
  static std::atomic<int> count{0};
  if (!is_broker(socket)) return real(socket, message, flags);
  const int number = ++count;
  step("recv", number, "before");
  const ssize_t got = real(socket, message, flags);
  step("recv", number, "after");
  return got;
}
