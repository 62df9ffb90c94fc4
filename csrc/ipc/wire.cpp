#include "ipc/wire.hpp"

#include <cstring>

#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem::ipc {
namespace {

constexpr char kMagic[] = {0x7f, 'T', 'E', 'M'};
constexpr size_t kMostExtents = size_t{1} << 20;
/// Extents beyond these are none of ours, and their sum could not be told.
constexpr unsigned kLeastShift = 12, kMostShift = 42;

[[noreturn]] void malformed(const std::string& why) {
  throw Error(Kind::kInvalid, "this is no handle of memory that torch_elastic_mem shared: " + why);
}

unsigned shift_of(size_t size) { return static_cast<unsigned>(__builtin_ctzll(size)); }

class Writer {
 public:
  template <class Number>
  void put(const Number& number) {
    text_.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
  void put_text(const std::string& text) { text_ += text; }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

class Reader {
 public:
  explicit Reader(const std::string& bytes) : bytes_(bytes) {}

  template <class Number>
  Number get() {
    Number number;
    std::memcpy(&number, need(sizeof number), sizeof number);
    return number;
  }
  std::string get_text(size_t size) { return {need(size), size}; }
  bool at_end() const { return at_ == bytes_.size(); }

 private:
  const char* need(size_t size) {
    if (size > bytes_.size() - at_) malformed("it is cut at " + std::to_string(bytes_.size()) + " bytes");
    at_ += size;
    return bytes_.data() + at_ - size;
  }

  const std::string& bytes_;
  size_t at_ = 0;
};

}  // namespace

std::string encode(const Handle& handle) {
  Writer out;
  out.put(kMagic);
  out.put(kVersion);
  out.put(handle.process);
  out.put(handle.socket);
  out.put(handle.heap);
  out.put(handle.token);
  out.put(static_cast<uint8_t>(handle.exchange.size()));
  out.put_text(handle.exchange);
  out.put(static_cast<uint32_t>(handle.extents.size()));
  for (const size_t size : handle.extents) out.put(static_cast<uint8_t>(shift_of(size)));
  return out.take();
}

bool is_handle(const std::string& bytes) {
  return bytes.size() >= sizeof kMagic && std::memcmp(bytes.data(), kMagic, sizeof kMagic) == 0;
}

Handle decode(const std::string& bytes) {
  if (!is_handle(bytes)) malformed("its first bytes are not ours");
  Reader in(bytes);
  in.get_text(sizeof kMagic);
  if (const auto version = in.get<uint8_t>(); version != kVersion) {
    malformed("it is of version " + std::to_string(version) + ", and this is version " +
              std::to_string(kVersion) + "; have both processes run the same torch_elastic_mem");
  }
  Handle handle;
  handle.process = in.get<int32_t>();
  handle.socket = in.get<decltype(handle.socket)>();
  handle.heap = in.get<uint64_t>();
  handle.token = in.get<ShareToken>();
  handle.exchange = in.get_text(in.get<uint8_t>());
  const auto count = in.get<uint32_t>();
  if (count == 0 || count > kMostExtents) malformed("it names " + std::to_string(count) + " extents");
  for (uint32_t i = 0; i < count; ++i) {
    const auto shift = in.get<uint8_t>();
    if (shift < kLeastShift || shift > kMostShift) malformed("an extent in it has an impossible size");
    handle.extents.push_back(size_t{1} << shift);
  }
  if (!in.at_end()) malformed("something follows it");
  return handle;
}

size_t bytes_of(const Handle& handle) {
  size_t sum = 0;
  for (const size_t size : handle.extents) sum = checked_add(sum, size);
  return sum;
}

Question question(const Handle& handle, size_t first) {
  Question out{};
  std::memcpy(out.magic, kMagic, sizeof kMagic);
  out.version = kVersion;
  out.heap = handle.heap;
  out.token = handle.token;
  out.first = first;
  return out;
}

Answer answer(Verdict verdict, size_t count, const std::string& why) {
  Answer out{};
  std::memcpy(out.magic, kMagic, sizeof kMagic);
  out.verdict = verdict;
  out.count = static_cast<uint32_t>(count);
  why.copy(out.why, sizeof out.why - 1);
  return out;
}

bool is_question(const Question& message, size_t bytes) {
  return bytes == sizeof message && std::memcmp(message.magic, kMagic, sizeof kMagic) == 0 &&
         message.version == kVersion;
}

bool is_answer(const Answer& message, size_t bytes) {
  return bytes == sizeof message && std::memcmp(message.magic, kMagic, sizeof kMagic) == 0 &&
         message.why[sizeof message.why - 1] == '\0';
}

}  // namespace tem::ipc
