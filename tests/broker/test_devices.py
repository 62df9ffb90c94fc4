"""Which devices the broker has books of."""

from __future__ import annotations

import asyncio

from tests.broker.world import World
from torch_elastic_mem.broker.device_view import Reading
from torch_elastic_mem.broker.protocol import HOST, Welcome


def test_a_device_of_which_only_processes_tell_goes_with_the_last_of_them() -> None:
    world = World()
    holder, other = world.player(device="GPU-made-up"), world.player(device="GPU-made-up")
    holder.open("a").get(10)
    other.leave()
    holder.lose()
    assert world.lease("a", "GPU-made-up") == 10, "the process lives, and may come back"
    world.broker.bury(holder.process)
    world.wait(2.0)
    assert "GPU-made-up" not in world.broker.books
    world.player(device="GPU-made-up").leave()
    assert "GPU-made-up" not in world.broker.books


def test_a_device_that_is_seen_or_configured_or_the_machines_own_stays_without_processes() -> None:
    world = World()
    world.view.readings["GPU-seen"] = Reading(100, 0)
    for device in ("GPU-seen", "GPU-1", HOST):
        world.player(device=device).leave()
    assert world.broker.books.keys() == {"GPU-seen", "GPU-1", HOST}


def test_what_is_outside_as_a_process_connects_does_not_bound_what_it_may_ever_have() -> None:
    world = World()
    world.view.readings["GPU-1"] = Reading(100, 60)
    world.player(device="GPU-1").open("a")
    world.wait(5.0)
    assert world.broker.books["GPU-1"].device.capacity == 40
    assert world.player(device="GPU-1").welcome == Welcome(world.broker.epoch, 100)


def test_what_an_operator_waits_for_of_a_device_that_goes_is_answered() -> None:
    async def reclaim() -> int:
        world = World()
        player = world.player(device="GPU-made-up")
        player.open("a").get(10)
        gained = world.broker.reclaim("a", 10, timeout=5.0)
        player.leave()
        world.wait(6.0)
        assert "GPU-made-up" not in world.broker.books
        return await asyncio.wait_for(gained, 1.0)

    assert asyncio.run(reclaim()) == 0
