"""Thin, runnable scripts, one a published experiment: ``python -m experiments.NAME --help``."""
