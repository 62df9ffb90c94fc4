#include "arena/arena.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {
namespace {

constexpr double kLastFences = 5.0;  // seconds

/// CUDA devices that have an open arena. Leaked: an arena may close while static destructors run.
struct OpenDevices {
  std::mutex mutex;
  std::map<std::string, uint64_t> by_uuid;  // and the fork generation it was opened in
};
OpenDevices& open_devices() {
  static auto* const devices = new OpenDevices;
  return *devices;
}

void claim(const Capabilities& device) {
  OpenDevices& devices = open_devices();
  const std::lock_guard<std::mutex> guard(devices.mutex);
  const auto found = devices.by_uuid.find(device.uuid);
  if (found != devices.by_uuid.end() && found->second == fork_generation()) {
    throw Error(Kind::kInUse, "device " + device.uuid + " (" + device.device +
                                  ") has an open arena in this process; share it, or close it first");
  }
  devices.by_uuid[device.uuid] = fork_generation();
}

void unclaim(const Capabilities& device) {
  OpenDevices& devices = open_devices();
  const std::lock_guard<std::mutex> guard(devices.mutex);
  devices.by_uuid.erase(device.uuid);
}

}  // namespace

Options Arena::checked(Backend& backend, const Options& options) {
  const MemoryInfo memory = backend.memory_info();
  const size_t granularity = backend.capabilities().granularity;
  if (options.capacity > memory.total) {
    throw Error(Kind::kInvalid, "capacity " + format_bytes(options.capacity) +
                                    " is more than the device has: " + backend.capabilities().device +
                                    " has " + format_bytes(memory.total) + ", " + format_bytes(memory.free) +
                                    " of it free");
  }
  if (options.capacity < granularity) {
    throw Error(Kind::kInvalid, "capacity " + format_bytes(options.capacity) +
                                    " is less than one extent of " + format_bytes(granularity));
  }
  if (options.reserve_high < options.reserve_low) {
    throw Error(Kind::kInvalid, "reserve: the upper mark " + format_bytes(options.reserve_high) +
                                    " is below the lower mark " + format_bytes(options.reserve_low));
  }
  if (options.reserve_high >= options.capacity) {
    throw Error(Kind::kInvalid, "reserve " + format_bytes(options.reserve_high) +
                                    " leaves nothing of capacity " + format_bytes(options.capacity));
  }
  return options;
}

Grant::~Grant() {
  if (bytes_ == 0 || !arena_->device_->born.here()) return;
  const Arena::Lock lock(arena_->mutex_);
  arena_->give_back(account_, bytes_);
  arena_->settle_spare();
}

std::shared_ptr<Arena> Arena::open(std::shared_ptr<Backend> backend, Options options,
                                   std::shared_ptr<Upstream> upstream) {
  options = checked(*backend, options);
  if (backend->capabilities().backend == "cuda") claim(backend->capabilities());
  // In a forked child the other threads are gone and their locks may be held for ever: leave such an arena
  // be.
  std::shared_ptr<Arena> arena(new Arena(std::move(backend), options, std::move(upstream)), [](Arena* self) {
    if (self->device_->born.here()) delete self;
  });
  if (arena->spare_target() != 0) arena->start_worker();
  return arena;
}

Arena::Arena(std::shared_ptr<Backend> backend, const Options& options, std::shared_ptr<Upstream> upstream)
    : device_(std::make_shared<Device>(std::move(backend))),
      ledger_(options.capacity, options.reserve_low),
      mapper_(*device_),
      upstream_(std::move(upstream)),
      reserve_high_(options.reserve_high) {
  mapper_.set_budget(budget());
}

Arena::~Arena() {
  stop_worker();
  // Retired tenants hold extents whose fence has not passed. Their streams may never get there; then the
  // memory stays with the process rather than going while the device may still touch it.
  const Deadline deadline = deadline_in(kLastFences);
  const auto settled = [](const Seat& seat) { return seat.tenant->idle().pending == 0; };
  // An upstream's thread looks at the seats until it is stopped.
  const auto all_settled = [&] {
    const Lock lock(mutex_);
    return std::all_of(seats_.begin(), seats_.end(), settled);
  };
  while (!all_settled() && Clock::now() < deadline) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  bool left = false;
  {
    const Lock lock(mutex_);
    const auto pending = std::partition(seats_.begin(), seats_.end(), settled);
    left = pending != seats_.end();
    for (auto seat = pending; seat != seats_.end(); ++seat)
      new std::shared_ptr<Tenant>(std::move(seat->tenant));
    seats_.erase(pending, seats_.end());
  }
  stop_upstream(!left);
  if (!closed_ && device().backend == "cuda") unclaim(device());
}

