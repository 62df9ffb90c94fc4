"""A KV cache that grows, shrinks and moves its blocks together, on any machine.

python examples/elastic_kv_cache.py [host|cuda]
"""

from __future__ import annotations

import sys

import torch

import torch_elastic_mem as tem


def main(device: str = "host") -> None:
    with (
        tem.Arena(device, capacity="256MiB") as arena,
        arena.account("chat", priority="serving") as chat,
        tem.ElasticKVTensor(chat, 4096, (2, 16, 4, 64), torch.bfloat16, layers=8) as kv,
    ):
        addressable = kv.num_blocks * kv.block_bytes
        print(
            f"addresses for {tem.format_bytes(addressable)}, memory for {tem.format_bytes(kv.resident_bytes)}"
        )

        pool = tem.BlockPool(kv)
        requests = [pool.allocate(8) for _ in range(100)]
        for number, blocks in enumerate(requests):
            kv.layer(0)[blocks] = float(number)
        print(f"100 requests: {tem.format_bytes(kv.resident_bytes)}")

        for blocks in requests[::2] + requests[1:90:2]:
            pool.free(blocks)
        live = requests[91::2]
        print(f"95 have gone: {tem.format_bytes(kv.resident_bytes)}, {tem.format_bytes(kv.live_bytes)} live")

        plan = pool.plan_compaction()
        kv.copy_blocks(plan.copies)
        plan.commit()
        moved = dict(plan.copies)
        live = [[moved.get(block, block) for block in blocks] for blocks in live]
        print(f"{len(plan.copies)} blocks moved: {tem.format_bytes(kv.resident_bytes)}")
        assert all(bool((kv.layer(0)[blocks] == 91 + 2 * i).all()) for i, blocks in enumerate(live))

        with kv.checked():
            try:
                kv.layer(0)[4000].sum()
            except tem.NotResident as error:
                print(f"debug mode: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
