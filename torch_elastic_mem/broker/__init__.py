"""The daemon of one machine that keeps the ledger for all processes on it. No torch, no CUDA context."""
