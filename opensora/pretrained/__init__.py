"""Weights that come with the package: a model of the rendered shapes, small enough to be read by tests and a demo.

``weights=opensora/pretrained/shapes`` samples from it in a checkout; ``SHAPES`` is its place wherever the package is.
"""

from pathlib import Path

SHAPES = Path(__file__).resolve().parent / "shapes"  # export folder; made by benchmarks/learns_i2v.py
SHAPES_PROMPTS = SHAPES / "prompts.csv"  # text, name, colour, shape, direction, background: combinations it never saw
