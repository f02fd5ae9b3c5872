"""Fields of a request: what sampling takes the service takes, and what it refuses names its field."""

import json
import math
from dataclasses import fields, replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.config.schema import plain
from opensora.inference.check import fitting_solvers, solver_of
from opensora.sampling.options import MAX_SEED, SamplingOption
from opensora.schedulers import OBJECTIVE_CONFIGS, SOLVERS
from opensora.serve.form_fields import from_form
from opensora.serve.model_info import ModelInfo
from opensora.serve.refusal import Refused
from opensora.serve.request import Asked, check_room, new_id, new_job, read
from opensora.utils.errors import UserError
from tests.stand_in_worker import TOY

MODELS = {"toy": TOY, "other": replace(TOY, name="other", neg="")}


def asked(given: dict[str, Any], references: tuple[Any, ...] = (), models: dict[str, ModelInfo] = MODELS) -> Asked:
    return read({"prompt": "a cat", **given}, references, models, "toy")


def refusal(given: dict[str, Any], references: tuple[Any, ...] = ()) -> Refused:
    with pytest.raises(Refused) as found:
        asked(given, references)
    return found.value


def test_nothing_asked_is_as_the_model_says() -> None:
    option = asked({}).option
    assert plain(replace(option, seed=0)) == {**TOY.defaults, "seed": 0, "fps": 8.0}
    assert (asked({}).cond_type, asked({}).neg, asked({}).lora) == ("t2v", "blurred", None)


def test_an_absent_seed_is_drawn() -> None:
    seeds = {asked({}).option.seed for _ in range(50)}
    assert len(seeds) == 50 and max(seeds) > 2**32  # by chance one of 2^50 times


@pytest.mark.parametrize(
    ("alias", "own", "value"),
    [("num_inference_steps", "num_steps", 7), ("guidance_scale", "guidance", 2.5), ("seed", "seed", MAX_SEED)],
)
def test_names_of_other_services(alias: str, own: str, value: Any) -> None:
    assert getattr(asked({alias: value}).option, own) == value
    assert getattr(asked(from_form([(alias, str(value))])).option, own) == value


def test_a_negative_prompt() -> None:
    assert asked({"negative_prompt": "dark"}).neg == asked({"neg": "dark"}).neg == "dark"
    assert asked({"negative_prompt": ""}).neg == asked(from_form([("neg", "")])).neg == ""


def test_a_seed_as_text_keeps_all_its_digits() -> None:
    assert asked({"seed": str(2**63 - 2)}).option.seed == 2**63 - 2


@pytest.mark.parametrize(
    ("wanted", "size"),
    [("64x32", (64, 32)), ("33x17", (48, 32)), ("1x1", (16, 16)), ("128X96", (128, 96))],
)
def test_sides_are_rounded_up(wanted: str, size: tuple[int, int]) -> None:
    option = asked({"size": wanted}).option
    assert (option.width, option.height) == size


def test_a_resolution_wins_over_the_models_size() -> None:
    option = asked({"resolution": "64px", "aspect_ratio": "16:9"}).option
    assert option.width and option.height and option.width > option.height > 32


@pytest.mark.parametrize(
    ("seconds", "frames"),
    [("1", 9), (1, 9), (0.1, 1), ("4", 33), ("12", 33), (1.4, 13), (1.375, 13), ("0.001", 1)],
)  # at 8 frames a second: 11 lies between 9 and 13, and the longer one is taken
def test_seconds_are_the_nearest_length(seconds: Any, frames: int) -> None:
    found = asked({"seconds": seconds})
    assert found.option.num_frames == frames
    assert found.seconds == frames / 8


def test_seconds_are_of_the_frame_rate_that_is_asked_for() -> None:
    assert asked({"seconds": 1, "fps": 16}).option.num_frames == 17


