// What crosses between processes, as bytes: the handle that an exporter gives out, by whatever way its user
// likes, and the question and answer on the exporter's socket. Pure.
//
// A handle begins with a byte beyond every version that torch's own allocator knows, so that one that is
// handed to it is refused in words.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "alloc/shared_runs.hpp"

namespace tem::ipc {

constexpr unsigned char kVersion = 1;
/// A message takes at most 253 descriptors (SCM_MAX_FD), and the kernel bounds those of a user that are on
/// their way by how many files a process may open.
constexpr size_t kBatch = 128;

struct Handle {
  int32_t process = 0;                     // whose memory it is, for messages
  std::array<unsigned char, 16> socket{};  // by which its server is found
  uint64_t heap = 0;                       // which of its heaps
  ShareToken token{};                      // which run of extents
  std::string exchange;                    // of the exporter's backend
  std::vector<size_t> extents;             // sizes, all powers of two
};

std::string encode(const Handle& handle);
/// Whether these bytes claim to be such a handle, of whatever version.
bool is_handle(const std::string& bytes);
/// Error{kInvalid} for bytes that are no handle, were cut or changed, or come of another version.
Handle decode(const std::string& bytes);
/// The sum of the extents.
size_t bytes_of(const Handle& handle);

/// Asks for descriptors of the extents from `first` on.
struct Question {
  char magic[4];
  uint32_t version;
  uint64_t heap;
  ShareToken token;
  uint64_t first;
};
Question question(const Handle& handle, size_t first);

enum class Verdict : uint32_t {
  kGiven = 0,    // descriptors come with it
  kFreed = 1,    // there is no such run any more
  kRefused = 2,  // the exporter's driver or kernel says no
  kLater = 3     // too many descriptors are on their way: ask again
};
struct Answer {
  char magic[4];
  Verdict verdict;
  uint32_t count;  // descriptors
  char why[500];
};
Answer answer(Verdict verdict, size_t count, const std::string& why);
/// Whether a message of so many bytes can be one.
bool is_question(const Question& message, size_t bytes);
bool is_answer(const Answer& message, size_t bytes);

}  // namespace tem::ipc
