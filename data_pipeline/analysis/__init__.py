"""Measurements of every frame, made side by side in the one decode: see ``base``."""
