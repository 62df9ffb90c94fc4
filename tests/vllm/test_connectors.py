"""KV connectors that are served touch a block only while it is held, or it is known which they copy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch

from torch_elastic_mem.integrations.vllm import connectors
from torch_elastic_mem.integrations.vllm.compat import Unsupported

OFFLOADING = {"kv_connector": "OffloadingConnector"}
SIMPLE = {"kv_connector": "SimpleCPUOffloadConnector"}


def config(name: str | None, path: str | None = None, **extra: Any) -> Any:
    return SimpleNamespace(
        kv_connector=name, kv_connector_module_path=path, kv_connector_extra_config=extra or None
    )


def test_the_connectors_that_are_served_are_vllms() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    assert set(KVConnectorFactory._registry) >= connectors.SERVED | {"MultiConnector"}
    assert set(OffloadingSpecFactory._registry) >= connectors.SPECS


@pytest.mark.parametrize(
    "served",
    [
        None,
        config(None),
        *map(config, sorted(connectors.SERVED)),
        config("OffloadingConnector", spec_name="TieringOffloadingSpec"),
        config("MultiConnector", connectors=[SIMPLE, OFFLOADING]),
    ],
)
def test_what_is_served_has_no_reason_against_it(served: Any) -> None:
    assert connectors.other_connector(served) is None


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (config("NixlConnector"), "NixlConnector may register or read all of the KV cache"),
        (config("ExampleConnector", "mine"), "ExampleConnector may register or read all"),
        (config("MultiConnector", "mine", connectors=[SIMPLE]), "MultiConnector may register"),
        (
            config("MultiConnector", connectors=[SIMPLE, {"kv_connector": "NixlConnector"}]),
            "NixlConnector may",
        ),
        (
            config("MultiConnector", connectors=[SIMPLE | {"kv_connector_module_path": "mine"}]),
            "served are ExampleConnector, OffloadingConnector, SimpleCPUOffloadConnector",
        ),
        (config("OffloadingConnector", spec_name="Mine", spec_module_path="mine"), "Mine may register all"),
    ],
)
def test_what_may_touch_blocks_without_memory_is_not_served(other: Any, why: str) -> None:
    assert why in str(connectors.other_connector(other))


@pytest.mark.parametrize("several", [False, True])
def test_an_engine_that_may_sleep_has_none_that_copies_what_nobody_holds(several: bool) -> None:
    made = config("MultiConnector", connectors=[SIMPLE, OFFLOADING])
    if not several:
        made = config("OffloadingConnector")
    assert "falls asleep" in str(connectors.other_connector(made, sleeps=True))
    assert connectors.other_connector(config("SimpleCPUOffloadConnector"), sleeps=True) is None


def layers(*kinds: str) -> Any:
    from vllm.v1 import kv_cache_interface

    made = []
    for kind in kinds:
        window = {"sliding_window": 32} if kind == "SlidingWindowSpec" else {}
        spec = getattr(kv_cache_interface, kind)(
            block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float16, **window
        )
        made.append(spec)
    return made


def test_blocks_that_leave_a_window_are_not_for_one_that_copies_what_nobody_holds() -> None:
    windows = layers("FullAttentionSpec", "SlidingWindowSpec")
    for each in (config("OffloadingConnector"), config("MultiConnector", connectors=[OFFLOADING])):
        with pytest.raises(Unsupported, match=r"SlidingWindowSpec.* VLLM_USE_SIMPLE_KV_OFFLOAD=1"):
            connectors.require_whole_layers(each, windows)
        connectors.require_whole_layers(each, layers("FullAttentionSpec"))
    for other in (None, config(None), config("SimpleCPUOffloadConnector")):
        connectors.require_whole_layers(other, windows)


def test_a_runner_allocates_by_its_configuration_and_only_then() -> None:
    class Runner:
        @staticmethod
        def use_uniform_kv_cache(groups: Any) -> bool:
            return True

    runner = Runner()
    with pytest.raises(KeyError), connectors.laid_out_as_configured(runner):
        assert not runner.use_uniform_kv_cache([])
        raise KeyError
    assert runner.use_uniform_kv_cache([])
    with connectors.laid_out_as_configured(object()):
        pass


def test_this_release_has_the_blocks_of_a_job_where_they_are_looked_for() -> None:
    import dataclasses

    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
        RequestGroupState,
        TransferJobStatus,
    )

    job = {field.name for field in dataclasses.fields(TransferJobStatus)}
    blocks = {name for name in job if "block" in name}
    assert blocks and blocks <= {*connectors.JOB_BLOCKS} and "is_store" in job
    assert "block_ids" in {field.name for field in dataclasses.fields(RequestGroupState)}


def test_an_engine_without_a_connector_has_no_copies() -> None:
    assert connectors.Copies(None).blocks() == set()
