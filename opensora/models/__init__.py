"""Denoisers, autoencoders and text encoders."""
