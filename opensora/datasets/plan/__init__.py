"""Which samples make up each step: a function of seed and step, the same on any number of processes."""
