"""Imported once by the fork server of harness.py: what each process of a test would compute anew."""

from opensora.planner.forecast import structure
from tests.dist.problem import MODEL

structure(MODEL)  # remembered by whoever is forked; half a second each time otherwise
