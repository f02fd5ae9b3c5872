"""Published weights to safetensors: ``python -m opensora.cli.convert WEIGHTS --to FOLDER model.kind=dit``.

Files of ``torch.save`` (.pt, .pth) are read without running anything that is in them, compared with the model by name
and shape, and written under the family's own names: what training and sampling read, and its own code as well; or under
other names of the same model, as --names=diffusers, with the config.json that goes with them. Types stay as they are.
Nothing is written of a file that does not fit. With --lora it is adapters, in any form, that are read and written in
one: comfyui (the default: the release's names behind diffusion_model.), diffusers, kohya, or peft.

    python -m opensora.cli.convert LORA --to lora.safetensors --lora --form kohya

What they add to the weights stays the same. The model is that of config.yaml beside them, as a LoRA run writes it, or
of the keys that are given.
"""

from opensora.utils import signal_handler

if __name__ == "__main__":  # before torch is imported, which takes long enough to be interrupted in
    signal_handler.listen_early()

from pathlib import Path

from opensora.assembly.adapter_files import FORM_NAMES, convert_adapters
from opensora.assembly.conversion import convert_weights
from opensora.cli.main import run_cli
from opensora.config.conversion import ConversionConfig
from opensora.config.load import load_config
from opensora.inference.find import saved_config
from opensora.utils.command_line.arguments import Parser, place, word
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = Parser(
        prog="python -m opensora.cli.convert",
        usage="%(prog)s FILE --to PLACE [--lora [--form FORM]] model.kind=KIND [model.size=SIZE] [model.key=value ...]",
        description=(__doc__ or "").split("\n\n")[1],
    )
    parser.add_argument("weights", type=place, help="a .pt, .pth or .safetensors file, an index, or their folder")
    parser.add_argument("--to", type=place, required=True, help="folder to write model.safetensors to, or its shards")
    parser.add_argument("--names", type=word, help="of which release or library; as training exports if not given")
    parser.add_argument("--lora", action="store_true", help="FILE is adapters; --to is a file too, or a folder")
    parser.add_argument("--form", choices=FORM_NAMES, help=f"of the adapters that are written; {FORM_NAMES[0]}")
    args, overrides = parser.parse_known_args(argv)
    _check_options(args.lora, args.names, args.form)
    if args.lora:
        model = _config(args.weights, overrides).model
        print(f"written: {convert_adapters(model, args.weights, args.to, args.form or FORM_NAMES[0])}")
        return 0
    cfg = load_config(ConversionConfig, {}, overrides).model
    report, written = convert_weights(cfg, args.weights, args.to, args.names)
    print(report)
    print(f"written: {', '.join(map(str, written))}")
    return 0


def _check_options(lora: bool, names: str | None, form: str | None) -> None:
    """That each is of what is converted."""
    if form is not None and not lora:
        raise UserError(f"--form {form}: is of adapters; give --lora too, or leave it out")
    if names is not None and lora:
        raise UserError(f"--names {short(names)}: is of weights; give --form with --lora, or leave it out")


def _config(adapters: Path, overrides: list[str]) -> ConversionConfig:
    """What adapters are for."""
    if overrides:
        return load_config(ConversionConfig, {}, overrides)
    saved = saved_config(adapters if adapters.is_dir() else adapters.parent)
    if saved is None:
        raise UserError(f"{adapters}: no config.yaml beside it says of which model it is; give model.kind=KIND")
    return ConversionConfig(model=saved.model)


if __name__ == "__main__":
    run_cli(main)
