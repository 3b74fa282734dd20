"""Predictions of a network averaged over posterior draws of its weights, and how good they are."""
