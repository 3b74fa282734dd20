"""Curvature of a network's loss: Fisher information as sums over a data set."""
