"""Fields of a request to a job: names, sizes, lengths, and what a model can do. Imports no torch.

A field is called as the shape of /v1/videos calls it, as other services do (``ALIASES``), or as the configuration of
sampling does. What is not asked is as the model's configuration says, but the seed: it is drawn, and told.
"""

import hashlib
import json
import math
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from opensora.config.schema import build, plain, suggestion
from opensora.sampling.options import MAX_SIDE, SamplingOption, sanitize_sampling_option
from opensora.serve.jobs import NewJob
from opensora.serve.model_info import ModelInfo
from opensora.serve.refusal import Refused
from opensora.utils.errors import UserError
from opensora.utils.files.untrusted import short

ALIASES = {"num_inference_steps": "num_steps", "guidance_scale": "guidance", "negative_prompt": "neg"}
OWN = ("prompt", "model", "seconds", "size", "input_reference", "neg", "cond_type", "lora", "priority")
HINTS: dict[str, Any] = get_type_hints(SamplingOption)
SAMPLING = tuple(field.name for field in fields(SamplingOption))
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(SamplingOption)}
FIELDS = (*OWN, *ALIASES, *SAMPLING)

MAX_PROMPT = 32_000  # characters
MAX_PRIORITY = 100  # and the least is as far below 0
MAX_SECONDS = 86_400.0
SEED_BITS = 53  # of drawn ones: what JavaScript's numbers hold, so that a page can hand one back
PLAIN_TEXT = "t2v"
_SIZE = re.compile(r"([0-9]{1,5})[xX]([0-9]{1,5})")
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{0,9})?")
_HEAD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
T = TypeVar("T")

Kind = Literal["image", "clip"]  # of a reference


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request that fits its model."""

    model: str
    prompt: str
    neg: str
    option: SamplingOption  # width, height, num_frames and seed are what will be sampled
    cond_type: str
    lora: str | None
    priority: int

    @property
    def seconds(self) -> float:
        return self.option.num_frames / self.option.fps

    def request(self, info: ModelInfo) -> dict[str, Any]:
        """``NewJob.request``."""
        chosen = plain(self.option)
        always = ("seed", "width", "height", "num_frames")
        usual = plain(_option({**info.defaults, "width": None, "height": None}))
        differing = {name: value for name, value in chosen.items() if name in always or value != usual[name]}
        return {
            "sampling": differing,
            "neg": self.neg,
            "cond_type": self.cond_type,
            "lora": self.lora,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """Texts of a request, which are checked as a configuration's are: no control characters, no lone surrogates."""

    prompt: str = ""
    neg: str = ""


def read(
    given: Mapping[str, Any],
    references: Sequence[Kind],
    models: Mapping[str, ModelInfo],
    default: str,
    *,
    needs_prompt: bool = True,
    most_priority: int = MAX_PRIORITY,
) -> Asked:
    """What a request asks for.

    Args:
        given: fields of JSON, or of a form (``form_fields``); without ``input_reference``.
        references: what its files are, in order.
        models: that can be asked for, by name.
        default: the model where none is named.
        most_priority: that the sender may ask for.

    Raises:
        Refused: 400 for what cannot be read or is out of range, 404 for another model, 403 for a priority, 422 for
            what this model cannot do; ``param`` is the field.
    """
    asked, called = _by_own_names(given)
    info = _model(asked, models, default)
    texts = _texts(asked, called, needs_prompt)
    option = _sized(_chosen(asked, info, called), asked, info, called)
    _check_solver(option, info, called)
    return Asked(
        model=info.name,
        prompt=texts.prompt,
        neg=texts.neg if "neg" in asked else info.neg,
        option=option,
        cond_type=_cond_type(asked, references, info),
        lora=_lora(asked, info),
        priority=_priority(asked, most_priority),
    )


