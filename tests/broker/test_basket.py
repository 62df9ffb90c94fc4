"""Memory between two processes: whose it may become, and that it is never more than what is free."""

from __future__ import annotations

import os

from torch_elastic_mem.broker.basket import Basket, Extent
from torch_elastic_mem.broker.descriptor import Descriptor

MiB = 1 << 20


def extent(nbytes: int, uid: int = 1) -> Extent:
    return Extent(nbytes, Descriptor(os.open(os.devnull, os.O_RDONLY)), uid)


def is_open(number: int) -> bool:
    return os.path.exists(f"/proc/self/fd/{number}")


def test_a_grant_takes_what_fits_into_its_bytes_and_the_rest_stays() -> None:
    basket = Basket()
    basket.put([extent(4 * MiB), extent(8 * MiB), extent(2 * MiB)])
    assert [each.bytes for each in basket.take(1, 7 * MiB)] == [4 * MiB, 2 * MiB]
    assert basket.bytes == 8 * MiB


def test_nobody_gets_what_another_user_has_written() -> None:
    basket = Basket()
    basket.put([extent(4 * MiB, uid=1), extent(4 * MiB, uid=2)])
    assert [each.uid for each in basket.take(2, 64 * MiB)] == [2]
    assert basket.bytes == 4 * MiB


def test_what_is_more_than_what_is_free_goes_to_the_device() -> None:
    basket = Basket()
    extents = [extent(4 * MiB), extent(4 * MiB)]
    numbers = [each.descriptor.number for each in extents]
    basket.put(extents)
    basket.shrink(5 * MiB)
    assert [is_open(number) for number in numbers] == [True, False]
    basket.shrink(0)
    assert basket.bytes == 0
    assert not is_open(numbers[0])


def test_a_descriptor_that_nobody_has_any_more_is_closed() -> None:
    one = Descriptor(os.open(os.devnull, os.O_RDONLY))
    number = one.number
    del one
    assert not is_open(number)
