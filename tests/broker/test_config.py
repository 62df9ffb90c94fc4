"""The operator's file, and where a broker and its tenants meet."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest

from tests.programs import ROOT
from torch_elastic_mem.broker import paths
from torch_elastic_mem.broker.config import Config, merge, parse, read_table
from torch_elastic_mem.errors import InvalidArgument

GiB = 1 << 30
FILE = """
log = "/var/log/tem.log"
metrics = 9400
group = "gpu"

[device."HOST"]
capacity = "4GiB"
reserve = ["64MiB", "256MiB"]

[[grant]]
uid = 1000
max_value = 1000
max_min = "8GiB"
connections = 8

[[limits]]
name = "training"
max = "3GiB"
"""


def test_a_file_says_what_is_shared_and_who_may_ask(tmp_path: Path) -> None:
    (tmp_path / "broker.toml").write_text(FILE)
    config = parse(read_table(tmp_path / "broker.toml"))
    host = config.device_of("HOST")
    assert host.capacity_of("HOST", 64 * GiB) == 4 * GiB
    assert host.capacity_of("HOST", GiB) == GiB
    assert host.reserve_of("host", 4 * GiB) == (64 << 20, 256 << 20)
    assert config.grant_of(1000).connections == 8
    assert (
        config.grant_of(4321).max_value,
        config.grant_of(4321).max_min,
        config.grant_of(4321).connections,
    ) == (100, 0, 64)
    assert config.grant_of(os.geteuid()).max_value == 10**9
    assert (config.log, config.metrics, config.group) == ("/var/log/tem.log", 9400, "gpu")


def test_without_a_file_a_gpu_is_shared_whole_and_half_of_the_machine() -> None:
    unsaid = Config().device_of("anything")
    assert unsaid.capacity_of("GPU-1", 80 * GiB) == 80 * GiB
    assert unsaid.capacity_of("HOST", 64 * GiB) == 32 * GiB
    low, high = unsaid.reserve_of("cuda", 80 * GiB)
    assert 0 < low < high < 2 * GiB
    low, high = unsaid.reserve_of("cuda", 64 << 20)
    assert high <= 8 << 20


def test_the_command_line_goes_over_the_file() -> None:
    table = {"device": {"HOST": {"capacity": "4GiB", "reserve": ["1MiB", "2MiB"]}}, "metrics": 1}
    config = merge(
        table, capacities=["HOST=1GiB", "GPU-1=2GiB"], reserves=["GPU-1=0,1MiB"], metrics=2, log="x"
    )
    assert config.device_of("HOST").capacity_of("HOST", 64 * GiB) == GiB
    assert config.device_of("HOST").reserve_of("host", GiB) == (1 << 20, 2 << 20)
    assert config.device_of("GPU-1").reserve_of("cuda", GiB) == (0, 1 << 20)
    assert (config.metrics, config.log) == (2, "x")
    for bad in ("HOST", "=4GiB"):
        with pytest.raises(InvalidArgument, match="is not of the form HOST=4GiB"):
            merge({}, capacities=[bad])


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"devise": {}}, "unknown key 'devise'; did you mean 'device'?"),
        (
            {"device": {"HOST": {"capasity": 1}}},
            "unknown key 'capasity' in device.\"HOST\"; did you mean 'capacity'?",
        ),
        ({"grant": [{"uid": 1, "zzz": 1}]}, "unknown key 'zzz' in grant; there are uid, max_value"),
        ({"grant": [{}]}, "missing required field `uid`"),
        ({"metrics": "x"}, r"Expected `int \| null`, got `str`"),
        ({"device": {"HOST": {"capacity": "much"}}}, "'much' is not a size"),
        ({"device": {"HOST": {"reserve": ["2MiB", "1MiB"]}}}, "low <= high"),
        ({"device": {"HOST": {"capacity": 0}}}, "capacity is zero"),
        ({"device": {"HOST": {"capacity": "1MiB", "reserve": [0, "1MiB"]}}}, "leaves nothing of capacity"),
        ({"limits": [{"name": "a", "max": "x"}]}, "'x' is not a size"),
    ],
)
def test_what_is_wrong_in_a_file_is_said(table: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        parse(table)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("a = = b")
    for name in ("x.toml", "missing.toml"):
        with pytest.raises(InvalidArgument, match=name):
            read_table(tmp_path / name)


def test_the_configuration_that_the_docs_show_is_one() -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "operating.md").read_text(), re.DOTALL)
    config = parse(tomllib.loads(shown))
    assert config.grant_of(1000).max_value == 1000 and config.limits[0].max == "40GiB"


def test_the_directory_is_that_of_the_environment() -> None:
    assert paths.default_directory({"TEM_RUNTIME_DIR": "/a", "XDG_RUNTIME_DIR": "/b"}) == Path("/a")
    assert paths.default_directory({"XDG_RUNTIME_DIR": "/b"}) == Path("/b/torch_elastic_mem")
    assert paths.default_directory({}, uid=0) == Path("/run/torch_elastic_mem")
    assert paths.default_directory({}, uid=7) == Path("/tmp/torch_elastic_mem-7")
    assert paths.tenants_socket({"TEM_RUNTIME_DIR": "/a"}) == Path("/a/tenants.sock")
    assert paths.tenants_socket({"TEM_RUNTIME_DIR": "/a", "TEM_BROKER": "/c/d"}) == Path("/c/d")
    assert paths.broker_directory({"TEM_RUNTIME_DIR": "/a"}) == Path("/a")
    assert paths.broker_directory({"TEM_RUNTIME_DIR": "/a", "TEM_BROKER": "/c/d"}) == Path("/c")


@pytest.mark.parametrize("none", ["", "0"])
def test_who_wants_no_broker_has_no_socket_and_sees_the_others_of_the_directory(none: str) -> None:
    environment = {"TEM_RUNTIME_DIR": "/a", "TEM_BROKER": none}
    assert paths.tenants_socket(environment) is None
    assert paths.broker_directory(environment) == Path("/a")


def test_a_directory_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    made = paths.prepare(tmp_path / "a" / "b")
    assert made.directory.stat().st_mode & 0o777 == 0o700
    paths.prepare(tmp_path / "a" / "b", group=os.getegid())
    assert made.directory.stat().st_mode & 0o777 == 0o750
    assert paths.prepare(tmp_path / "a" / "b").directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_could_have_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(InvalidArgument, match=r"others may write to .*; run chmod 0700"):
        paths.prepare(tmp_path / "open")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(InvalidArgument, match="is no directory"):
            paths.prepare(tmp_path / name)
    with pytest.raises(InvalidArgument, match="too long for a socket"):
        paths.prepare(tmp_path / ("x" * 100))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 4321, 4321)
    with pytest.raises(InvalidArgument, match="belongs to user 4321, not 0"):
        paths.prepare(tmp_path / "theirs")
