"""`tem`, the command line. It starts in a blink: no command's work is imported before it runs."""

from torch_elastic_mem.cli.main import main

__all__ = ["main"]
