"""Adapters between serving or training frameworks and an arena.

One package a framework (`vllm`, `sglang`, `accelerate`), each added when it works, and each with a `compat`
module that alone knows the framework's versions. Imported as `torch_elastic_mem.integrations`.
"""
