"""Published weights to safetensors: ``python -m opensora.cli.convert WEIGHTS --to FOLDER model.kind=dit``.

Files of ``torch.save`` (.pt, .pth) are read without running anything that is in them, compared with the model by name
and shape, and written under the family's own names: what training and sampling read, and its own code as well; or under
other names of the same model, as --names=diffusers, with the config.json that goes with them. Types stay as they are.
Nothing is written of a file that does not fit.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

from opensora.assembly.conversion import convert_weights
from opensora.cli.main import run_cli
from opensora.config.conversion import ConversionConfig
from opensora.config.load import load_config
from opensora.utils.command_line.arguments import Parser, place, word


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog="python -m opensora.cli.convert",
        usage="%(prog)s WEIGHTS --to FOLDER model.kind=KIND [model.size=SIZE] [model.key=value ...]",
        description=(__doc__ or "").split("\n\n")[1],
    )
    parser.add_argument("weights", type=place, help="a .pt, .pth or .safetensors file, an index, or their folder")
    parser.add_argument("--to", type=place, required=True, help="folder to write model.safetensors to, or its shards")
    parser.add_argument("--names", type=word, help="of which release or library; as training exports if not given")
    args, overrides = parser.parse_known_args(argv)
    cfg = load_config(ConversionConfig, {}, overrides).model
    report, written = convert_weights(cfg, args.weights, args.to, args.names)
    print(report)
    print(f"written: {', '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    run_cli(main)
