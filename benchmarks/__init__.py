"""Time and memory against rank and size, beside peers and the machine's limits: `python -m benchmarks.rank_scaling`."""
