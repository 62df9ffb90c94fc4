// The whole of a test framework: named properties, checks that throw, and a count of what failed.
#pragma once

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

#include "core/error.hpp"

namespace check {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline int& failures() {
  static int count = 0;
  return count;
}

[[noreturn]] inline void fail(const char* file, int line, const std::string& what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

/// Runs one property and prints a line about it. A failure ends the property, not the program.
template <class Body>
void property(const std::string& name, Body body) {
  try {
    body();
    std::printf("ok      %s\n", name.c_str());
  } catch (const std::exception& error) {
    ++failures();
    std::printf("FAILED  %s\n        %s\n", name.c_str(), error.what());
  }
  std::fflush(stdout);
}

/// What `call` throws as a tem::Error; fails where it throws none.
template <class Call>
tem::Error error_of(const char* file, int line, const char* text, Call call) {
  try {
    call();
  } catch (const tem::Error& error) {
    return error;
  }
  fail(file, line, std::string("not refused: ") + text);
}

}  // namespace check

#define CHECK(condition)                                           \
  do {                                                             \
    if (!(condition)) check::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define CHECK_EQ(left, right)                                                                       \
  do {                                                                                              \
    const auto left_value = (left);                                                                 \
    const auto right_value = (right);                                                               \
    if (!(left_value == right_value)) {                                                             \
      check::fail(__FILE__, __LINE__,                                                               \
                  std::string(#left " == " #right ": ") + std::to_string(left_value) + " is not " + \
                      std::to_string(right_value));                                                 \
    }                                                                                               \
  } while (false)

#define ERROR_OF(expression) \
  check::error_of(__FILE__, __LINE__, #expression, [&] { static_cast<void>(expression); })

/// `expression` throws a tem::Error of this kind.
#define CHECK_THROWS(expression, wanted)                                                                 \
  do {                                                                                                   \
    const tem::Error thrown = ERROR_OF(expression);                                                      \
    if (thrown.kind() != (wanted)) {                                                                     \
      check::fail(__FILE__, __LINE__, std::string(#expression " threw another kind: ") + thrown.what()); \
    }                                                                                                    \
  } while (false)

/// `expression` is refused with Error{kDriver} and this number of the driver's.
#define CHECK_REFUSED(expression, number)                                                                 \
  do {                                                                                                    \
    const tem::Error thrown = ERROR_OF(expression);                                                       \
    if (thrown.kind() != tem::Kind::kDriver || thrown.code() != (number)) {                               \
      check::fail(__FILE__, __LINE__, std::string(#expression " threw another error: ") + thrown.what()); \
    }                                                                                                     \
  } while (false)
