"""Optimizers, on the device and on the CPU, and the moving average of weights."""
