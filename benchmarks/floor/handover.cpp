// Two processes and the bare driver: one holds memory, the other asks for it by a socket. The first unmaps
// and releases, the second creates, maps and makes accessible.
//
// handover ORDINAL SIZE EXTENT, with an ordinal below 0 for memory of this machine. Reads lines, and answers
// each with nanoseconds, or "error" and why:
//   take    to the taker from the holder, from the asking until it is accessible
//   create  to the taker from the device, which must have it free
//   give    the taker gives up what it has
//   hold    the holder takes it
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_driver.hpp"
#include "host_driver.hpp"

namespace {

template <class Driver>
class Side {
 public:
  Side(int ordinal, size_t size, size_t extent)
      : driver_(ordinal), size_(size), extent_(extent), base_(driver_.reserve(size)) {
    handles_.reserve(size / extent);
  }

  void take() {
    if (!handles_.empty()) throw std::runtime_error("memory is held already");
    for (size_t at = 0; at < size_; at += extent_) {
      handles_.push_back(driver_.create(extent_));
      driver_.map(base_ + at, extent_, handles_.back());
    }
    driver_.allow(base_, size_);
  }

  void give() {
    if (handles_.empty()) throw std::runtime_error("no memory is held");
    driver_.unmap(base_, size_);
    for (const auto handle : handles_) driver_.release(handle, extent_);
    handles_.clear();
  }

 private:
  Driver driver_;
  size_t size_;
  size_t extent_;
  uintptr_t base_;
  std::vector<uint64_t> handles_;
};

struct Word {
  char text[120];
  explicit Word(const std::string& said = "") : text{} { said.copy(text, sizeof text - 1); }
};

Word receive(int socket) {
  Word word;
  if (recv(socket, &word, sizeof word, 0) != static_cast<ssize_t>(sizeof word)) _exit(1);
  return word;
}

void say(int socket, const Word& word) {
  if (send(socket, &word, sizeof word, MSG_NOSIGNAL) < 0) _exit(1);
}

/// Has the holder do something; its error is thrown here.
void ask(int socket, const std::string& what) {
  say(socket, Word(what));
  const Word answer = receive(socket);
  if (answer.text[0] != '\0') throw std::runtime_error(answer.text);
}

template <class Driver>
void hold(int socket, int ordinal, size_t size, size_t extent) {
  Side<Driver> side(ordinal, size, extent);
  for (;;) {
    const Word word = receive(socket);
    try {
      std::strcmp(word.text, "give") == 0 ? side.give() : side.take();
      say(socket, Word());
    } catch (const std::exception& error) {
      say(socket, Word(error.what()));
    }
  }
}

template <class Work>
int64_t timed(Work work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
}

template <class Driver>
void serve(int socket, int ordinal, size_t size, size_t extent) {
  Side<Driver> side(ordinal, size, extent);
  const auto act = [&](const std::string& line) {
    if (line == "create") return timed([&] { side.take(); });
    if (line == "give") return timed([&] { side.give(); });
    if (line == "hold") return timed([&] { ask(socket, "take"); });
    if (line != "take") throw std::runtime_error("no such word: " + line);
    return timed([&] {
      ask(socket, "give");
      side.take();
    });
  };
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::cout << act(line) << std::endl;
    } catch (const std::exception& error) {
      std::cout << "error " << error.what() << std::endl;
    }
  }
}

template <class Driver>
void run(int ordinal, size_t size, size_t extent) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) != 0) throw std::runtime_error("socketpair");
  // Forked before either has a context: one does not survive a fork.
  const pid_t child = fork();
  if (child < 0) throw std::runtime_error("fork");
  close(ends[child == 0 ? 0 : 1]);
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    hold<Driver>(ends[1], ordinal, size, extent);
  }
  serve<Driver>(ends[0], ordinal, size, extent);
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) return 2;
  try {
    const int ordinal = std::stoi(words[1]);
    const size_t size = std::stoull(words[2]), extent = std::stoull(words[3]);
    if (ordinal < 0) {
      run<tem_floor::HostDriver>(ordinal, size, extent);
    } else {
      run<tem_floor::CudaDriver>(ordinal, size, extent);
    }
  } catch (const std::exception& error) {
    std::cout << "error " << error.what() << std::endl;
    return 1;
  }
}
