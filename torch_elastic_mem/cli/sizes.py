"""Sizes as arguments of a command."""

from __future__ import annotations

import click

import torch_elastic_mem as tem


class Bytes(click.ParamType[int]):
    """A size such as 4GiB."""

    name = "size"

    def convert(self, value: int | str, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Reads a size, or fails with the usage."""
        try:
            return tem.parse_bytes(value)
        except tem.InvalidArgument as error:
            self.fail(str(error), param, ctx)
