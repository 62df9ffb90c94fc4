"""A file descriptor that is on its way."""

from __future__ import annotations

import os


class Descriptor:
    """Closed by `close`, or when nobody has it any more.

    Attributes:
        number: of the descriptor; -1 once it is closed.
    """

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        """Closes it; what it kept alive goes."""
        if self.number >= 0:
            number, self.number = self.number, -1
            os.close(number)

    def __del__(self) -> None:
        self.close()
