"""Makes the environment that the Makefile works in, with the standard library alone."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OLDEST_TORCH = (2, 11)


def create(folder: Path, torch: str) -> None:
    """Makes the environment with torch and the build tools in it.

    A torch that this interpreter already has is used where it is: on a machine with a GPU that is the build
    which fits its driver. `torch`, a requirement such as "torch==2.11.0", overrides that.
    """
    check_tools()
    # From inside an environment, system_site_packages would show the base interpreter's packages instead.
    inherit = not torch and sys.prefix == sys.base_prefix and torch_version(sys.executable) >= OLDEST_TORCH
    venv.create(folder, with_pip=True, symlinks=True, system_site_packages=inherit)
    python = str(folder / "bin" / "python")
    install(python, *project()["build-system"]["requires"])
    if torch:
        install(python, torch)
    elif not inherit:
        install(python, "-r", str(ROOT / "requirements" / "torch.txt"))
    major, minor = torch_version(python)
    whose = "the system's" if inherit else "its own"
    print(f"{folder}: python {sys.version.split()[0]}, torch {major}.{minor}, {whose}")


def check_tools() -> None:
    """Stops with one line for each thing that is missing, before anything is downloaded."""
    missing = []
    if not shutil.which("g++"):
        missing.append("a C++ compiler: install g++")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python's headers: install python3-dev")
    if missing:
        sys.exit("cannot build the package without " + "; ".join(missing))


def torch_version(python: str) -> tuple[int, int]:
    """The (major, minor) of the torch that `python` imports, or (0, 0)."""
    answer = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
    )
    found = re.match(r"(\d+)\.(\d+)", answer.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def install(python: str, *requirements: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)


def project() -> dict[str, Any]:
    import tomllib  # here, so that an older python gets as far as main's message

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        sys.exit(
            f"python 3.11 to 3.13 is needed; this is {sys.version.split()[0]}: set PYTHON=python3.12, say"
        )
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("create", help="make an environment with torch and the build tools")
    making.add_argument("folder", type=Path)
    making.add_argument("--torch", default="", help="a requirement that overrides requirements/torch.txt")
    adding = commands.add_parser(
        "extra", help="install what extras of pyproject.toml name, and not the package"
    )
    adding.add_argument("names", nargs="+")
    arguments = parser.parse_args()
    try:
        if arguments.command == "create":
            create(arguments.folder, arguments.torch)
        else:
            extras = project()["project"]["optional-dependencies"]
            install(sys.executable, *(line for name in arguments.names for line in extras[name]))
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
