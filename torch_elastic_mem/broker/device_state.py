"""What the books of one device show."""

from __future__ import annotations

from torch_elastic_mem.broker.accounts import Accounts
from torch_elastic_mem.broker.asks import Asks
from torch_elastic_mem.broker.device import Device
from torch_elastic_mem.broker.pressure import Pressure
from torch_elastic_mem.broker.queue import Queue
from torch_elastic_mem.broker.shares import Shares
from torch_elastic_mem.broker.state import DeviceState


def device_state(
    device: Device,
    accounts: Accounts,
    shares: Shares,
    queue: Queue,
    asks: Asks,
    pressure: Pressure,
    now: float,
) -> DeviceState:
    """The device at this moment, its accounts from the highest class down."""
    ledger = accounts.ledger
    holders = sorted(accounts.holders.values(), key=lambda each: (-each.limits.value, each.id))
    waiting = {holder.id: sum(queued.bytes for queued in queue.of(holder)) for holder in holders}
    return DeviceState(
        uuid=device.uuid,
        label=device.label,
        backend=device.backend,
        total=device.total,
        capacity=ledger.capacity,
        outside=device.outside,
        reserve_low=accounts.reserve_low,
        reserve_high=accounts.reserve_high,
        leased=ledger.leased,
        free=ledger.free,
        queued=queue.bytes,
        pressure=pressure.parts(now),
        accounts=[
            each.state(now, waiting[each.id], asks.unanswered(each), asks.owed(each)) for each in holders
        ],
        shared=shares.states(),
    )
