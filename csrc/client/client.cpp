#include "client/client.hpp"

#include <algorithm>
#include <utility>

#include "core/fd_table.hpp"
#include "core/sizes.hpp"

namespace tem::client {
namespace {

constexpr double kAnswer = 5.0;     // seconds for an answer that needs nobody's yield
constexpr double kLastWords = 1.0;  // for what a broker is still to be told when the arena ends
constexpr double kGrace = 0.1;      // beyond a demand's deadline, by which the broker has answered it
// Of memory that is passed on: with the largest extents, 256 GiB.
constexpr size_t kDescriptors = 4096;

uint64_t microseconds(Deadline deadline) {
  const double left = std::max(0.0, seconds_until(deadline));
  return static_cast<uint64_t>(std::min(left, 1e9) * 1e6);
}

}  // namespace

Client::Client(const std::string& path, Identity identity)
    : identity_(std::move(identity)), connection_(path) {}

Client::~Client() = default;

std::shared_ptr<Client> Client::connect(const std::string& path, Identity identity, Deadline deadline) {
  std::shared_ptr<Client> client(new Client(path, std::move(identity)));
  client->handshake(deadline);
  return client;
}

void Client::start(const std::shared_ptr<Arena>& arena) {
  owner_ = arena;
  arena_ = arena.get();
  if (!arena->device().exchange.empty()) widen_descriptor_table(kDescriptors);
  receiver_ = std::thread([self = shared_from_this()] { self->listen(); });
}

void Client::handshake(Deadline deadline) {
  Hello hello{};
  hello.device = Text<64>(identity_.device);
  hello.backend = Text<16>(identity_.backend);
  hello.label = Text<64>(identity_.label);
  hello.process = Text<64>(identity_.process);
  hello.total = identity_.total;
  hello.granularity = identity_.granularity;
  {
    const Lock lock(mutex_);  // a question that waits must not come before it
    connection_.connect();
    post(0, hello);
  }
  Bytes message;
  std::vector<Fd> descriptors;
  for (;;) {
    const Connection::Event event = connection_.wait(deadline, message, descriptors);
    if (event == Connection::Event::kMessage) break;
    if (event == Connection::Event::kNothing && Clock::now() < deadline) continue;
    connection_.disconnect();
    throw Error(Kind::kBroker, "broker at " + path() + ": it does not answer; restart it");
  }
  const auto header = header_of(message.data(), message.size());
  if (header && header->type == static_cast<uint16_t>(Type::kWelcome)) {
    capacity_ = body_of<Welcome>(message.data(), message.size()).capacity;
    return;
  }
  connection_.disconnect();
  if (header && header->type == static_cast<uint16_t>(Type::kRefused))
    throw Error(Kind::kBroker, refusal_of(message.data(), message.size()).what());
  throw Error(Kind::kBroker, "broker at " + path() +
                                 " speaks another protocol; this package speaks version " +
                                 std::to_string(kVersion));
}

// What callers wait with.

/// Waits for the answer. With the lock held before and after: what the answer is about is booked, and found
/// by the receiving thread, together with the call.
void Client::call(Lock& lock, Call& call, Deadline deadline) {
  if (stopping_) throw Error(Kind::kClosed, "the arena has been closed; open a new one");
  const uint64_t request = next_request_++;
  calls_[request] = &call;
  try_send(request, call);
  answered_.wait_until(lock, deadline, [&] { return call.done; });
  answered_.wait(lock, [&] { return !call.settling; });
  calls_.erase(request);
  if (call.done) {
    if (call.error) throw Error(*call.error);
    return;
  }
  if (call.type == Type::kDemand && call.sent) post(request, Withdraw{});
  throw Error(Kind::kBroker, connected() ? "broker at " + path() + ": it does not answer"
                                         : "broker at " + path() + ": it is gone, and no other has come");
}

/// What somebody asks about the account, of that type if one is given. It may have its answer already.
const Client::Call* Client::question(AccountId id, std::optional<Type> type) const {
  const auto found = std::find_if(calls_.begin(), calls_.end(), [&](const auto& one) {
    return one.second->account == id && (!type || one.second->type == *type);
  });
  return found == calls_.end() ? nullptr : found->second;
}

/// Sends a question whose account the broker knows. The others go when it does.
void Client::try_send(uint64_t request, Call& call) {
  // One that has its answer is still listed until its caller wakes.
  if (call.sent || call.done || call.settling || !connected()) return;
  const auto found = entries_.find(call.account);
  if (found == entries_.end()) return;
  Entry& entry = found->second;
  if (call.type == Type::kOpen) {
    openings_[request] = call.account;
    Open open{};
    open.name = Text<64>(entry.name);
    open.priority = Text<32>(entry.priority);
    open.limits = WireLimits(entry.limits);
    call.sent = post(request, open);
    call.heard = call.heard || call.sent;
    return;
  }
  if (!entry.remote) return;
  if (call.type == Type::kClose) {
    call.sent = post(request, Close{*entry.remote, 0});
  } else if (call.type == Type::kLimits) {
    call.sent = post(request, SetOwn{*entry.remote, 0, WireLimits(call.limits)});
  } else {
    const LeaseDemand& wanted = *call.demand;
    Demand demand{};
    demand.account = *entry.remote;
    demand.rung = wanted.others ? static_cast<uint32_t>(*wanted.others) : kNoRung;
    demand.bytes = wanted.bytes;
    demand.want = std::max(wanted.want, wanted.bytes);
    demand.timeout = microseconds(wanted.deadline);
    if (wanted.group != nullptr) {
      demand.group = Text<64>(wanted.group->name);
      demand.members = wanted.group->members;
      demand.round = wanted.group->round;
    }
    call.sent = post(request, demand);
  }
}

Limits Client::open(AccountId id, const std::string& name, const std::string& priority,
                    const Limits& limits) {
  Lock lock(mutex_);
  // One of that name may be on its way out.
  answered_.wait_until(lock, deadline_in(kAnswer), [&] { return stopping_ || !leaving(name); });
  Entry& entry = entries_[id];
  entry.name = name;
  entry.priority = priority;
  entry.limits = limits;
  Call opening{Type::kOpen, id};
  try {
    call(lock, opening, deadline_in(kAnswer));
  } catch (const Error&) {
    if (opening.heard && !opening.done) {
      part(id);
    } else {
      entries_.erase(id);
    }
    throw;
  }
  changed();
  return opening.limits;
}

void Client::close(AccountId id) {
  Lock lock(mutex_);
  if (question(id) != nullptr) throw Error(Kind::kInUse, "a demand of the account is under way");
  const auto found = entries_.find(id);
  if (found == entries_.end()) return;
  if (connected() && (found->second.remote || opens(id))) {
    Call closing{Type::kClose, id};
    try {
      call(lock, closing, deadline_in(kAnswer));
    } catch (const Error&) {
      if (closing.done || stopping_) throw;
      return part(id);
    }
  } else if (found->second.refused.empty()) {
    // A broker that lives counts what it held until the process ends: it is opened once more, to be closed.
    left_.insert(entries_.extract(id));
    return;
  }
  entries_.erase(id);
}

/// An account goes whose question nobody has answered. A grant may be on its way to it, and an OPEN of its
/// name would be refused: so what there is to say waits for the next connection, before which a broker hears
/// this one out. The receiving thread finds the end and makes that one.
void Client::part(AccountId id) {
  left_.insert(entries_.extract(id));
  openings_.clear();  // an answer may be here, unread: what it calls for would reach nobody
  connection_.shut();
}

bool Client::opens(AccountId id) const {
  return std::any_of(openings_.begin(), openings_.end(), [id](const auto& one) { return one.second == id; });
}

bool Client::leaving(const std::string& name) const {
  return std::any_of(left_.begin(), left_.end(),
                     [&](const auto& one) { return one.second.name == name && opens(one.first); });
}

void Client::set_limits(AccountId id, const Limits& limits) {
  Call setting{Type::kLimits, id};
  setting.limits = limits;
  Lock lock(mutex_);
  call(lock, setting, deadline_in(kAnswer));
  if (const auto found = entries_.find(id); found != entries_.end()) found->second.limits = limits;
}

LeaseAnswer Client::demand(const LeaseDemand& demand) {
  Call asking{Type::kDemand, demand.account};
  asking.demand = &demand;
  LeaseAnswer answer;
  Lock lock(mutex_);
  try {
    call(
        lock, asking,
        demand.deadline + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(kGrace)));
    answer.taken = asking.taken;
  } catch (const Error& error) {
    if (error.kind() == Kind::kClosed) throw;
    answer.why = error.what();
    const auto found = entries_.find(demand.account);
    if (found != entries_.end() && !found->second.refused.empty()) answer.why = found->second.refused;
  }
  return answer;
}

