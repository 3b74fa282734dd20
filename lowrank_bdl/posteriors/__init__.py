"""Distributions over network weights: collected, loaded, saved, and used through one covariance."""