REFUSED: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "an unknown field": ({"guidence": 3}, 400, "guidence", "did you mean guidance"),
    "a path to write to": ({"output_path": "/etc/passwd"}, 400, "output_path", "unknown field"),
    "no prompt": ({"prompt": ""}, 400, "prompt", "missing"),
    "spaces": ({"prompt": " \n"}, 400, "prompt", "missing"),
    "a prompt that is a number": ({"prompt": 5}, 400, "prompt", "must be text"),
    "a prompt without end": ({"prompt": "x" * 32_001}, 400, "prompt", "32000"),
    "NUL in a prompt": ({"prompt": "a\0b"}, 400, "prompt", "U+0000"),
    "half of a pair": ({"prompt": "a\ud800"}, 400, "prompt", "U+D800"),
    "NUL in a negative prompt": ({"negative_prompt": "a\0b"}, 400, "negative_prompt", "U+0000"),
    "another model": ({"model": "sora-2"}, 404, "model", "toy, other"),
    "a model that is a path": ({"model": "../../etc"}, 404, "model", "toy"),
    "a model that is a list": ({"model": ["toy"]}, 404, "model", "toy"),
    "a size in words": ({"size": "large"}, 400, "size", "32x32, 64x32"),
    "a size of nothing": ({"size": "0x32"}, 400, "size", "WIDTHxHEIGHT"),
    "a size of a city": ({"size": "99999x99999"}, 400, "size", "16384"),
    "a size twice": ({"size": "32x32", "width": 32, "height": 32}, 400, "width", "size"),
    "half a size": ({"width": 32}, 400, "width", "height"),
    "no size at all": ({"size": None, "width": -16, "height": 32}, 400, "width", "-16"),
    "seconds of nothing": ({"seconds": 0}, 400, "seconds", "> 0"),
    "seconds of NaN": ({"seconds": math.nan}, 400, "seconds", "> 0"),
    "seconds that are true": ({"seconds": True}, 400, "seconds", "> 0"),
    "seconds in words": ({"seconds": "four"}, 400, "seconds", "four"),
    "seconds and frames": ({"seconds": 1, "num_frames": 9}, 400, "num_frames", "seconds"),
    "frames between": ({"num_frames": 10}, 422, "num_frames", "9 or 13"),
    "too many frames": ({"num_frames": 35}, 422, "num_frames", "33"),
    "no steps": ({"num_inference_steps": 0}, 400, "num_inference_steps", "must be an integer >= 1"),
    "a billion steps": ({"num_steps": 10**9}, 400, "num_steps", "10000"),
    "steps beyond all numbers": ({"num_steps": 10**400}, 400, "num_steps", "64 bits"),
    "half a step": ({"num_steps": 1.5}, 400, "num_steps", "whole number"),
    "steps twice": ({"num_steps": 2, "num_inference_steps": 2}, 400, "num_inference_steps", "num_steps"),
    "guidance of NaN": ({"guidance_scale": math.nan}, 400, "guidance_scale", "finite"),
    "guidance without end": ({"guidance": math.inf}, 400, "guidance", "finite"),
    "a negative seed": ({"seed": -1}, 400, "seed", "0 to 2^63-1"),
    "a seed of 64 bits": ({"seed": 2**63}, 400, "seed", "64 bits"),
    "no such cache": ({"cache": {"kind": "all"}}, 400, "cache", "first_block"),
    "a key of a cache": ({"cache": {"kind": "first_block", "treshold": 1}}, 400, "cache", "threshold"),
    "another kind": ({"cond_type": "v2v_tail"}, 422, "cond_type", "i2v_head"),
    "a kind without its picture": ({"cond_type": "i2v_head"}, 422, "cond_type", "takes 1 files"),
    "another adapter": ({"lora": "../oil"}, 422, "lora", "ink"),
    "a priority": ({"priority": 1000}, 400, "priority", "100"),
    "a priority in words": ({"priority": "high"}, 400, "priority", "integer"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    fields, status, param, words = REFUSED[case]
    found = refusal(fields)
    assert (found.status, found.param) == (status, param), found.message
    assert words in found.message and found.message.isprintable() and len(found.message) < 1200


def test_a_forbidden_priority() -> None:
    with pytest.raises(Refused) as found:
        read({"prompt": "x", "priority": 1}, (), MODELS, "toy", most_priority=0)
    assert found.value.status == 403
    assert read({"prompt": "x"}, (), MODELS, "toy", most_priority=-5).priority == -5


@pytest.mark.parametrize(
    ("references", "kind"),
    [((), "t2v"), (("image",), "i2v_head"), (("image", "image"), "i2v_loop"), (("clip",), "v2v_head")],
)
def test_the_kind_follows_from_the_references(references: tuple[Any, ...], kind: str) -> None:
    assert asked({}, references).cond_type == kind


@pytest.mark.parametrize("references", [("clip", "clip"), ("clip", "image"), ("image",) * 3])
def test_references_that_no_kind_takes(references: tuple[Any, ...]) -> None:
    found = refusal({}, references)
    assert (found.status, found.param) == (422, "input_reference")
    assert "1 image (i2v_head), or 2 image (i2v_loop), or 1 clip (v2v_head)" in found.message


def test_what_never_fits_is_refused_with_the_forecast() -> None:
    small = replace(TOY, room_bytes=2**20 + 64 * 32 * 32 * 9)
    check_room(asked({}), small)
    with pytest.raises(Refused) as found:
        check_room(asked({"num_frames": 13}), small)
    assert found.value.status == 422 and "of this size 9 frames fit" in found.value.message
    with pytest.raises(Refused, match="take a smaller size"):
        check_room(asked({"size": "512x512"}), small)


def test_jobs_of_one_batch_differ_in_seed_and_prompt_alone() -> None:
    def key(**given: Any) -> str:
        return new_job(asked(given), TOY, id=new_id(), owner="").batch_key

    assert key(seed=1) == key(seed=2, prompt="a dog", neg="x", priority=3)
    others = [{"num_steps": 5}, {"size": "64x32"}, {"num_frames": 5}, {"guidance": 1.0}, {"lora": "ink"}, {"fps": 9}]
    assert len({key(**one) for one in others} | {key()}) == len(others) + 1
    assert key(noise="published") != key(noise="published")  # all of its batch would have one seed


def test_a_request_tells_what_differs_and_gives_the_same_again() -> None:
    first = asked({"size": "33x32", "num_steps": 7, "cache": {"kind": "first_block"}})
    told = first.request(TOY)
    assert told["sampling"].keys() == {"width", "height", "num_frames", "seed", "num_steps", "cache"}
    assert json.loads(json.dumps(told)) == told
    again = asked({**told["sampling"], "neg": told["neg"], "cond_type": told["cond_type"], "lora": told["lora"]})
    assert again == first


def test_a_form_says_the_same_as_json() -> None:
    form = [("cache[kind]", "dbcache"), ("cache[first_blocks]", "2"), ("shift", "False"), ("fps", "12"), ("seed", "3"),
            ("motion_score", "null"), ("resolution", "64"), ("camera_motion", "null"), ("solver", "euler")]  # fmt: skip
    assert from_form(form) == {
        "cache": {"kind": "dbcache", "first_blocks": 2},
        "shift": False,
        "fps": 12,
        "seed": 3,
        "motion_score": None,
        "resolution": "64",
        "camera_motion": None,
        "solver": "euler",
    }
    assert from_form([("num_steps", ""), ("a[]", "1"), ("a[]", "2")]) == {"a": [1, 2]}


@pytest.mark.parametrize(
    "pairs",
    [
        [("seed", "1"), ("seed", "2")],
        [("cache", "1"), ("cache[kind]", "none")],
        [("cache[kind]", "none"), ("cache", "1")],
        [("a[]", "1"), ("a[b]", "1")],
        [("a[][b]", "1")],
        [("a[b][c][d][e]", "1")],
        [("", "1")],
        [("[a]", "1")],
        [("a]", "1")],
        [("n" * 201, "1")],
        [("camera_motion", "x" * 5000)],
    ],
)
def test_forms_that_say_nothing(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(Refused) as found:
        from_form(pairs)
    assert found.value.status == 400


SIZED = ("width", "height", "num_frames", "resolution", "aspect_ratio", "cache", "timestep_respacing")
NAMES = tuple(field.name for field in fields(SamplingOption) if field.name not in SIZED)
VALUES: dict[type, st.SearchStrategy[Any]] = {
    int: st.integers(-5, 12_000) | st.integers(),
    float: st.floats() | st.floats(-1, 1100) | st.integers(0, 50),
    bool: st.booleans(),
    str: st.sampled_from(["euler", "i2v", "distill", "keyed", "published", "", " ", "pan left", "\0"]),
}
ANY = st.one_of(*VALUES.values(), st.none(), st.lists(st.integers(), max_size=2))


@settings(max_examples=600, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), ANY, min_size=1, max_size=3))
def test_what_sampling_takes_is_taken(given: dict[str, Any]) -> None:
    """The dataclass itself, and types, judge; a null where none can be is as if it were not there."""
    hints = SamplingOption.__annotations__
    meant = {name: value for name, value in given.items() if value is not None or type(None) in get_args(hints[name])}
    fits = all(_is_of(hints[name], value) for name, value in meant.items())
    try:
        option = SamplingOption(**{**plain_defaults(), **meant}) if fits else None
    except ValueError:
        option = None
    if option is None:
        assert refusal(given).param in given
    else:
        found = asked({"seed": option.seed, **given}, models={"toy": replace(TOY, experts=2)}).option
        assert {name: getattr(found, name) for name in meant} == {name: getattr(option, name) for name in meant}