void Client::give_back(AccountId id, size_t bytes) noexcept {
  const Lock lock(mutex_);
  const auto found = entries_.find(id);
  if (bytes == 0 || found == entries_.end()) return;
  if (found->second.remote) {
    post(0, Return{*found->second.remote, 0, bytes});
  } else {
    found->second.unreturned += bytes;
  }
}

void Client::changed() noexcept {
  if (!dirty_.exchange(true)) connection_.wake();
}

void Client::stop(bool nothing_left) noexcept {
  {
    const Lock lock(mutex_);
    if (stopping_) return;
    stopping_ = true;
    for (auto& [request, call] : calls_) {
      if (call->settling || call->done) continue;
      call->error.emplace(Kind::kClosed, "the arena has been closed; open a new one");
      call->done = true;
    }
    answered_.notify_all();
    chore_.notify_all();
  }
  connection_.wake();
  if (receiver_.joinable()) receiver_.join();
  tell_left(deadline_in(kLastWords));
  if (nothing_left) post(0, Bye{});
  connection_.disconnect();
  // A reclaimer that let go of the arena's last reference ends it from here.
  if (worker_.get_id() == std::this_thread::get_id()) {
    worker_.detach();
  } else if (worker_.joinable()) {
    worker_.join();
  }
}

}  // namespace tem::client