def check_room(asked: Asked, info: ModelInfo) -> None:
    """
    Raises:
        Refused: 422 with the forecast; a process would run out of memory.
    """
    option = asked.option
    width, height = option.width or 0, option.height or 0
    needed = info.cost(width, height, option.num_frames)[0]
    if not info.room_bytes or needed <= info.room_bytes:
        return
    fitting = [frames for frames in info.frames if info.cost(width, height, frames)[0] <= info.room_bytes]
    hint = f"of this size {fitting[-1]} frames fit" if fitting else "take a smaller size"
    raise Refused(
        422,
        f"size={width}x{height} with {option.num_frames} frames: forecast is {needed / 2**30:.1f} GiB of a process, "
        f"which may use {info.room_bytes / 2**30:.1f}; {hint}",
        param="size",
        code="out_of_memory",
    )


def new_job(
    asked: Asked,
    info: ModelInfo,
    *,
    id: str,
    owner: str,
    references: tuple[str, ...] = (),
    expires_at: float | None = None,
    remixed_from: str | None = None,
    idempotency: str | None = None,
    digest: str = "",
) -> NewJob:
    """The job of a checked request; ``references`` are names in the store."""
    request = asked.request(info)
    together = {name: value for name, value in plain(asked.option).items() if name != "seed"}
    # the published noise of all clips of a batch comes from one seed, so such clips share none
    alone = id if asked.option.noise == "published" else ""
    key = [asked.model, together, asked.cond_type, asked.lora, alone]
    return NewJob(
        id=id,
        owner=owner,
        model=asked.model,
        prompt=asked.prompt,
        request=request,
        references=references,
        steps=asked.option.num_steps,
        batch_key=hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest(),
        priority=asked.priority,
        expires_at=expires_at,
        remixed_from=remixed_from,
        idempotency=idempotency,
        digest=digest,
    )


def new_id() -> str:
    return f"video_{secrets.token_hex(16)}"


