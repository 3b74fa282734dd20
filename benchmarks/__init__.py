"""Time and memory against rank and size, beside peers and the limits of the machine (`python -m benchmarks.rank_scaling`)."""
