"""Sampling: weights into a sharded model, prompts into videos."""
