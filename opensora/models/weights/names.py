"""Names of tensors in files: what stands before the model's own, and what wrappers put in between."""

import difflib
from collections.abc import Collection, Mapping, Sequence

from opensora.utils.errors import UserError

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # of torch.compile, FSDP, recomputation
OTHER_MODELS = ("vae", "first_stage_model", "cond_stage_model", "conditioner", "text_encoders", "text_encoder")
_SHOWN = 4  # names in an error before "..."


def some(names: Collection[str]) -> str:
    """The first names, for a message."""
    return ", ".join(list(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def without_wrappers(name: str) -> str:
    """A name as it is in the model itself."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def plain_names(
    stored: Sequence[str], parts: Collection[str], path: str
) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """(prefix that all tensors of the model share, name in the file -> name in the model, names of other models).

    Tools put the model's own names behind the attributes that hold it: ``module.``, ``model.diffusion_model.``; and
    wrappers put theirs in between. Without any they are as in this package.

    Args:
        parts: first words of the model's own names.

    Raises:
        UserError: the file holds several sets of weights.
    """
    plain = {name: without_wrappers(name) for name in stored}
    prefixes: dict[str, str] = {}
    others = []
    for name, bare in plain.items():
        words = bare.split(".")
        if words[0] in OTHER_MODELS:
            others.append(name)
            continue
        at = next((i for i, word in enumerate(words) if word in parts), None)
        if at is not None:
            prefixes.setdefault("".join(f"{word}." for word in words[:at]), name)
    if len(prefixes) > 1:
        examples = " and ".join(list(prefixes.values())[:2])
        raise UserError(f"{path}: holds several sets of weights, as {examples}: give a file with one of them")
    prefix = next(iter(prefixes), "")
    for name in others:
        del plain[name]
    return prefix, {name: bare.removeprefix(prefix) for name, bare in plain.items()}, tuple(others)


def of_relative(names: Collection[str], signs: Mapping[str, str], family: str) -> str | None:
    """What a file is that holds the model of a family with more in it, and what to do; None: it is none.

    Args:
        signs: how a name begins that the family does not have -> the model that has it.
        family: what is read.
    """
    found = next((model for sign, model in signs.items() if any(name.startswith(sign) for name in names)), None)
    return found and f"these are weights of {found}, which is another model: give those of {family}"


def known_layers(
    layers: Collection[str], known: Collection[str], aliases: Mapping[str, str] | None = None
) -> tuple[str, dict[str, str]]:
    """(prefix that all layers have in a file, layer in the file -> its name in ``known``).

    Layers may have underscores for dots, as kohya's tools write them; which underscores were dots, ``known`` tells.

    Args:
        aliases: other names of layers -> the one in ``known``.

    Raises:
        ValueError: a layer that is not known, or could be two; two prefixes; some layers with dots and some without.
    """
    names = {name: name for name in known} | dict(aliases or {})
    flat: dict[str, list[str]] = {}
    for name, own in names.items():
        if own not in flat.setdefault(name.replace(".", "_"), []):
            flat[name.replace(".", "_")].append(own)
    parts = {name.partition(".")[0] for name in names}
    prefixes: dict[str, str] = {}
    dotted: dict[bool, str] = {}
    found = {}
    for layer in layers:
        prefix, name = _split_prefix(layer, parts)
        candidates = [names[name]] if name in names else flat.get(name, [])
        if len(candidates) != 1:
            raise ValueError(f"{layer}: {_not_one(name, candidates, names, flat)}")
        (found[layer],) = candidates
        prefixes.setdefault(prefix, layer)
        if "." in found[layer]:
            dotted.setdefault(name in names, layer)
    if len(prefixes) > 1:
        raise ValueError(f"{' and '.join(list(prefixes.values())[:2])}: layers of two models in one file")
    if len(dotted) > 1:
        raise ValueError(f"{' and '.join(dotted.values())}: names of two forms in one file; give a file of one")
    return next(iter(prefixes), ""), found


def _not_one(name: str, candidates: Sequence[str], known: Collection[str], flat: Mapping[str, Sequence[str]]) -> str:
    """Why a name is not one layer, with the layer whose name is nearest."""
    if candidates:
        return f"could be {' or '.join(candidates)}; give a file with dots in its names"
    close = difflib.get_close_matches(name[:200], known if "." in name else flat, n=1)
    return f"the model has no such layer{f' (nearest: {close[0]})' if close else ''}"


def _split_prefix(layer: str, parts: Collection[str]) -> tuple[str, str]:
    """What comes before the first part of the model in a layer's name, with dots or with underscores, and the rest."""
    bare = without_wrappers(layer)
    for mark in (".", "_"):
        for start in (0, *(i + 1 for i, character in enumerate(bare) if character == mark)):
            rest = bare[start:]
            if any(rest == part or rest.startswith(f"{part}{mark}") for part in parts):
                return bare[:start], rest
    return "", bare
