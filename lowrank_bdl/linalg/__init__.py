"""Structured linear algebra on tensors: moments, buffers, low-rank-plus-diagonal operators, Lanczos."""
