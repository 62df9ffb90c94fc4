"""Benchmarks of the real vLLM, stock and on an arena. They need vLLM, and a GPU for figures to quote."""
