// The messages of docs/protocol.md, byte for byte. Pure.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "core/error.hpp"
#include "ledger/ledger.hpp"

namespace tem::client {

constexpr uint16_t kVersion = 1;
constexpr size_t kLargest = 4096;
constexpr uint32_t kDearestRung = 4;
constexpr uint32_t kNoRung = 255;
constexpr uint32_t kLastAnswer = 1;  // a flag of GAVE
constexpr uint32_t kPassOn = 1;      // a flag of ASK

enum class Type : uint16_t {
  kHello = 1,
  kOpen = 2,
  kClose = 3,
  kLimits = 4,
  kDemand = 5,
  kWithdraw = 6,
  kReturn = 7,
  kGave = 8,
  kBye = 9,
  kReport = 10,
  kPass = 11,
  kWelcome = 32,
  kRefused = 33,
  kOpened = 34,
  kDone = 35,
  kGrant = 36,
  kDenied = 37,
  kAsk = 38,
  kSet = 39,
  kPassed = 40,
};

#pragma pack(push, 1)

template <size_t N>
struct Text {
  char bytes[N];

  Text() : bytes{} {}
  /// A longer text is cut before the character that does not fit.
  explicit Text(const std::string& text) : bytes{} {
    size_t length = std::min(text.size(), N - 1);
    while (length < text.size() && length > 0 && (static_cast<unsigned char>(text[length]) & 0xC0U) == 0x80U)
      --length;
    text.copy(bytes, length);
  }
  std::string str() const { return std::string(bytes, strnlen(bytes, N)); }
};

struct Header {
  uint16_t version;
  uint16_t type;
  uint32_t length;
  uint64_t request;
};
static_assert(sizeof(Header) == 16);

struct WireLimits {
  int64_t value;
  uint64_t min, low, high, max;
  double weight;

  WireLimits() = default;
  explicit WireLimits(const Limits& from)
      : value(from.value),
        min(from.min),
        low(from.low),
        high(from.high),
        max(from.max),
        weight(from.weight) {}
  Limits limits() const { return {value, min, low, high, max, weight}; }
};
static_assert(sizeof(WireLimits) == 48 && kUnlimited == UINT64_MAX);

struct Hello {
  static constexpr Type kType = Type::kHello;
  Text<64> device;
  Text<16> backend;
  Text<64> label, process;
  uint64_t total, granularity;
};
struct Open {
  static constexpr Type kType = Type::kOpen;
  Text<64> name;
  Text<32> priority;
  WireLimits limits;
  uint64_t lease;
};
struct Close {
  static constexpr Type kType = Type::kClose;
  uint32_t account, pad;
};
struct SetOwn {
  static constexpr Type kType = Type::kLimits;
  uint32_t account, pad;
  WireLimits limits;
};
struct Demand {
  static constexpr Type kType = Type::kDemand;
  uint32_t account, rung;
  uint64_t bytes, want, timeout;
  Text<64> group;
  uint32_t members, pad;
  uint64_t round;
};
struct Withdraw {
  static constexpr Type kType = Type::kWithdraw;
};
struct Return {
  static constexpr Type kType = Type::kReturn;
  uint32_t account, pad;
  uint64_t bytes;
};
struct Gave {
  static constexpr Type kType = Type::kGave;
  uint32_t account, flags;
  uint64_t bytes, coming;
};
struct Bye {
  static constexpr Type kType = Type::kBye;
};
struct Report {
  static constexpr Type kType = Type::kReport;
  uint32_t account, rungs;
  uint64_t held, idle;
  uint32_t in_use, cached, free, parked;
};
struct Pass {
  static constexpr Type kType = Type::kPass;
  uint32_t account, count;
  uint64_t bytes;
};
struct Welcome {
  static constexpr Type kType = Type::kWelcome;
  uint64_t epoch, capacity;
};
struct Opened {
  static constexpr Type kType = Type::kOpened;
  uint32_t account, pad;
  WireLimits limits;
};
struct Granted {
  static constexpr Type kType = Type::kGrant;
  uint32_t account, pad;
  uint64_t bytes;
};
struct Ask {
  static constexpr Type kType = Type::kAsk;
  uint32_t account, rung;
  uint64_t bytes, timeout;
  Text<64> demander;
  uint32_t flags, pad;
};
struct Set {
  static constexpr Type kType = Type::kSet;
  uint32_t account, pad;
  Text<32> priority;
  WireLimits limits;
};
struct PassedOn {
  static constexpr Type kType = Type::kPassed;
  uint32_t account, count;
  uint64_t bytes;
};
/// REFUSED and DENIED; the reason follows.
struct Refusal {
  uint32_t kind, pad;
};

#pragma pack(pop)

using Bytes = std::vector<char>;

template <class Body>
Bytes encode(uint64_t request, const Body& body) {
  const size_t length = sizeof(Header) + (std::is_empty_v<Body> ? 0 : sizeof(Body));
  const Header header{kVersion, static_cast<uint16_t>(Body::kType), static_cast<uint32_t>(length), request};
  Bytes out(length);
  std::memcpy(out.data(), &header, sizeof header);
  if (!std::is_empty_v<Body>) std::memcpy(out.data() + sizeof header, &body, sizeof body);
  return out;
}

/// The header of a message; nothing if these bytes are none of a broker of this version.
std::optional<Header> header_of(const char* message, size_t bytes);

/// Error{kBroker} if it has another size.
template <class Body>
Body body_of(const char* message, size_t bytes) {
  if (bytes != sizeof(Header) + sizeof(Body)) {
    throw Error(Kind::kBroker, "the broker sent a message of the wrong length");
  }
  Body body;
  std::memcpy(static_cast<void*>(&body), message + sizeof(Header), sizeof body);
  return body;
}

/// What a REFUSED or DENIED says, as an error.
Error refusal_of(const char* message, size_t bytes);

}  // namespace tem::client
