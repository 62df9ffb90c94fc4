"""The dashboard in examples/ asks for nothing that is not exported."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.broker.machine import machine, yielded
from torch_elastic_mem.observe.metrics import Collector

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "examples/deploy/grafana/torch_elastic_mem.json").read_text())


def exported() -> dict[str, set[str]]:
    """Names of samples and their labels."""
    collector = Collector(lambda since: (machine(), [yielded(1)]))
    labels: dict[str, set[str]] = {}
    for family in collector.collect():
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def expressions(panels: list[dict[str, Any]]) -> Iterator[str]:
    for panel in panels:
        yield from (target["expr"] for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


@pytest.mark.parametrize("expression", list(expressions(DASHBOARD["panels"])))
def test_every_metric_and_label_that_is_asked_for_is_exported(expression: str) -> None:
    there = exported()
    names = re.findall(r"\btem_\w+", expression)
    assert names
    for name in names:
        assert name in there
        selectors = re.search(rf"{name}\{{([^}}]*)\}}", expression)
        for label in re.findall(r"(\w+)=", selectors[1] if selectors else ""):
            assert label in there[name]
    for by in re.findall(r"by \(([^)]*)\)", expression):
        assert {label.strip() for label in by.split(",")} <= there[names[0]]


def test_every_legend_names_labels_that_are_there() -> None:
    there = exported()
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            (name, *_) = re.findall(r"\btem_\w+", target["expr"])
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= there[name], target


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells


def test_the_page_for_operators_lists_every_metric_and_no_other() -> None:
    page = (ROOT / "docs/operating.md").read_text()
    listed = set(re.findall(r"^\| `(tem_\w+)` \|", page, re.MULTILINE))
    endings = ("_bucket", "_sum")
    names = {name for name in exported() if not name.endswith(endings)}
    assert listed == {name.removesuffix("_count") for name in names}
