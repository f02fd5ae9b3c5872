"""The training run: put together in setup, driven by loop, one step's mathematics in step."""