void Arena::close() {
  device_->born.check("this arena");
  {
    const Lock lock(mutex_);
    if (closed_) return;
    if (!ledger_.accounts().empty()) {
      throw Error(Kind::kInUse, "the arena has open accounts: " + ledger_.holders() +
                                    "; close their tensors, then the accounts");
    }
    mapper_.shrink_spare(0);
    closed_ = true;
  }
  stop_upstream(true);
  stop_worker();
  if (device().backend == "cuda") unclaim(device());
}

void Arena::require_open() const {
  device_->born.check("this arena");
  if (closed_) throw Error(Kind::kClosed, "the arena has been closed; open a new one");
}

Arena::Lock Arena::lock() {
  device_->born.check("this arena");
  Lock lock(mutex_);
  require_open();
  return lock;
}

AccountId Arena::open_account(const std::string& name, const std::string& priority, const Limits& limits) {
  AccountId id = kNobody;
  {
    const Lock held = lock();
    id = ledger_.open(name, limits);
    tallies_[id].priority = priority;
    if (!upstream_) return id;
    ledger_.set_lease(id, 0);
  }
  std::optional<Limits> in_force;
  try {
    in_force = upstream_->open(id, name, priority, limits);
  } catch (const Error&) {
    const Lock held = lock();
    ledger_.close(id);
    tallies_.erase(id);
    throw;
  }
  const Lock held = lock();
  ledger_.set_limits(id, *in_force);
  return id;
}

void Arena::close_account(AccountId id) {
  unreserve(id);
  std::vector<std::shared_ptr<Reclaimer>>
      removed;  // outlive the lock: what their functions own may call back
  Lock held = lock();
  const std::string name = ledger_.at(id).name;
  trim_idle(nullptr);
  settle_spare();
  for (const Seat& seat : seats_) {
    if (seat.account != id) continue;
    std::string why = "; close it first";
    if (seat.retired && seat.tenant->idle().pending != 0) {
      why = ", closed but with a fence that has not passed; synchronize its stream";
    } else if (seat.retired) {
      why = ", closed, but the driver refused to take its memory back (" + last_fault_ + "); try again";
    }
    throw Error(Kind::kInUse, "account '" + name + "' still has " + seat.tenant->name() + why);
  }
  if (upstream_ && ledger_.at(id).held == 0) close_upstream(held, id);
  ledger_.close(id);
  tallies_.erase(id);
  const auto gone = std::stable_partition(reclaimers_.begin(), reclaimers_.end(),
                                          [&](const auto& reclaimer) { return reclaimer->account != id; });
  removed.assign(std::make_move_iterator(gone), std::make_move_iterator(reclaimers_.end()));
  reclaimers_.erase(gone, reclaimers_.end());
  changed_.notify_all();
}

Holding Arena::account(AccountId id) {
  const Lock held = lock();
  return ledger_.at(id);
}

std::string Arena::priority(AccountId id) {
  const Lock held = lock();
  (void)ledger_.at(id);
  return tallies_.at(id).priority;
}

void Arena::note_blocks(AccountId id, const Blocks& blocks) {
  const Lock held = lock();
  (void)ledger_.at(id);
  tallies_.at(id).blocks = blocks;
  if (upstream_) upstream_->changed();
}

size_t Arena::room(AccountId id) {
  const Lock held = lock();
  return ledger_.room(id);
}

bool Arena::wait_for_room(AccountId id, size_t bytes, Deadline deadline) {
  Lock held = lock();
  if (upstream_) return wait_for_lease(held, id, bytes, deadline);
  return changed_.wait_until(held, deadline, [&] {
    require_open();
    return ledger_.room(id) >= bytes;
  });
}

WriterId Arena::attach(std::shared_ptr<Tenant> tenant, AccountId account) {
  const Lock held = lock();
  (void)ledger_.at(account);
  seats_.push_back({std::move(tenant), account});
  return next_writer_++;
}

void Arena::retire(Tenant& tenant) noexcept {
  if (!device_->born.here()) return;
  const Lock held(mutex_);
  for (Seat& seat : seats_) seat.retired = seat.retired || seat.tenant.get() == &tenant;
  trim_idle(nullptr);
  settle_spare();
  if (anything_waits()) {
    start_worker();
    wake_worker();
  }
}

Grant Arena::grant_reserved(AccountId id, size_t bytes) {
  tallies_.at(id).reserved -= bytes;
  return Grant(shared_from_this(), id, bytes);
}

