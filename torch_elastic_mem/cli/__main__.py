"""`python -m torch_elastic_mem.cli`, for programs that start a command of `tem` where it is not on PATH."""

from torch_elastic_mem.cli.main import main

main(prog_name="tem")
