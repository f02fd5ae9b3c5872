"""Weights and adapters of files, for every family of models."""
