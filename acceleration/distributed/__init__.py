"""Processes: how they start, meet, are laid out on a mesh, exchange tensors and agree."""
