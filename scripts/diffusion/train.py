"""Entry point for torchrun and srun: ``python -m opensora.cli.train``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("opensora.cli.train", run_name="__main__")
