"""Checks of torch over an account's memory: a file a group, each run as a program of its own.

torch takes one CUDA allocator a process, and importing it takes seconds, so the checks of a group share one:
`python -m tests.alloc.torch_cuda_checks GROUP` installs the allocator, runs the group and prints a line of
JSON a check. GROUP "native" installs nothing and prints what torch's own allocator answers.
"""
