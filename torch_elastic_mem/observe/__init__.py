"""What others may see of a broker: metrics, traces, and what is wrong with its machine."""
