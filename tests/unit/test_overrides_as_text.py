"""Values of keys that take text, on the command line: what is typed is meant, whatever YAML would make of it."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from data_pipeline.config import PipelineConfig
from opensora.config.conversion import ConversionConfig
from opensora.config.load import _parse_overrides, load_config
from opensora.config.run import RunConfig, SampleConfig
from opensora.config.schema import types_at, wants_list, wants_text
from opensora.utils.errors import UserError
from opensora.utils.sections import TABLE

COMMANDS = (RunConfig, SampleConfig, PipelineConfig, ConversionConfig)
ODD = [
    "my videos #1", "a # b", "#1", "a: b", "key: [x", "*.mp4", "*", "&a", "!t", "'", '"', "'a' b", '"a" #b', "a]", "-",
    "- a", "?", "%TAG", "@a", "`a", "|", ">", "2024", "1e5", "012", "0x10", "true", "no", "~", ".inf", "a=b", " a ", "",
    "{a}", "{", "a,b", "C:\\videos", "\u6620\u753b #2",
]  # fmt: skip
LETTERS = "ab 01.#:-*&!|>%@`'\"\\,=?~]}{\u00e9\u6620"


def text_keys(cls: type, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key path of a configuration at which any text is a value."""
    for field in dataclasses.fields(cls):
        keys = (*above, field.name)
        hint = get_type_hints(cls)[field.name]
        if get_origin(hint) is dict:  # of sections, by any name
            hint, keys = get_args(hint)[1], (*keys, "some")
        sections = [*field.metadata.get(TABLE, {}).values(), hint, *get_args(hint)]
        for section in {each for each in sections if dataclasses.is_dataclass(each)}:
            yield from text_keys(section, keys)
        if TABLE not in field.metadata and wants_text(hint):
            yield keys


KEYS = [(cls, keys) for cls in COMMANDS for keys in dict.fromkeys(text_keys(cls))]


def typed(draw: random.Random) -> str:
    return "".join(draw.choice(LETTERS) for _ in range(draw.randrange(1, 12)))


def test_the_keys_are_those_that_are_meant() -> None:
    found = {(cls, ".".join(keys)) for cls, keys in KEYS}
    assert {(PipelineConfig, "source"), (PipelineConfig, "out"), (RunConfig, "data.table"), (RunConfig, "name")} < found
    assert {(PipelineConfig, "captions.endpoint.url"), (RunConfig, "validate.table")} < found and len(found) > 100


@pytest.mark.parametrize("cls", COMMANDS, ids=lambda cls: cls.__name__)
def test_text_is_taken_as_it_stands(cls: type) -> None:
    draw = random.Random(5)
    for keys in (keys for of, keys in KEYS if of is cls):
        hints = types_at(cls, keys)
        for text in [*ODD, *(typed(draw) for _ in range(20))]:
            assert _parse_overrides(cls, [f"{'.'.join(keys)}={text}"]) == [(keys, text)], (keys, text)
        optional = any(type(None) in get_args(hint) for hint in hints)
        assert _parse_overrides(cls, [f"{'.'.join(keys)}=null"]) == [(keys, None if optional else "null")]
        listed: Any = ["a #1", "b"] if any(map(wants_list, hints)) else "[a #1, b]"
        words = '["a #1", b]' if isinstance(listed, list) else listed
        assert _parse_overrides(cls, [f"{'.'.join(keys)}={words}"]) == [(keys, listed)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("out: there\n")
    return path


@pytest.mark.parametrize("name", ["my videos #1", "2024", "a: b", "true"])
def test_a_folder_may_be_called_anything(name: str, config: Path) -> None:
    assert load_config(PipelineConfig, config, [f"source={name}"]).source == name
    assert load_config(PipelineConfig, config, [f'source=["{name}", b]']).source == [name, "b"]


def test_in_a_file_a_number_is_none_and_the_quotes_are_named(config: Path) -> None:
    for written, said in [
        ("2024", r'source=2024: must be text; write "2024" in quotes \(\S+run.yaml:1\)'),
        ("[a, 2024]", r'source\.1=2024: must be text; write "2024" in quotes'),
        ("{a: b}", "source={'a': 'b'}: must be text or a list, each text"),
    ]:
        config.write_text(f"source: {written}\nout: there\n")
        with pytest.raises(UserError, match=said):
            load_config(PipelineConfig, config)
