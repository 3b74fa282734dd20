"""Docstring examples that need an optional package are left out where it is missing; their tests skip aloud."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("peft") else ["lowrank_bdl/integrations/adapters.py"]
