#include "client/wire.hpp"

namespace tem::client {

std::optional<Header> header_of(const char* message, size_t bytes) {
  Header header;
  if (bytes < sizeof header || bytes > kLargest) return std::nullopt;
  std::memcpy(&header, message, sizeof header);
  // A broker of another version says so in a header of its own, of which this much never changes.
  const bool refuses = header.type == static_cast<uint16_t>(Type::kRefused);
  if (header.length != bytes || (header.version != kVersion && !refuses)) return std::nullopt;
  return header;
}

Error refusal_of(const char* message, size_t bytes) {
  Refusal refusal{};
  if (bytes < sizeof(Header) + sizeof refusal) {
    return Error(Kind::kBroker, "the broker refused without a reason");
  }
  std::memcpy(&refusal, message + sizeof(Header), sizeof refusal);
  const size_t start = sizeof(Header) + sizeof refusal;
  std::string why(message + start, bytes - start);
  switch (refusal.kind) {
    case 1:
      return Error(Kind::kInvalid, std::move(why));
    case 2:
      return Error(Kind::kAdmission, std::move(why));
    case 3:
      return Error(Kind::kOutOfMemory, std::move(why));
    case 6:
      return Error(Kind::kClosed, std::move(why));
    case 7:
      return Error(Kind::kInUse, std::move(why));
    default:
      return Error(Kind::kBroker, std::move(why));
  }
}

}  // namespace tem::client
