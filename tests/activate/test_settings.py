from __future__ import annotations

import pytest

import torch_elastic_mem as tem
from torch_elastic_mem.activate.settings import Settings, enabled, misspelt


def test_what_is_written_is_read_again() -> None:
    limits = {"min": "1GiB", "max": "none", "weight": "2"}
    for settings in (Settings(), Settings("idle", "night run", ("cuda", "cuda:3"), limits)):
        assert Settings.read(settings.variables()) == settings


def test_unset_and_empty_are_the_defaults() -> None:
    assert Settings.read({}) == Settings.read({"TEM_PRIORITY": "", "TEM_NAME": "", "TEM_DEVICE": " ,"})
    assert Settings.read({"TEM_MAX": ""}) == Settings.read({}) == Settings("training", "", ())


def test_a_name_that_is_nearly_one_of_ours_is_told_and_others_are_not() -> None:
    good = dict.fromkeys(("TEM_MAX", "TEM_BROKER", "TEM_RUNTIME_DIR", "TEM_ENABLE"), "1")
    assert misspelt(good | {"TEMPERATURE": "1", "TEM_SCANNER": "1", "HOME": "/"}) == []
    assert misspelt(good | {"TEM_PRIORTY": "idle", "TEM_MAXX": "1"}) == [
        "TEM_MAXX means nothing here; did you mean TEM_MAX?",
        "TEM_PRIORTY means nothing here; did you mean TEM_PRIORITY?",
    ]


def test_limits_go_over_those_of_the_class() -> None:
    variables = {"TEM_LOW": "1MiB", "TEM_HIGH": "4KiB", "TEM_MAX": "none", "TEM_WEIGHT": "0.5"}
    made = Settings.read(variables).priority_class()
    assert made == tem.PriorityClass("training", 100, low=1 << 20, high=4 << 10, weight=0.5)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TEM_PRIORITY": "urgent"}, "TEM_PRIORITY: no priority class 'urgent': use one of 'idle'"),
        ({"TEM_DEVICE": "cuda:0,cpu"}, "TEM_DEVICE: 'cpu' is no CUDA device"),
        ({"TEM_MIN": "much"}, "TEM_MIN: 'much' is not a size"),
        ({"TEM_MIN": "none"}, "TEM_MIN: 'none' is not a size"),
        ({"TEM_WEIGHT": "heavy"}, "TEM_WEIGHT: 'heavy' is not a weight"),
        ({"TEM_WEIGHT": "-1"}, "TEM_WEIGHT=-1: priority class 'training': weight"),
        ({"TEM_MIN": "2GB", "TEM_MAX": "1GB"}, "TEM_MIN=2GB, TEM_MAX=1GB: .* is above max"),
        ({"TEM_DEVICE": "gpu0"}, "TEM_DEVICE: unknown device 'gpu0'"),
    ],
)
def test_a_bad_value_is_told_with_its_variable(variables: dict[str, str], said: str) -> None:
    with pytest.raises(tem.InvalidArgument, match=f"^{said}"):
        Settings.read(variables)


def test_enabled_is_yes_or_no() -> None:
    assert enabled({}) and enabled({"TEM_ENABLE": "1"}) and not enabled({"TEM_ENABLE": "0"})
    with pytest.raises(tem.InvalidArgument, match="TEM_ENABLE is 'yes'"):
        enabled({"TEM_ENABLE": "yes"})


@pytest.mark.parametrize(
    ("devices", "rank", "visible", "served"),
    [
        ((), None, 8, [0]),
        ((), "3", 8, [3]),
        ((), "3", 1, [0]),
        ((), "", 8, [0]),
        ((), "-1", 8, [0]),
        (("cuda:2", "cuda"), "3", 8, [2, 0]),
    ],
)
def test_a_process_serves_its_own_device(
    devices: tuple[str, ...], rank: str | None, visible: int, served: list[int]
) -> None:
    environment = {} if rank is None else {"LOCAL_RANK": rank}
    assert Settings(devices=devices).indices(environment, visible) == served
