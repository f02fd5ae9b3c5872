"""From a file to frames, in a process of its own that may die of it."""
