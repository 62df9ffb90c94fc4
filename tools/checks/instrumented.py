"""Runs the tests of the core on another build of it: python instrumented.py FOLDER [pytest's arguments].

FOLDER is where the package must come from; PYTHONPATH has to lead there. Tests of the core are those that
take a rung, and those marked `core`, since a state machine of hypothesis takes none. Tests whose arenas live
in processes of their own run on the everyday build wherever they run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Fixtures with arenas in processes of their own.
ELSEWHERE = {"machine", "sharer"}


class CoreTests:
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        core = [item for item in items if takes_rung(item) or item.get_closest_marker("core")]
        config.hook.pytest_deselected(items=[item for item in items if item not in core])
        items[:] = core


def takes_rung(item: pytest.Item) -> bool:
    names = getattr(item, "fixturenames", ())
    return "rung" in names and ELSEWHERE.isdisjoint(names)


def main() -> int:
    folder, *arguments = sys.argv[1:]
    # Imported before pytest puts the repository's root on sys.path, and with it the everyday build.
    from torch_elastic_mem import _C

    if not Path(str(_C.__file__)).is_relative_to(folder):
        sys.exit(f"the tests would run on {_C.__file__}, which is not under {folder}")
    return pytest.main(arguments, plugins=[CoreTests()])


if __name__ == "__main__":
    sys.exit(main())
