"""Offline work on CPU nodes: from raw videos, or from nothing, to a clip table."""