def _by_own_names(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(fields by the names of this project, what the request calls them). A null where none can be is left out."""
    asked: dict[str, Any] = {}
    called: dict[str, str] = {}
    for name, value in given.items():
        if name not in FIELDS:
            hint = suggestion(str(name), FIELDS)
            raise Refused(400, f"{_shown(name)}: unknown field; {hint}", param=_shown(name), code="unknown_field")
        own = ALIASES.get(name, name)
        if value is None and (own in OWN or type(None) not in get_args(HINTS[own])):
            continue
        if own in asked:
            raise Refused(400, f"{name}: {called[own]} is the same; give one", param=name, code="invalid_value")
        asked[own], called[own] = value, name
    for one, other in (("size", "width"), ("size", "height"), ("seconds", "num_frames")):
        if one in asked and asked.get(other) is not None:
            raise Refused(400, f"{other}: {one} says it too; give one", param=other, code="invalid_value")
    return asked, called


def _model(asked: Mapping[str, Any], models: Mapping[str, ModelInfo], default: str) -> ModelInfo:
    name = asked.get("model", default)
    if not isinstance(name, str) or name not in models:
        known = ", ".join(models)
        message = f"model={_shown(name)}: must be one of {known}" if models else "model: none has been loaded yet"
        raise Refused(404, message, param="model", code="model_not_found")
    return models[name]


def _texts(asked: Mapping[str, Any], called: Mapping[str, str], needs_prompt: bool) -> _Texts:
    texts = {name: asked[name] for name in ("prompt", "neg") if name in asked}
    found: _Texts = _reading(lambda: build(_Texts, texts), called)
    for name, text in (("prompt", found.prompt), ("neg", found.neg)):
        if len(text) > MAX_PROMPT:
            message = f"{called[name]}: {len(text)} characters, must be at most {MAX_PROMPT}"
            raise Refused(400, message, param=called[name], code="too_long")
    if not found.prompt.strip() and (needs_prompt or "prompt" in asked):
        raise Refused(400, "prompt: missing; must be a text that says what to show", param="prompt", code="missing")
    return found


def _chosen(asked: Mapping[str, Any], info: ModelInfo, called: Mapping[str, str]) -> SamplingOption:
    """Everything but the size and length, which follow from several fields."""
    given = {name: value for name, value in asked.items() if name in SAMPLING}
    if ("width" in given) != ("height" in given):
        one, other = ("width", "height") if "width" in given else ("height", "width")
        raise Refused(400, f"{one} without {other}: give both, or size=WxH", param=one, code="invalid_value")
    if "num_steps" in given and "timestep_respacing" not in given and info.defaults.get("timestep_respacing"):
        name = called["num_steps"]
        raise Refused(422, f"{name}: this model's steps are chosen by timestep_respacing; give that", param=name)
    if "resolution" in given or "aspect_ratio" in given:
        given = {"width": None, "height": None, **given}
    if "size" in asked:
        given["width"], given["height"] = _size(asked["size"], info)
    if given.get("seed") is None:
        given["seed"] = secrets.randbits(SEED_BITS)
    elif isinstance(given["seed"], str) and re.fullmatch(r"[0-9]{1,19}", given["seed"]):
        given["seed"] = int(given["seed"])  # of clients whose numbers do not hold 63 bits
    sides = dict.fromkeys(("width", "height"), "size") if "size" in asked else {}
    return _option({**info.defaults, **given}, {**called, **sides})


def _option(values: Mapping[str, Any], called: Mapping[str, str] | None = None) -> SamplingOption:
    option: SamplingOption = _reading(lambda: build(SamplingOption, plain(dict(values))), called or {})
    return option


def _sized(
    option: SamplingOption, asked: Mapping[str, Any], info: ModelInfo, called: Mapping[str, str]
) -> SamplingOption:
    """The option with the size and the length that will be sampled."""
    option = _reading(lambda: sanitize_sampling_option(option, multiple=info.multiple), called)
    if "seconds" in asked:
        return replace(option, num_frames=info.nearest_frames(_seconds(asked["seconds"]) * option.fps))
    if option.num_frames not in info.frames:
        near = sorted(sorted(info.frames, key=lambda frames: abs(frames - option.num_frames))[:2])
        choices = " or ".join(map(str, near))
        raise Refused(
            422,
            f"num_frames={option.num_frames}: this model makes clips of {_some(info.frames)} frames; take {choices}",
            param="num_frames",
            code="invalid_value",
        )
    return option


def _check_solver(option: SamplingOption, info: ModelInfo, called: Mapping[str, str]) -> None:
    """That the solver fits what the model was trained for, and the rest the solver and the model."""
    solver = option.solver or next(iter(info.solvers), "")
    if info.solvers and solver not in info.solvers:
        message = f"solver={_shown(solver)}: this model has {', '.join(info.solvers)}; leave it out for the first"
        raise Refused(422, message, param="solver", code="invalid_value")
    for name in info.solvers.get(solver, ()):
        if getattr(option, name) != _DEFAULTS[name]:
            message = (
                f"{name}={_shown(getattr(option, name))}: is not for solver={solver}, which this one is; leave it out"
            )
            raise Refused(422, message, param=called.get(name, name), code="invalid_value")
    if option.guidance_low is not None and info.experts == 1:
        message = f"guidance_low={option.guidance_low:g}: is for two experts, and this is one model; leave it out"
        raise Refused(422, message, param="guidance_low", code="invalid_value")
    if info.channels and (option.cfg_channel or 0) > info.channels:
        message = (
            f"cfg_channel={option.cfg_channel}: must be at most {info.channels}, the latent channels of this model"
        )
        raise Refused(422, message, param="cfg_channel", code="invalid_value")


def _size(value: Any, info: ModelInfo) -> tuple[int, int]:
    found = _SIZE.fullmatch(value) if isinstance(value, str) else None
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 < min(sides) <= max(sides) <= MAX_SIDE:
        offered = ", ".join(f"{width}x{height}" for width, height in info.sizes)
        message = f'size={_shown(value)}: must be "WIDTHxHEIGHT" of 1 to {MAX_SIDE} pixels, as {offered}'
        raise Refused(400, message, param="size", code="invalid_value")
    return sides


def _seconds(value: Any) -> float:
    number = float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
    is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
    if not is_number or not math.isfinite(number) or not 0 < number <= MAX_SECONDS:
        message = f"seconds={_shown(value)}: must be a number > 0 and at most {MAX_SECONDS:g}"
        raise Refused(400, message, param="seconds", code="invalid_value")
    return float(number)


def _cond_type(asked: Mapping[str, Any], references: Sequence[Kind], info: ModelInfo) -> str:
    """The kind that is asked for, or the first that takes these references."""
    kind, count = asked.get("cond_type"), len(references)
    if kind is None:
        fitting = [one for one in info.cond_types if _takes(info, one, references)]
        if not fitting:
            raise Refused(422, _of_references(references, info), param="input_reference", code="invalid_value")
        return fitting[0]
    if not isinstance(kind, str) or kind not in info.cond_types:
        message = f"cond_type={_shown(kind)}: must be one of {', '.join(info.cond_types)}"
        raise Refused(422, message, param="cond_type", code="invalid_value")
    if not _takes(info, kind, references):
        of_clips = " of MP4" if takes_clips(kind) else ""
        wants = f"takes {info.references.get(kind, 0)} files{of_clips} as input_reference, not these {count}"
        raise Refused(422, f"cond_type={kind}: {wants}", param="cond_type", code="invalid_value")
    return kind


def takes_clips(kind: str) -> bool:
    """Whether references of a kind are clips; else pictures."""
    return kind.startswith("v2v")


def _takes(info: ModelInfo, kind: str, references: Sequence[Kind]) -> bool:
    wanted = "clip" if takes_clips(kind) else "image"
    return info.references.get(kind, 0) == len(references) and all(one == wanted for one in references)


def _of_references(references: Sequence[Kind], info: ModelInfo) -> str:
    kinds = [kind for kind in info.cond_types if info.references.get(kind, 0)]
    takes = (f"{info.references[kind]} {'clip' if takes_clips(kind) else 'image'} ({kind})" for kind in kinds)
    has = ", ".join(references) or "none"
    return f"input_reference: {has}; this model takes {', or '.join(takes) or 'none'}"


def _lora(asked: Mapping[str, Any], info: ModelInfo) -> str | None:
    name = asked.get("lora")
    if name is None or name == "":
        return None
    if not isinstance(name, str) or name not in info.loras:
        has = f"must be one of {', '.join(info.loras)}" if info.loras else "this model has none"
        raise Refused(422, f"lora={_shown(name)}: {has}", param="lora", code="invalid_value")
    return name


def _priority(asked: Mapping[str, Any], most: int) -> int:
    value = asked.get("priority", min(0, most))
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_PRIORITY:
        message = f"priority={_shown(value)}: must be an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        raise Refused(400, message, param="priority", code="invalid_value")
    if value > most:
        raise Refused(403, f"priority={value}: this key may ask for at most {most}", param="priority", code="forbidden")
    return value


def _reading(make: Callable[[], T], called: Mapping[str, str]) -> T:
    """``make()``; what it refuses names the field as the request called it."""
    try:
        return make()
    except (UserError, ValueError) as error:
        message = str(error)
        head = _HEAD.match(message)
        name = head[0] if head else ""
        known = called.get(name, name)
        raise Refused(400, known + message[len(name) :], param=known or None, code="invalid_value") from None


def _some(numbers: Sequence[int]) -> str:
    """All of a few, and both ends of many."""
    if len(numbers) <= 8:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:3]))}, ... {numbers[-1]}"


def _shown(value: Any) -> str:
    """A value of a request in a message: short, on one line."""
    return str(UserError(short(value if isinstance(value, str) else json.dumps(value, default=str))))
