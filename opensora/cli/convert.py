"""Published weights to safetensors: ``python -m opensora.cli.convert WEIGHTS --to FOLDER model.kind=dit``.

Files of ``torch.save`` (.pt, .pth) are read without running anything that is in them, compared with the model by name
and shape, and written under the family's own names: what training and sampling read, and its own code as well. Types
stay as they are. Nothing is written of a file that does not fit.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.cli.main import run_cli
from opensora.config.load import load_config
from opensora.models.base import ModelConfig
from opensora.models.families import MODEL_CONFIGS, MODEL_SIZES, build_model, family_of
from opensora.models.pretrained import not_finite
from opensora.models.weights.reader import WeightFile, load_state_dict_for
from opensora.utils.command_line.arguments import Parser, place
from opensora.utils.command_line.command import naming
from opensora.utils.errors import UserError
from opensora.utils.files.safetensors_files import write_weights
from opensora.utils.files.user_files import try_output
from opensora.utils.sections import section


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What the weights are of."""

    model: ModelConfig = section(MODEL_CONFIGS, sizes=MODEL_SIZES)  # the denoiser


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog="python -m opensora.cli.convert",
        usage="%(prog)s WEIGHTS --to FOLDER model.kind=KIND [model.size=SIZE] [model.key=value ...]",
        description=(__doc__ or "").split("\n\n")[1],
    )
    parser.add_argument("weights", type=place, help="a .pt, .pth or .safetensors file, an index, or their folder")
    parser.add_argument("--to", type=place, required=True, help="folder to write model.safetensors to, or its shards")
    args, overrides = parser.parse_known_args(argv)
    cfg = load_config(Conversion, {}, overrides).model
    format = family_of(cfg).weights
    with torch.device("meta"):
        model = build_model(cfg)
    layout = format.layout(cfg)
    _, report = load_state_dict_for(model, args.weights, format, to=layout, allow_missing=format.may_lack)
    to = format.original if getattr(format, "exports_original", False) else layout
    file = WeightFile(args.weights, format, to)
    if name := not_finite(file.items()):
        raise UserError(f"{args.weights}: {name} holds NaN or infinite values; give weights without")
    try_output(args.to, "--to", folder=True)
    with naming(args.to):
        written = write_weights(args.to, _tensors(file), to.metadata())
    print(report)
    print(f"written: {', '.join(map(str, written))}")
    return 0


def _tensors(file: WeightFile) -> Iterator[tuple[str, Tensor]]:
    return ((name, file[name].contiguous()) for name in file)


if __name__ == "__main__":
    run_cli(main)
