"""A server and a LoRA job with one copy of a frozen base model, each in a process of its own, on any machine.

    python examples/shared_base.py

On a GPU the same works with "cuda" in place of "host": the weights are on the card once. A real deployment
has `tem serve` running already; here the example starts one of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import torch_elastic_mem as tem

WIDTH, RANK = 1024, 8


def base_model() -> torch.nn.Sequential:
    """Without memory of its own: the weights come from what is shared."""
    with torch.device("meta"):
        return torch.nn.Sequential(
            torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)
        )


def serve(broker: str) -> None:
    """Loads the weights, shares them, and answers a request a line."""
    torch.manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape) / WIDTH**0.5 for name, tensor in base_model().state_dict().items()
    }
    with tem.Arena("host", capacity="64MiB", broker=broker) as arena:
        shared = tem.share(weights, "base", arena=arena)
    model = base_model().eval()
    model.load_state_dict(shared.tensors, assign=True)
    print(f"server: shares {tem.format_bytes(shared.nbytes)} as '{shared.name}'", flush=True)
    for line in sys.stdin:
        with torch.no_grad():
            answer = model(torch.full((WIDTH,), float(line))).norm()
        print(f"server: answers {answer:.4f}", flush=True)


def train(broker: str) -> None:
    """Trains a small adapter beside the frozen base."""
    model = base_model()
    shared = tem.attach("base", device="host", broker=broker)
    model.load_state_dict(shared.tensors, assign=True)
    model.requires_grad_(False)
    torch.manual_seed(1)
    down = torch.nn.Parameter(torch.randn(RANK, WIDTH) / WIDTH**0.5)
    up = torch.nn.Parameter(torch.zeros(WIDTH, RANK))
    optimizer = torch.optim.Adam([down, up], lr=1e-3)
    inputs = torch.randn(64, WIDTH)
    with torch.no_grad():
        wanted = 1.5 * model(inputs)
    for step in range(21):
        loss = (model(inputs) + inputs @ down.T @ up.T - wanted).square().mean()
        if step % 10 == 0:
            print(f"lora: step {step}: loss {loss.item():.4f}", flush=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip()


def request(server: subprocess.Popen[str]) -> str:
    assert server.stdin
    server.stdin.write("0.5\n")
    server.stdin.flush()
    return line_of(server)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="tem") as directory:
        command = "from torch_elastic_mem.cli import main; main()"
        broker = start("-c", command, "serve", "--directory", directory, "--device", "HOST=256MiB")
        print(line_of(broker))
        path = str(Path(directory) / "tenants.sock")
        server = start(__file__, "serve", path)
        print(line_of(server))
        before = request(server)
        print(before)
        job = start(__file__, "train", path)
        print(job.communicate()[0].rstrip())
        after = request(server)
        print(f"the job has gone, and the server answers {'the same' if after == before else 'otherwise'}")
        for process in (server, broker):
            process.terminate()
            process.communicate()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        {"serve": serve, "train": train}[sys.argv[1]](sys.argv[2])
    else:
        main()