std::optional<Grant> Arena::acquire_free(AccountId id, size_t bytes) {
  const Lock held = lock();
  if (const auto found = tallies_.find(id); found != tallies_.end() && found->second.reserved >= bytes)
    return grant_reserved(id, bytes);
  if (!ledger_.grant(id, bytes)) return std::nullopt;
  return Grant(shared_from_this(), id, bytes);
}

void Arena::map(const Lock&, Grant& grant, const std::vector<Place>& places, WriterId writer, Stream stream) {
  size_t used = 0;
  for (const Place& place : places) used += place.piece.bytes;
  try {
    mapper_.map(places, writer, stream);
  } catch (const Error& error) {
    if (error.kind() != Kind::kOutOfMemory) throw;
    refuse(grant.account_, used,
           std::string(
               "the ledger granted it, the device has none left, so memory outside this arena fills it (") +
               error.what() + "); lower the arena's capacity or raise its reserve");
  }
  const size_t rest = grant.bytes_ - used;
  grant.bytes_ = 0;
  if (rest != 0) give_back(grant.account_, rest);
  if (upstream_) upstream_->changed();
  settle_spare();
}

bool Arena::allow_peer(int ordinal) {
  const Lock held = lock();
  if (peers_.count(ordinal) != 0) return false;
  device_->backend->add_peer(ordinal);
  for (const Seat& seat : seats_) {
    for (const Range* range : seat.tenant->ranges()) mapper_.allow(*range);
  }
  peers_.insert(ordinal);
  return true;
}

void Arena::give_back(AccountId id, size_t bytes) {
  ledger_.give_back(id, bytes);
  changed_.notify_all();
  if (upstream_) upstream_->changed();
}

size_t Arena::spare_target() const { return reserve_high_ - ledger_.reserve(); }

/// Spare bytes that may be: up to `target`, and never more physical memory than may be leased.
size_t Arena::spare_limit(size_t target) const {
  const size_t elsewhere = device_->created - mapper_.spare().bytes();
  const size_t most = budget();
  return std::min(target, most > elsewhere ? most - elsewhere : 0);
}

void Arena::release_excess() noexcept {
  try {
    // What a waiting demand will map next is not given to the driver only to be created again, nor what
    // fits under a lease that stays.
    const size_t leased = upstream_ ? leases() : 0;
    mapper_.shrink_spare(spare_limit(spare_target() + ledger_.queued() + leased));
  } catch (const Error& error) {
    note_fault(error);
  }
}

void Arena::settle_spare() noexcept {
  if (upstream_) return_leases();
  release_excess();
  if (mapper_.spare().bytes() < spare_limit(spare_target())) wake_worker();
}

void Arena::note_fault(const Error& error) {
  ++faults_;
  last_fault_ = error.what();
}

size_t Arena::refill() {
  size_t created = 0;
  for (;;) {
    // One extent a turn, so that a growth never waits for more than one create.
    const Lock held = lock();
    const size_t spare = mapper_.spare().bytes();
    const size_t limit = std::min(spare_limit(spare_target()), ledger_.free());
    const size_t room = limit > spare ? limit - spare : 0;
    if (room < granularity()) return created;
    const size_t size = std::min(kMaxExtent, floor_pow2(room));
    mapper_.add_spare(size);
    created += size;
  }
}

ArenaState Arena::state() {
  const Lock held = lock();
  ArenaState state;
  state.capacity = upstream_ ? upstream_->capacity() : ledger_.capacity();
  state.leased = ledger_.leased();
  state.free = upstream_ ? leases() - ledger_.leased() : ledger_.free();
  state.reserve_low = ledger_.reserve();
  state.reserve_high = reserve_high_;
  state.spare = mapper_.spare().bytes();
  state.created = device_->created;
  state.lost = device_->lost;
  state.faults = faults_;
  state.last_fault = last_fault_;
  for (const auto& [id, holding] : ledger_.accounts()) {
    const Tally& tally = tallies_.at(id);
    AccountState account{holding,     tally.priority, {},           {},          tally.given,
                         tally.taken, tally.yields,   tally.denied, tally.blocks};
    for (const auto& reclaimer : reclaimers_) {
      if (reclaimer->account == id) account.rungs.insert(reclaimer->rung);
    }
    for (const Seat& seat : seats_) {
      if (seat.account != id) continue;
      const Idle idle = seat.tenant->idle();
      account.idle.ready += idle.ready;
      account.idle.pending += idle.pending;
      account.idle.kept += idle.kept;
    }
    state.accounts.push_back(std::move(account));
  }
  return state;
}

}  // namespace tem
