// The receiving thread: what the broker says.
#include <algorithm>
#include <utility>

#include "client/client.hpp"

namespace tem::client {
namespace {

constexpr double kAgain = 0.1;  // seconds between attempts to find a broker

}  // namespace

void Client::listen() {
  Bytes message;
  std::vector<Fd> descriptors;
  for (;;) {
    {
      const Lock lock(mutex_);
      if (stopping_) return;
      if (!chores_.empty()) has_worker();
    }
    try {
      if (!connected()) rejoin();
      switch (connection_.wait(dirty_.load() ? next_report_ : next_look_, message, descriptors)) {
        case Connection::Event::kGone:
          lose();
          break;
        case Connection::Event::kMessage:
          handle(message, std::move(descriptors));
          break;
        case Connection::Event::kNothing:
          break;
      }
      if (Clock::now() < (dirty_.load() ? next_report_ : next_look_)) continue;
      report();
      const bool passes = connected() && !arena_->device().exchange.empty();
      if (passes && arena_->make_ready_to_pass()) changed();
    } catch (const std::exception&) {
      // No broker, one that cannot be understood, or no memory for what it says: what is leased stays, and it
      // is tried again.
      lose();
      connection_.wait(deadline_in(kAgain), message, descriptors);
    }
  }
}

void Client::lose() noexcept {
  connection_.disconnect();
  passed_.clear();
  const Lock lock(mutex_);
  openings_.clear();
  for (auto& [id, entry] : entries_) {
    entry.remote.reset();
    entry.unreturned = 0;
  }
  // This thread settles them: where an exception kept it from that, the call is asked again.
  for (auto& [request, call] : calls_) call->sent = call->settling = false;
  answered_.notify_all();
}

void Client::rejoin() {
  handshake(deadline_in(1.0));
  // Between the look at a lease and the OPEN that tells of it nothing goes back: the arena's lock is held.
  arena_->visit_leases([this](AccountId id, size_t lease) {
    const Lock lock(mutex_);
    const auto found = entries_.find(id);
    if (found == entries_.end()) return;
    // Whoever asks for it to be opened does so below. Who was refused that, or has closed it, may not have
    // woken up yet, and takes the entry away then.
    const Call* opening = question(id, Type::kOpen);
    const Call* closing = question(id, Type::kClose);
    const bool opens = opening != nullptr && (!opening->done || opening->error);
    const bool closed = closing != nullptr && closing->done && !closing->error;
    if (!opens && !closed) send_open(id, found->second, lease);
  });
  const Lock lock(mutex_);
  for (auto& [request, call] : calls_) try_send(request, *call);
  // Behind the others: one of the same name takes over what the broker knows of it.
  for (auto& [id, entry] : left_) send_open(id, entry, 0);
}

/// Closes at a broker what was closed without it. It receives in the place of the receiving thread, which has
/// ended, and calls nothing on the arena, which is closed or being destroyed. Until all is answered: a broker
/// may not hear the last words of a socket that is closed with something unread.
void Client::tell_left(Deadline deadline) noexcept {
  const auto any = [this] {
    const Lock lock(mutex_);
    return !left_.empty();
  };
  // The broker's own questions have numbers too.
  const auto is_answer = [this](const Header& header) {
    const auto type = static_cast<Type>(header.type);
    const Lock lock(mutex_);
    return (type == Type::kOpened || type == Type::kDone || type == Type::kRefused) &&
           openings_.count(header.request) != 0;
  };
  try {
    Bytes message;
    std::vector<Fd> descriptors;
    while (any() && Clock::now() < deadline) {
      if (!connected()) {
        handshake(deadline);
        const Lock lock(mutex_);
        for (auto& [id, entry] : left_) send_open(id, entry, 0);
      }
      const Connection::Event event = connection_.wait(deadline, message, descriptors);
      if (event == Connection::Event::kGone) lose();
      if (event != Connection::Event::kMessage) continue;
      const auto header = header_of(message.data(), message.size());
      if (header && is_answer(*header)) handle(message, {});
    }
  } catch (const std::exception&) {
    // No broker, or none that can be told.
  }
}

void Client::send_open(AccountId id, Entry& entry, size_t lease) {
  const uint64_t request = next_request_++;
  openings_[request] = id;
  entry.unreturned = 0;
  entry.refused.clear();
  entry.held = entry.idle = 0;
  entry.rungs = 0;
  entry.blocks = {};
  Open open{};
  open.name = Text<64>(entry.name);
  open.priority = Text<32>(entry.priority);
  open.limits = WireLimits(entry.limits);
  open.lease = lease;
  post(request, open);
}

std::optional<AccountId> Client::local(uint32_t remote) const {
  const Lock lock(mutex_);
  for (const auto& [id, entry] : entries_) {
    if (entry.remote == remote) return id;
  }
  return std::nullopt;
}

void Client::finish(uint64_t request, std::optional<Error> error) {
  const Lock lock(mutex_);
  const auto found = calls_.find(request);
  if (found == calls_.end()) return;
  found->second->error = std::move(error);
  found->second->done = true;
  found->second->settling = false;
  answered_.notify_all();
}

void Client::handle(const Bytes& message, std::vector<Fd> descriptors) {
  const auto header = header_of(message.data(), message.size());
  if (!header) throw Error(Kind::kBroker, "broker at " + path() + ": what it sent is no message");
  switch (static_cast<Type>(header->type)) {
    case Type::kOpened:
      return on_opened(*header, body_of<Opened>(message.data(), message.size()));
    case Type::kDone:
      return on_done(*header);
    case Type::kRefused:
    case Type::kDenied:
      return on_refused(*header, refusal_of(message.data(), message.size()));
    case Type::kGrant:
      return on_grant(*header, body_of<Granted>(message.data(), message.size()));
    case Type::kAsk:
      return on_ask(*header, body_of<Ask>(message.data(), message.size()));
    case Type::kPassed:
      return on_passed(*header, body_of<PassedOn>(message.data(), message.size()), std::move(descriptors));
    case Type::kSet:
      return on_set(body_of<Set>(message.data(), message.size()));
    default:
      throw Error(Kind::kBroker, "broker at " + path() + ": it sent a message of an unknown type");
  }
}

void Client::on_opened(const Header& header, const Opened& opened) {
  const Limits limits = opened.limits.limits();
  std::optional<Set> differs;
  {
    const Lock lock(mutex_);
    const auto opening = openings_.find(header.request);
    if (opening == openings_.end()) return;
    const AccountId id = opening->second;
    const auto found = entries_.find(id);
    if (found == entries_.end()) {
      post(header.request, Close{opened.account, 0});
      return;
    }
    openings_.erase(opening);
    Entry& entry = found->second;
    entry.remote = opened.account;
    if (const size_t bytes = std::exchange(entry.unreturned, 0)) post(0, Return{opened.account, 0, bytes});
    if (const auto call = calls_.find(header.request); call != calls_.end()) call->second->limits = limits;
    const WireLimits before(entry.limits);
    const bool same = std::memcmp(&before, &opened.limits, sizeof before) == 0;
    if (!same && calls_.count(header.request) == 0)
      differs = Set{opened.account, 0, Text<32>(entry.priority), opened.limits};
    entry.limits = limits;
    for (auto& [request, call] : calls_) {
      if (call->account == id) try_send(request, *call);
    }
  }
  finish(header.request, std::nullopt);
  if (differs) on_set(*differs);
  changed();
}

void Client::on_done(const Header& header) {
  {
    const Lock lock(mutex_);
    if (const auto closed = openings_.find(header.request); closed != openings_.end()) {
      left_.erase(closed->second);
      openings_.erase(closed);
      answered_.notify_all();
    }
  }
  finish(header.request, std::nullopt);
}

void Client::on_refused(const Header& header, const Error& why) {
  {
    const Lock lock(mutex_);
    if (const auto opening = openings_.find(header.request); opening != openings_.end()) {
      const AccountId id = opening->second;
      openings_.erase(opening);
      left_.erase(id);
      if (const auto found = entries_.find(id); found != entries_.end()) found->second.refused = why.what();
      for (auto& [request, call] : calls_)
        if (call->account == id && call->type == Type::kClose) call->done = true;  // it has no such account
      answered_.notify_all();
    }
  }
  finish(header.request, why);
}

/// Comes before the grant that it belongs to: till then it is not this process's.
void Client::on_passed(const Header& header, const PassedOn& passed, std::vector<Fd> descriptors) {
  for (Fd& descriptor : descriptors) passed_[header.request].push_back({passed.bytes, std::move(descriptor)});
}

void Client::on_grant(const Header& header, const Granted& granted) {
  auto passed = passed_.extract(header.request);
  const auto id = local(granted.account);
  if (!id) return;
  bool waiting = false;
  size_t take = 0;
  {
    const Lock lock(mutex_);
    if (const auto found = calls_.find(header.request); found != calls_.end() && !found->second->done) {
      found->second->settling = waiting = true;
      take = found->second->demand->take;
    }
  }
  std::optional<Error> error;
  bool taken = false;
  try {
    taken =
        arena_->leased(*id, granted.bytes, take, passed ? std::move(passed.mapped()) : std::vector<Passed>());
  } catch (const Error& closed) {
    error = closed;
  }
  {
    const Lock lock(mutex_);
    if (const auto found = calls_.find(header.request); found != calls_.end()) found->second->taken = taken;
  }
  finish(header.request, std::move(error));
  // Nobody waits any more: it is not kept from others.
  if (!waiting) arena_->collect_quietly();
}

void Client::on_ask(const Header& header, const Ask& ask) {
  const auto id = local(ask.account);
  const uint64_t request = header.request;
  const auto answer = [this, request, id = id.value_or(0), account = ask.account, on = connection_.number()](
                          size_t bytes, size_t coming, bool last, std::vector<Parting> passed = {}) {
    for (size_t next = 0; next < passed.size();) {
      Pass pass{account, 0, passed[next].bytes()};
      std::vector<Fd> descriptors;
      for (; next < passed.size() && passed[next].bytes() == pass.bytes; ++next)
        descriptors.push_back(std::move(passed[next].fd()));
      pass.count = static_cast<uint32_t>(descriptors.size());
      connection_.send(on, encode(request, pass), std::move(descriptors));
    }
    const Gave gave{account, last ? kLastAnswer : 0, bytes, coming};
    // Over another connection the ask means nothing. What it took from the lease did so with the arena's lock
    // held, as is the lease that the broker is told: either it was told less, or these go back by themselves.
    if (!connection_.send(on, encode(request, gave))) give_back(id, bytes);
  };
  if (!id) return answer(0, 0, true);
  const size_t pass = (ask.flags & kPassOn) != 0 && !arena_->device().exchange.empty() ? kMostFds : 0;
  Rung worst = ask.rung <= static_cast<uint32_t>(Rung::kPause) ? static_cast<Rung>(ask.rung) : Rung::kTrim;
  {
    // A thread that may hold the GIL waits for memory: a reclaimer that needs the GIL would wait for it.
    // Where it waits for the very account that is to give, its demand is taken back: who asks is of a higher
    // class, and must not wait until it is denied.
    const Lock lock(mutex_);
    for (const auto& [number, call] : calls_) {
      if (call->demand == nullptr || call->demand->own >= worst) continue;
      if (call->account == *id && call->sent && !call->settling) post(number, Withdraw{});
      worst = call->demand->own;
    }
  }
  Yielded now;
  std::vector<Parting> passed;
  const auto collect = [&](size_t, std::vector<Parting> more) {
    for (Parting& one : more) passed.push_back(std::move(one));
  };
  const std::string demander = ask.demander.str();
  try {
    now = arena_->yield(*id, ask.bytes, Rung::kTrim, Clock::now(), demander, pass, collect);
  } catch (const Error&) {
    return answer(0, 0, true);  // the account has gone, and its bytes with it
  }
  const size_t rest = ask.bytes - now.bytes;
  // Without a thread nobody can be called for the rest.
  const bool all = rest == 0 || (worst == Rung::kTrim && now.coming == 0);
  const bool last = all || !has_worker();
  const size_t left = pass - passed.size();
  answer(now.bytes, now.coming, last, std::move(passed));
  if (last) return;
  // The last answer leaves before the deadline, not at it.
  const Deadline deadline = deadline_in(static_cast<double>(ask.timeout) * 0.9e-6);
  add_chore([id = *id, rest, worst, deadline, demander, left, answer](Arena& arena) {
    try {
      arena.yield(id, rest, worst, deadline, demander, left,
                  [&](size_t bytes, std::vector<Parting> more) { answer(bytes, 0, false, std::move(more)); });
    } catch (const Error&) {
      // Closed meanwhile: what it held came back by itself.
    }
    answer(0, 0, true);
  });
}

void Client::on_set(const Set& set) {
  const auto id = local(set.account);
  if (!id) return;
  const Limits limits = set.limits.limits();
  const std::string priority = set.priority.str();
  {
    const Lock lock(mutex_);
    if (stopping_) return;
    if (const auto found = entries_.find(*id); found != entries_.end()) {
      found->second.limits = limits;
      found->second.priority = priority;
    }
  }
  try {
    arena_->limits_changed(*id, priority, limits);
  } catch (const Error&) {
    return;  // closed meanwhile, or it does not go with another account's, of which the next SET tells
  }
  const Lock lock(mutex_);
  if (const auto found = entries_.find(*id); found != entries_.end()) {
    Entry& entry = found->second;
    entry.set_again = true;
    entry.attempts = kAttempts;
    entry.rest = kRest;
    entry.next_attempt = Deadline{};
  }
  dirty_ = true;
}

}  // namespace tem::client
