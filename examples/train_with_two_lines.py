"""A small transformer learns to copy; its memory is an account's, by two lines where there is a GPU.

python examples/train_with_two_lines.py [steps]

The same without a change to the code: `tem run -- python train.py`.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

import torch_elastic_mem as tem


class Copier(nn.Module):
    """Reads eight letters and says them again."""

    def __init__(self, letters: int = 32, width: int = 64) -> None:
        super().__init__()
        self.letters = letters
        self.embed = nn.Embedding(letters, width)
        self.place = nn.Parameter(torch.randn(16, width) / 8)
        self.block = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, letters)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(16, device=text.device)
        hidden: torch.Tensor = self.block(self.embed(text) + self.place, src_mask=mask, is_causal=True)
        return self.head(hidden)  # type: ignore[no-any-return]

    def loss(self) -> torch.Tensor:
        half = torch.randint(self.letters, (64, 8), device=self.place.device)
        text = torch.cat([half, half], dim=1)
        said = self(text)[:, 7:15]
        return nn.functional.cross_entropy(said.flatten(0, 1), half.flatten())


def train(device: str, steps: int) -> None:
    torch.manual_seed(0)
    model = Copier().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(1, steps + 1):
        loss = model.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (1, steps):
            print(f"step {step}: loss {loss.item():.3f}")


def on_the_gpu(steps: int) -> None:
    # The two lines, before torch uses CUDA. All the rest is as it would be without them.
    allocator = tem.torch_allocator("cuda", priority="training")
    torch.cuda.memory.change_current_allocator(allocator)

    train("cuda", steps)

    held = allocator.account().held
    print(f"torch has allocated {tem.format_bytes(torch.cuda.max_memory_allocated())} at most")
    print(f"its account holds {tem.format_bytes(held)} of the arena on {tem.default_arena().device}")


def without_a_gpu(steps: int) -> None:
    print("torch sees no GPU here: the same training on the CPU, in an account's scope")
    with tem.Arena("host", capacity="512MiB") as arena, arena.account("training", "training") as account:
        with account.allocations():
            train("cpu", steps)
        print(f"its account held {tem.format_bytes(account.held)} of the arena on {arena.device} at the end")


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 150
    # A question that does not initialise CUDA.
    if torch.version.cuda is not None and torch.cuda.is_available():
        on_the_gpu(steps)
    else:
        without_a_gpu(steps)


if __name__ == "__main__":
    main()
