"""Every number of the configuration: a huge, a negative and a non-finite value is refused in one line that names it,
or the field is listed here as one that may have it."""

import dataclasses
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from opensora.config.load import load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.sampling.options import SamplingOption
from opensora.schedulers import OBJECTIVE_CONFIGS
from opensora.utils.errors import UserError
from opensora.utils.sections import TABLE
from tests.unit.test_config import GOOD

HUGE = ["1000000000000000", "9223372036854775807", "1.0e+18", "1.0e+308"]
NEGATIVE = ["-1", "-0.5", "-1000000000000000", "-1.0e+308"]
NOT_FINITE = [".nan", ".inf", "-.inf", "1e999", "-1e999"]
# field -> values that it may have after all
ALLOWED = {
    "seed": {"1000000000000000", "9223372036854775807"},  # any of 63 bits
    "text.seed": {"1000000000000000", "9223372036854775807"},
    "sampling.seed": {"1000000000000000", "9223372036854775807"},
    "validate.sampling.seed": {"1000000000000000", "9223372036854775807"},
    "validate.seed": {"1000000000000000", "9223372036854775807"},
    "lora_scale": {"-1", "-0.5"},  # adapters can be taken away
    "parallel.mesh.shard": {"-1"},  # all processes that are left
}
KINDS = {
    "model": ["model={kind: mmdit, size: debug, in_channels: 64, context_in_dim: 256, vec_in_dim: 256}"],
    "vae": ["vae={kind: dct, channels: 16}", "vae={kind: hunyuan}", "vae={kind: flux2d}", "vae={kind: wan}"],
    "text": ["text={kind: bytes}", "text={kind: t5_clip}", "text={kind: llava_clip}"],
    "image_encoder": ["image_encoder={kind: none}"],
    "objective": ["objective={kind: rectified_flow}"],
    "cache": [
        "cache={kind: first_block}",
        "cache={kind: dbcache}",
        "cache={kind: teacache}",
        "cache={kind: magcache, ratios: [1.0]}",
        "cache={kind: pyramid_attention}",
    ],
}


