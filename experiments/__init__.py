"""Thin, runnable scripts, one a published experiment: ``python -m experiments.NAME --help``."""

import warnings

# linear_operator scripts a function when it is imported, which newer torch deprecates: nothing its user can change.
warnings.filterwarnings("ignore", message=r".torch\.jit\.script. is (deprecated|not supported)")