def plain_defaults() -> dict[str, Any]:
    return {name: value for name, value in TOY.defaults.items() if name != "cache"}


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value is of a type as a configuration has it: a whole number is a number, true is none."""
    if value is None:
        return True
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    if all(isinstance(kind, str) for kind in kinds):
        return isinstance(value, str)
    if isinstance(value, str):
        return kinds == [str] and not any(ord(char) < 32 for char in value)
    if isinstance(value, bool) or bool in kinds:
        return isinstance(value, bool) and bool in kinds
    is_number = isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 2**63
    return is_number and (float in kinds or (int in kinds and isinstance(value, int)))


@pytest.mark.parametrize("kind", OBJECTIVE_CONFIGS)
@pytest.mark.parametrize("solver", [None, *SOLVERS, "nope"])
@pytest.mark.parametrize(
    "more", [{}, {"eta": 0.5}, {"timestep_respacing": "10"}, {"clip_denoised": True}, {"flow_shift": 2}]
)
def test_solvers_are_those_of_the_command(kind: str, solver: str | None, more: dict[str, Any]) -> None:
    """What the sampling command refuses for a model of this objective is no job that fails: it is refused at once."""
    objective = OBJECTIVE_CONFIGS[kind]()
    models = {"toy": replace(TOY, solvers=fitting_solvers(objective))}
    given = {"solver": solver, "num_frames": 17, **more}
    try:
        solver_of("sampling", SamplingOption(**given), objective)
        wanted = None
    except UserError as error:
        wanted = str(error).removeprefix("sampling.").partition("=")[0]
    try:
        asked(given, models=models)
        found = None
    except Refused as refused:
        assert refused.status == 422
        found = refused.param
    assert found == wanted


def test_guided_channels_are_at_most_those_of_the_model() -> None:
    models = {"toy": replace(TOY, channels=16)}
    assert asked({"cfg_channel": 16}, models=models).option.cfg_channel == 16
    with pytest.raises(Refused, match="at most 16") as found:
        asked({"cfg_channel": 17}, models=models)
    assert (found.value.status, found.value.param) == (422, "cfg_channel")


def test_guidance_of_a_second_expert_is_for_models_that_have_one() -> None:
    models = {"toy": replace(TOY, experts=2)}
    assert asked({"guidance_low": 3.0}, models=models).option.guidance_low == 3.0
    with pytest.raises(Refused, match="is for two experts") as found:
        asked({"guidance_low": 3.0}, models={"toy": TOY})
    assert (found.value.status, found.value.param) == (422, "guidance_low")


def test_what_a_worker_tells_is_read_again() -> None:
    info = replace(TOY, solvers={"ddim": ("flow_shift",)}, channels=4)
    assert ModelInfo.read(json.loads(json.dumps(info.plain()))) == info