def numbers(cls: type, keys: tuple[str, ...] = (), chosen: str = "") -> Iterator[tuple[str, str]]:
    """(key path, override that chooses its section) of every field that holds a number."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path, hint = (*keys, field.name), hints[field.name]
        if TABLE in field.metadata:
            for override in KINDS[field.name]:
                kind = override.partition("kind: ")[2].partition(",")[0].rstrip("}")
                yield from numbers(field.metadata[TABLE][kind], path, ".".join((*keys, override)))
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from numbers(hint, path, chosen)
        elif {int, float} & {*_members(hint), *(get_args(hint) if get_origin(hint) is tuple else ())}:
            yield ".".join(path), chosen


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


# Two axes of -1 are told by the first of them.
_JOINED = {f"parallel.mesh.{axis}": r"parallel\.mesh\.shard=-1 with" for axis in ("cfg", "ring", "ulysses", "tensor")}
FIELDS = [(cls, *found) for cls in (RunConfig, SampleConfig) for found in numbers(cls)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[type, Path]:
    folder = tmp_path_factory.mktemp("limits")
    (folder / "run.yaml").write_text(GOOD)
    (folder / "sample.yaml").write_text("weights: outputs/trial\nprompt: a cat\n")
    return {RunConfig: folder / "run.yaml", SampleConfig: folder / "sample.yaml"}


def test_there_are_many() -> None:
    assert len(FIELDS) > 120
    known = {key for _, key, _ in FIELDS}
    assert set(ALLOWED) <= known


def test_every_kind_alone_is_good(files: dict[type, Path]) -> None:
    for cls, _, chosen in FIELDS:
        if chosen:
            load_config(cls, files[cls], [chosen])


@pytest.mark.timeout(600)  # 12 s on a quiet machine
def test_absurd_numbers(files: dict[type, Path]) -> None:
    done, wrong = 0, []
    for cls, key, chosen in FIELDS:
        for value in (*HUGE, *NEGATIVE, *NOT_FINITE):
            given = f"{key}=[{value}, {value}, {value}]" if key.endswith(("axes_dim",)) else f"{key}={value}"
            given = f"{key}=[{value}, {value}]" if key.endswith(("betas", "time_range", "ratios")) else given
            may = value in ALLOWED.get(key, ())
            done += 1
            try:
                load_config(cls, files[cls], [*([chosen] if chosen else []), given])
            except UserError as error:
                names_it = re.match(rf"{re.escape(key)}(\.[01])?[=:]|{_JOINED.get(key, 'a^')}", str(error))
                if may or not names_it or not str(error).isprintable():
                    wrong.append(f"{given}: {error}")
            else:
                if not may:
                    wrong.append(f"{given}: accepted")
    assert not wrong, f"{len(wrong)} of {done}\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("cls", "override", "said"),
    [
        (SampleConfig, "num_sample=1000000000", "num_sample=1000000000: must be at most 100000"),
        (SampleConfig, "sampling.num_steps=1000000000", "sampling.num_steps=1000000000: must be at most 10000"),
        (SampleConfig, "sampling.guidance=1e308", "sampling.guidance=1e+308: must be at most 1000"),
        (SampleConfig, "sampling.seed=-1", "sampling.seed=-1: must be an integer from 0"),
        (SampleConfig, "sampling.aspect_ratio=1000000000:1", "sampling.aspect_ratio=1000000000:1: must be"),
        (SampleConfig, "sampling.resolution=99999px", "sampling.resolution=99999px: with aspect_ratio=16:9 a side"),
        (SampleConfig, "sampling.fps=0.01", "sampling.fps=0.01: must be a number from 0.1 to 1000"),
        (RunConfig, "model.depth=1000000000", "model.depth=1000000000: must be at most 1000; every block"),
        (RunConfig, "model.mlp_ratio=1e-300", "model.mlp_ratio=1e-300: leaves no hidden unit"),
        (RunConfig, "data.buckets.64px.1000000000=[1.0, 1]", "data.buckets.64px.1000000000: the number of frames"),
        (RunConfig, "data.buckets.64px.9=[1.0, 1000000000]", "data.buckets.64px.9=[1.0, 1000000000]: the batch size"),
        (RunConfig, "name=" + "a" * 300, "name='aaaa"),
        (RunConfig, "name=" + "ä" * 120, "name='ä"),
    ],
)
def test_the_reason_is_said(files: dict[type, Path], cls: type, override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(cls, files[cls], [override])
    assert str(caught.value).startswith(said)


def test_a_width_without_end(files: dict[type, Path]) -> None:
    with pytest.raises(UserError, match=r"sampling\.width=1000000000: must be at most 16384; H\.264"):
        load_config(SampleConfig, files[SampleConfig], ["sampling.width=1000000000", "sampling.height=64"])


def test_what_a_person_sets_is_allowed(files: dict[type, Path]) -> None:
    given = ["fps=23.976", "fps=59.94", "fps=24", "num_steps=1000", "guidance=30", "seed=0", "resolution=2160p"]
    for override in given:
        load_config(SampleConfig, files[SampleConfig], [f"sampling.{override}"])
    for override in ("train.steps=10000000", "data.workers=64", "optim.lr=1", "guard.hang_s=86400", "seed=0"):
        load_config(RunConfig, files[RunConfig], [override])


def test_options_built_without_a_configuration_have_the_same_limits() -> None:
    limited: Any = SamplingOption.LIMITS
    for name in limited:
        with pytest.raises(ValueError, match=f"^{name}=.*must be at most"):
            SamplingOption(**{"width": 64, "height": 64, name: 2**63})


# Objectives of models that this run has none of; a job states them for weights that do not.
OBJECTIVES = ["objective={kind: iddpm}", 'objective={kind: rectified_flow_v1, version: "1.3"}']


def test_absurd_numbers_of_other_objectives(files: dict[type, Path]) -> None:
    may, tried = {("loc", "-1"), ("loc", "-0.5")}, 0
    for chosen in OBJECTIVES:
        load_config(SampleConfig, files[SampleConfig], [chosen])
        kind = chosen.partition("kind: ")[2].partition(",")[0].rstrip("}")
        fields = list(numbers(OBJECTIVE_CONFIGS[kind], ("objective",)))
        assert fields
        for key, _ in fields:
            for value in (*HUGE, *NEGATIVE, *NOT_FINITE):
                if (key.partition(".")[2], value) in may:
                    continue
                tried += 1
                with pytest.raises(UserError, match=rf"^{re.escape(key)}[=:]"):
                    load_config(SampleConfig, files[SampleConfig], [chosen, f"{key}={value}"])
    assert tried > 70
