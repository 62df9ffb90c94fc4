"""Benchmarks of torch_elastic_mem: each prints a table and saves its readings. See README.md."""
