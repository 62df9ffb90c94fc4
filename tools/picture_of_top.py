"""Draws docs/top.svg: `tem top` over a real broker and the processes of a busy minute.

python tools/picture_of_top.py

The processes speak the broker's protocol and hold leases only: no memory is taken, and no GPU is needed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from tests.broker.tenant import Tenant  # noqa: E402
from torch_elastic_mem.broker.control import ControlClient  # noqa: E402
from torch_elastic_mem.broker.protocol import Ask, Limits, Open, Opened, Report  # noqa: E402
from torch_elastic_mem.priority import priority  # noqa: E402
from torch_elastic_mem.screen.top import picture  # noqa: E402

GiB = 1 << 30
WIDTH = 128
CAPACITY = 24 * GiB
# Process, account, class, bytes that it wants in each of its steps, minimum.
SCENE = (
    ("train.py", "fine-tune", "training", (14 * GiB,), 2 * GiB),
    ("evaluate.py", "nightly", "idle", (5 * GiB,), 0),
    ("serve.py", "chat", "serving", (2 * GiB, 2 * GiB, 2 * GiB), 1 * GiB),
    ("serve.py", "embed", "serving", (1 * GiB, 1 * GiB), 0),
)


def tenant(directory: Path, number: int) -> None:
    """A process of the scene: takes what it wants, then gives what it is asked for, until it is ended."""
    process, name, class_name, wants, least = SCENE[number]
    value = priority(class_name).value
    with Tenant(directory / "tenants.sock", process) as me:
        account = me.ask(Open(name, class_name, Limits(value, min=least), 0), Opened).account
        me.leases[account] = 0

        def give(ask_number: int, ask: Ask) -> None:
            # As long as a fence takes, so that there is something to see.
            time.sleep(0.004)
            me.give_all(ask_number, ask)
            report()

        def report() -> None:
            held = me.leases[account]
            me.send(Report(account, 0b11111, held, held // 16))

        me.answer = give
        for want in wants:
            me.get(account, want)
            report()
            me.serve(0.3)
        print("settled", flush=True)
        me.serve(600)


def draw(directory: Path, out: Path) -> None:
    environment = os.environ | {"TEM_RUNTIME_DIR": str(directory)}
    serve = "from torch_elastic_mem.cli import main; main()"
    options = ["--device", f"HOST={CAPACITY}", "--reserve", "HOST=512MiB,1GiB"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", serve, "serve", *options],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    ]
    try:
        assert started[0].stdout and started[0].stdout.readline()
        for number in range(len(SCENE)):
            me = [sys.executable, __file__, str(directory), str(number)]
            started.append(subprocess.Popen(me, env=environment, stdout=subprocess.PIPE))
        for each in started[1:]:
            assert each.stdout and each.stdout.readline()
        with ControlClient(directory / "control.sock") as client, open(os.devnull, "w") as nowhere:
            console = Console(record=True, width=WIDTH, file=nowhere, force_terminal=True)
            console.print(picture(client.state(), WIDTH))
        drawn = console.export_svg(title="tem top")
        # Whoever looks at it has a font of fixed width; none is fetched.
        out.write_text(re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL))
    finally:
        for each in reversed(started):
            each.terminate()
            each.wait()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        tenant(Path(sys.argv[1]), int(sys.argv[2]))
    else:
        with tempfile.TemporaryDirectory(prefix="tem-") as folder:
            draw(Path(folder), ROOT / "docs" / "top.svg")
