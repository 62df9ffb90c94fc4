from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from torch_elastic_mem.cli import main

FILE = """
metrics = 9464

[device."HOST"]
capacity = "4GiB"

[[limits]]
name = "chat"
min = "1GiB"
"""


def tem(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["config", *arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "broker.toml").write_text(FILE)
    return tmp_path / "broker.toml"


def test_every_value_is_shown_with_where_it_comes_from(file: Path, runtime: Path) -> None:
    done = tem("--show", "--json", "--config", str(file))
    assert done.exit_code == 0, done.stderr
    shown = {each["key"]: (each["value"], each["source"], each["where"]) for each in json.loads(done.stdout)}
    assert shown["directory"] == (str(runtime), "environment", "TEM_RUNTIME_DIR")
    assert shown["config"] == (str(file), "flag", "--config")
    assert shown["metrics"] == (9464, "file", str(file))
    assert shown['device."HOST".capacity'] == ("4GiB", "file", str(file))
    assert shown['device."HOST".reserve'] == (None, "default", "")
    assert shown["limits[0].min"] == ("1GiB", "file", str(file))
    assert shown["group"] == (None, "default", "")


def test_without_a_file_all_is_by_default_or_environment(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEM_BROKER", "/elsewhere/tenants.sock")
    lines = tem("--show").stdout.splitlines()
    said = {line.split("  ")[0]: line for line in lines}
    assert said["tenants look at"].endswith('"/elsewhere/tenants.sock"  (environment TEM_BROKER)')
    assert said["metrics"].endswith("none  (default)")
    monkeypatch.setenv("TEM_BROKER", "0")
    assert "none  (environment TEM_BROKER)" in tem("--show").stdout


def test_options_of_serve_go_over_the_file(file: Path, runtime: Path) -> None:
    options = "--metrics 9000 --device HOST=2GiB --reserve HOST=1MiB,2MiB --directory /run/other"
    done = tem("--json", "--config", str(file), *options.split())
    shown = {each["key"]: (each["value"], each["source"], each["where"]) for each in json.loads(done.stdout)}
    assert shown["metrics"] == (9000, "flag", "--metrics")
    assert shown['device."HOST".capacity'] == ("2GiB", "flag", "--device")
    assert shown['device."HOST".reserve'] == (["1MiB", "2MiB"], "flag", "--reserve")
    assert shown["directory"] == ("/run/other", "flag", "--directory")
    assert shown["limits[0].name"][1] == "file"


def test_a_check_says_nothing_about_a_file_that_is_right(file: Path) -> None:
    done = tem("--config", str(file))
    assert (done.exit_code, done.output) == (0, "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metric = 1", "did you mean 'metrics'"),
        ('[device."HOST"]\ncapacty = 1', "did you mean 'capacity'"),
        ('[device."HOST"]\ncapacity = "much"', "not a size"),
        ("metrics = ", "broker.toml"),
    ],
)
def test_what_is_unknown_or_impossible_is_an_error_with_a_hint(file: Path, text: str, said: str) -> None:
    file.write_text(text)
    done = tem("--show", "--config", str(file))
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr and "broker.toml" in done.stderr


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    done = tem("--config", str(tmp_path / "none.toml"))
    assert done.exit_code == 2
    assert "No such file" in done.stderr
