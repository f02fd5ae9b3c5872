"""Every command by its name: ``opensora buckets CONFIG.yaml`` is ``python -m opensora.cli.buckets CONFIG.yaml``.

Under torchrun and srun start the modules, or the scripts in scripts/diffusion, which are the same.
"""

import difflib
import runpy
import sys
from typing import NoReturn

# name -> module, what it does. The modules are not imported here: ``--help`` need not load torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("opensora.cli.train", "train a model, or go on with a run"),
    "sample": ("opensora.cli.sample", "make videos and stills from prompts"),
    "serve": ("opensora.cli.serve", "serve models over HTTP, with a queue that survives and a page"),
    "pipeline": ("data_pipeline.run", "from raw videos to a clip table"),
    "index": ("data_pipeline.index", "make a clip table of a folder of videos and images"),
    "buckets": ("opensora.cli.buckets", "show what a run would train on, bucket by bucket"),
    "precompute": ("opensora.cli.precompute", "encode a data set ahead of training"),
    "forecast": ("opensora.cli.forecast", "memory, bytes and time of layouts, without starting anything"),
    "preflight": ("opensora.cli.preflight", "look at processes and links, without training"),
    "calibrate": ("opensora.cli.calibrate", "fit the cost model to a run's records"),
    "plot": ("opensora.cli.plot", "draw a run's loss"),
    "shapes": ("data_pipeline.shapes", "render the data set of moving shapes"),
    "download": ("opensora.cli.download", "fetch published weights"),
    "convert": ("opensora.cli.convert", "write published weights, as .pt files, as safetensors"),
    "doctor": ("opensora.cli.doctor", "look whether the files of a configuration are there and fit, and what it needs"),
    "judge": ("data_pipeline.shapes.judge", "look whether samples of shapes show what their prompts say"),
    "config-reference": ("opensora.cli.config_reference", "write every key of the configuration to the docs"),
}


def main() -> NoReturn:
    """Run the command that is named first on the command line, with the rest as its own."""
    name, argv = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in ("", "-h", "--help"):
        print(overview())
        raise SystemExit(0 if name else 2)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name[:80], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"must be one of {', '.join(COMMANDS)}"
        print(f"error: {name[:80]!r}: unknown command; {hint}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv[:] = [f"opensora {name}", *argv]
    runpy.run_module(COMMANDS[name][0], run_name="__main__")
    raise SystemExit(0)


def overview() -> str:
    """Every command with a line on what it does."""
    lines = [f"  {name:<18}{about}" for name, (_, about) in COMMANDS.items()]
    several = "On several processes: bash launch/torchrun.sh N scripts/diffusion/train.py CONFIG.yaml, and so on."
    return "\n".join(["usage: opensora COMMAND ...   (opensora COMMAND --help says more)", "", *lines, "", several])


if __name__ == "__main__":
    main()
