"""Entry point for torchrun and srun: ``python -m opensora.cli.sample``."""

import runpy

if __name__ == "__main__":
    runpy.run_module("opensora.cli.sample", run_name="__main__")
