"""Strings of Open-Sora 1.x: mask strategies, kinds of 1.3, prompts with parts, scores and JSON, names of files; equal
to what the published code makes of them, and to rules written out here for whatever a seed gives."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora.conditioning.placed_frames import (
    KINDS_1_3,
    PREVIOUS,
    PlacedFrames,
    apply_mask_strategy,
    kind_of_clip,
    nearest_block,
    parse_mask_strategy,
)
from opensora.config.load import load_config
from opensora.config.run import SampleConfig
from opensora.inference.opensora_1x.prompts import merge_prompt, prompt_of_clip, split_json, split_prompt, with_scores
from opensora.inference.opensora_1x.sizes import clip_latents, frames_at_head, video_frames
from opensora.inference.prompts import Job, _job, read_jobs, with_names
from opensora.inference.save import output_folder
from opensora.models.base import AutoencoderShape
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.families import MODEL_CONFIGS, describe, family_of
from opensora.models.vae import AUTOENCODER_CONFIGS, autoencoder_shape
from opensora.sampling.options import SamplingOption
from opensora.utils.errors import UserError

RELEASES: list[Any] = ["1.2", "1.3"]


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def strings(golden: Path, release: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden / f"v1/inference_strings_v{release.replace('.', '_')}.json").read_text())
    return found


def numbered(plan: PlacedFrames, none: int) -> list[int]:
    """Where frames come from, as the golden files number it."""

    def number(reference: int, frame: int) -> int:
        return 5000 + frame if reference == PREVIOUS else 1000 * (reference + 1) + frame

    return [none if source is None else number(*source) for source in plan.sources]


def test_strategies_are_read_as_published(strings: dict[str, Any]) -> None:
    assert strings["parse_mask_strategy"]
    for text, expected in strings["parse_mask_strategy"]:
        assert [list(placed) for placed in parse_mask_strategy(text)] == expected, text
    assert parse_mask_strategy(None) == []


def test_strategies_are_applied_as_published(strings: dict[str, Any]) -> None:
    rows = strings["apply_mask_strategy"]["rows"]
    assert len(rows) == 64
    for text, frames, lengths, clip, align, mask, sources in rows:
        found = apply_mask_strategy(parse_mask_strategy(text), frames, lengths, clip, align)
        assert (list(found.edit_ratios), numbered(found, -1)) == (mask, sources), (text, frames, lengths, clip, align)


def test_frames_are_aligned_as_published(strings: dict[str, Any]) -> None:
    for frame, align, length, expected in strings["find_nearest_point"]:
        assert nearest_block(frame, align, length) == expected, (frame, align, length)


def test_parts_of_prompts_are_those_published(strings: dict[str, Any]) -> None:
    for prompt, (parts, indices) in strings["split_prompt"]:
        assert split_prompt(prompt) == (parts, indices)
    for prompt, expected in strings["merge_prompt"]:
        assert merge_prompt(*split_prompt(prompt)) == expected
    for prompt, clip, expected in strings["extract_prompts_loop"]:
        assert prompt_of_clip(prompt, clip) == expected, (prompt, clip)


def test_scores_are_written_as_published(strings: dict[str, Any], release: Any) -> None:
    rows = strings["append_score_to_prompts"]
    assert len(rows) >= 16
    for prompt, aes, flow, camera, expected in rows:
        assert with_scores(prompt, release, aes, flow, camera) == expected
        assert with_scores(prompt, "1.1", aes, flow, camera) == prompt


def test_json_behind_prompts_is_read_as_published(strings: dict[str, Any], release: Any) -> None:
    for prompt, text, reference, strategy in strings["extract_json_from_prompts"]["rows"]:
        if text == "error":
            with pytest.raises(ValueError, match=r"unknown key in the JSON|must have one"):
                split_json(prompt, release)
            continue
        found, told = split_json(prompt, release)
        assert (found, told.get("reference_path", ""), told.get("mask_strategy", "")) == (text, reference, strategy)


def test_files_are_called_as_published(strings: dict[str, Any], release: Any) -> None:
    """By a configuration of the family, as its flags set it."""
    for given, expected in strings["save_path"]:
        cfg = SampleConfig(
            weights="w",
            release=release,
            save_dir="out",
            save_prefix=given.get("sample_name", "")
            + ("" if given.get("prompt_as_path") else "_" * ("sample_name" in given)),
            prompt_as_path=given.get("prompt_as_path", False),
            num_sample=given.get("num_sample", 1),
        )
        job = _job(cfg, {"text": given.get("prompt", "a")}, given.get("sample_idx", 0), "prompt", given.get("k", 0))
        (named,) = with_names([job])
        assert str(output_folder(cfg) / named.name) == expected


def test_frames_at_the_head_are_those_published(golden: Path) -> None:
    """1.2 joins clips in pixels, where latent frames of the clip before end."""
    rows = json.loads((golden / "v1/inference_strings_v1_2.json").read_text())["dframe_to_frame"]
    shape = autoencoder_shape(AUTOENCODER_CONFIGS["opensora_v1_2"](path="x"))
    for latents, expected in rows:
        assert frames_at_head(latents, shape) == expected
    assert frames_at_head(4, autoencoder_shape(AUTOENCODER_CONFIGS["sd"](path="x"))) == 4
    causal = AutoencoderShape(channels=4, stride=(4, 8, 8), causal=True)
    assert (frames_at_head(3, causal), frames_at_head(3, causal._replace(causal=False))) == (9, 12)


def test_models_are_told_the_size_that_is_published(strings: dict[str, Any]) -> None:
    """What 1.x calls multi-resolution information."""
    kinds = {"STDiT2": "stdit2", "OpenSora": "stdit3", "PixArtMS": "pixart_ms"}
    for name, (height, width), frames, fps, expected in strings["prepare_multi_resolution_info"]:
        cfg = MODEL_CONFIGS[kinds[name]]()
        told = Conditions(
            text=torch.zeros(2, 1, 8),
            dropped=torch.zeros(2, dtype=torch.bool),
            fps=torch.full((2,), float(fps)),
            size=torch.tensor([[float(height), float(width)]] * 2),
            num_frames=torch.full((2,), float(frames)),
        )
        tokens = TokenBatch(x=torch.zeros(2, 1, 1, 4), positions=torch.zeros(2, 1, 1, 3), grid=(1, 1, 1))
        found = family_of(cfg).arguments(cfg, tokens, torch.zeros(2), told)
        assert {key for key in expected if key in found or key in found.get("data_info", {})} >= (
            {"ar", "hw"} if name == "PixArtMS" else {"fps", "height", "width"}
        )
        for key, value in expected.items():
            ours = found.get("data_info", found).get(key)
            if ours is not None:
                assert torch.equal(ours.double(), torch.tensor(value, dtype=torch.float32).double()), (name, key)


def test_kinds_of_1_3_give_the_published_frames(golden: Path) -> None:
    rows = json.loads((golden / "v1/inference_strings_v1_3.json").read_text())["prep_ref_and_mask"]["rows"]
    assert len(rows) == 36
    for kind, length, frames, references, loop, indices, sources in rows:
        later = isinstance(loop, str)
        clip, clips = (2 if "True" in loop else 1, 3) if later else (0, loop)
        found = kind_of_clip(kind or "t2v", length, frames, references, clip=clip, clips=clips)
        assert (found.given, numbered(found, 0)) == (indices, sources), (kind, frames, references, loop)


# Whatever a seed gives, against the rules written out once more, frame by frame.
def parsed_by_hand(text: str) -> list[list[float]]:
    tuples = []
    for part in text.split(";"):
        given = [float(word) for word in part.split(",")]
        tuples.append(given + [0, 0, 0, 0, 1, 0][len(given) :])
    return tuples


def by_hand(text: str, frames: int, lengths: list[int], clip: int, align: int | None) -> tuple[list[float], list[int]]:
    """(edit ratio, source) of every frame: what the last tuple that covers it says."""
    ratios, sources = [], []
    for frame in range(frames):
        ratio, source = 1.0, -1
        for number, reference, first, start, length, edit in parsed_by_hand(text):
            if number != clip:
                continue
            held = lengths[int(reference)]
            first, start = (held + first) if first < 0 else first, (frames + start) if start < 0 else start
            if align:
                choices = [
                    min((align * block for block in range(most // align + 1)), key=lambda x: (abs(x - at), x))
                    for at, most in ((first, held), (start, frames))
                ]
                limits = [max(held // align - 1, 0) * align, max(frames // align - 1, 0) * align]
                down = [first // align * align, start // align * align]
                first, start = (max(low, min(one, most)) for one, most, low in zip(choices, limits, down, strict=True))
            if start <= frame < start + length and first + frame - start < held:
                ratio, source = edit, int(1000 * (reference + 1) + first + frame - start)
        ratios.append(ratio)
        sources.append(source)
    return ratios, sources


def drawn_strategy(rng: random.Random, frames: int, lengths: list[int], clips: int) -> str:
    tuples = []
    for _ in range(rng.randint(1, 4)):
        reference = rng.randrange(len(lengths))
        held = lengths[reference]
        fields = [
            *(rng.randrange(clips), reference, rng.randrange(-held, held), rng.randrange(-frames, frames)),
            *(rng.randint(1, 2 * frames), rng.choice([0, 1, 0.5, rng.random()])),
        ]
        space = rng.choice(["", " "])
        tuples.append(f",{space}".join(str(field) for field in fields[: rng.randint(1, 6)]))
    return ";".join(tuples)


def test_any_strategy_is_applied_by_the_rules() -> None:
    rng = random.Random(7)
    for _ in range(1500):
        frames, clips, align = rng.randint(1, 24), rng.randint(1, 3), rng.choice([None, 1, 2, 5])
        lengths = [rng.randint(1, 24) for _ in range(rng.randint(1, 3))]
        text, clip = drawn_strategy(rng, frames, lengths, clips), rng.randrange(clips)
        found = apply_mask_strategy(parse_mask_strategy(text), frames, lengths, clip, align)
        assert (list(found.edit_ratios), numbered(found, -1)) == by_hand(text, frames, lengths, clip, align), (
            text,
            frames,
            lengths,
            clip,
            align,
        )


def test_any_prompt_has_the_part_of_its_clip() -> None:
    rng = random.Random(3)
    for _ in range(300):
        starts = [0, *sorted(rng.sample(range(1, 12), rng.randint(0, 4)))]
        texts = ["".join(rng.choice("ab .{,") for _ in range(rng.randint(0, 6))) for _ in starts]
        prompt = "".join(f"|{start}|{text}" for start, text in zip(starts, texts, strict=True))
        for clip in range(13):
            assert prompt_of_clip(prompt, clip) == texts[sum(start <= clip for start in starts) - 1]
        assert split_prompt(prompt) == ([text.strip() for text in texts], starts)


def test_whatever_is_typed_is_read_or_refused_in_one_line() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        text = "".join(rng.choice('0123456789,;.-+e |{}[]"a\n\0') for _ in range(rng.randint(0, 24)))
        for read in (parse_mask_strategy, lambda x: split_prompt("|0|" + x), lambda x: split_json("a" + x, "1.1")):
            try:
                read(text)
            except ValueError as error:
                assert "\n" not in str(error) and len(str(error)) < 400, (text, error)


def test_any_prompt_with_json_is_split_by_the_rules() -> None:
    """Against rules written out: where JSON begins, which keys it may have, and that there is one."""
    rng = random.Random(11)
    for _ in range(1000):
        text = "".join(rng.choice("ab |,.}]") for _ in range(rng.randint(0, 8))) + rng.choice(["", "", "[", "{"])
        told: dict[str, Any] = {key: "x;y" for key in ("reference_path", "mask_strategy") if rng.random() < 0.5}
        told |= {"other": 1} if rng.random() < 0.1 else {}
        prompt, release = (
            text + (json.dumps(told) if rng.random() < 0.7 else ""),
            rng.choice(["1.0", "1.1", "1.2", "1.3"]),
        )
        marks = {"1.0": "", "1.1": "{["}.get(release, "{")
        places = [place for place, letter in enumerate(prompt) if letter in marks]
        expected: Any = (prompt, {})
        if places:
            rest = prompt[places[0] :]
            ok = len(places) == 1 and rest == json.dumps(told) and "other" not in told
            expected = (prompt[: places[0]], told) if ok else None
        try:
            found: Any = split_json(prompt, release)  # type: ignore[arg-type]
        except ValueError as error:
            assert "\n" not in str(error)
            found = None
        assert found == expected, (prompt, release)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", "clip='a' must be a whole number"),
        ("0,", "reference='' must be a whole number"),
        (";", "clip='' must be a whole number"),
        ("0;", "clip='' must be a whole number"),
        ("0,0,0,0,8,0.3,1", "has 7 fields, must have at most 6"),
        ("0,0,0,0,0", "length=0 must be 1 or more"),
        ("0,0,0,0,-2", "length=-2 must be 1 or more"),
        ("-1", "clip=-1 must be 0 or more"),
        ("0,-1", "reference=-1 must be 0 or more"),
        ("0,0,0,0,1,1.5", "edit_ratio=1.5 must be from 0 (keep) to 1 (free)"),
        ("0,0,0,0,1,nan", "edit_ratio='nan' must be a number"),
        ("0,0,1.5", "reference_start='1.5' must be a whole number"),
        ("1e3", "clip='1e3' must be a whole number"),
        ("9" * 40, "must be a whole number"),
    ],
)
def test_strategies_that_are_none(text: str, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_mask_strategy(text)
    assert expected in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "frames", "lengths", "expected"),
    [
        ("0,1", 8, [4], "reference=1: there is 1, counted from 0"),
        ("0", 8, [], "reference=0: there are none"),
        ("0,0,4", 8, [4], "reference_start=4 must be from -4 to 3"),
        ("0,0,-5", 8, [4], "reference_start=-5 must be from -4 to 3"),
        ("0,0,0,8", 8, [4], "start=8 must be from -8 to 7"),
        ("0,0,0,-9", 8, [4], "start=-9 must be from -8 to 7"),
    ],
)
def test_strategies_that_do_not_fit(text: str, frames: int, lengths: list[int], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        apply_mask_strategy(parse_mask_strategy(text), frames, lengths)
    assert expected in str(caught.value)


def test_lengths_are_shortened_from_1_2_on() -> None:
    placed = parse_mask_strategy("0,0,1,6,9")
    assert apply_mask_strategy(placed, 8, [4]).given == [6, 7]
    with pytest.raises(ValueError, match="length=9 must be at most 2: the clip has 8 latent frames, the reference 4"):
        apply_mask_strategy(placed, 8, [4], shortens=False)


def test_only_kinds_of_1_3() -> None:
    with pytest.raises(ValueError, match="must be one of t2v, i2v_head"):
        kind_of_clip("v2v_tail", 3, 7, [4])
    for kind in KINDS_1_3:
        assert kind_of_clip(kind, 3, 7, []).given == []
        assert kind_of_clip(kind, 3, 7, [], clip=1, clips=2).given == [0, 1, 2]
    assert kind_of_clip("v2v_head", 5, 7, [2]).given == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "release", "expected"),
    [
        ('a {"reference_path": "a.png"', "1.2", "is no JSON"),
        ('a {"reference_path": 3}', "1.2", "reference_path: must be a text in the JSON"),
        ('a {"refrence_path": "a"}', "1.3", "unknown key in the JSON; did you mean reference_path?"),
        ("a [1, 2]", "1.1", "what follows '[' must be {...}"),
        ("a [b] {}", "1.1", "has '[' and '{'"),
        ("a {" + "[" * 100_000, "1.2", "is no JSON"),
    ],
)
def test_json_that_is_none(prompt: str, release: Any, expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        split_json(prompt, release)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_what_stays_text() -> None:
    assert split_json("a {b", "1.0") == ("a {b", {})
    assert split_json("a [b]", "1.2") == ("a [b]", {})


@pytest.mark.parametrize("prompt", ["|0|a|b", "|0|a|x|b", "|0|a|2|b|1|c", "|0|a|0|b", "|0|a|1|b|"])
def test_parts_that_are_none(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"must rise|parts of a prompt"):
        split_prompt(prompt)


def config(folder: Path, text: str, *words: str) -> SampleConfig:
    (folder / "job.yaml").write_text(f"weights: w\n{text}\n")
    return load_config(SampleConfig, folder / "job.yaml", words)


def jobs_of(folder: Path, text: str, *words: str) -> list[Job]:
    return read_jobs(config(folder, text, *words))


def test_references_of_prompts(tmp_path: Path) -> None:
    """From lists, from JSON, which wins, and from a table, whose files may lie beside it."""
    lists = (
        'reference_path: [a.png, null, "b.png;c.mp4"]\nmask_strategy: ["0", null, "0;0,1"]\nneg_prompts: [x, y, null]'
    )
    prompts = 'prompts: [one, "two {\\"mask_strategy\\": \\"1\\"}", "three{\\"reference_path\\": \\"d.png\\"}"]\nneg: z'
    found = jobs_of(tmp_path, f'release: "1.2"\n{prompts}\n{lists}')
    assert [(job.text, job.ref, job.strategy, job.neg) for job in found] == [
        ("one", "a.png", "0", "x"),
        ("two ", "", "1", "y"),
        ("three", "d.png", "0;0,1", "z"),
    ]
    later = jobs_of(tmp_path, f'release: "1.2"\n{prompts}\n{lists}\nstart_index: 1')
    assert [(job.ref, job.name) for job in later] == [("", "sample_0001"), ("d.png", "sample_0002")]
    chosen = jobs_of(tmp_path, f'release: "1.1"\n{prompts}\nend_index: 1\nreference_path: [e.png]')
    assert [(job.ref, job.name) for job in chosen] == [("e.png", "sample_0")]
    (tmp_path / "own.png").touch()
    (tmp_path / "table.csv").write_text("text,ref,mask_strategy\nfour,own.png,0\n")
    (job,) = jobs_of(tmp_path, f"prompt_csv: {tmp_path / 'table.csv'}\nloop: 2")
    assert (job.ref, job.strategy) == (str(tmp_path / "own.png"), "0")
    (tmp_path / "lines.txt").write_text('\nfive {"reference_path": "own.png;away.png"}\n')
    (job,) = jobs_of(tmp_path, f'release: "1.3"\nprompt_csv: {tmp_path / "lines.txt"}')
    assert (job.text, job.ref, job.name) == ("five ", f"{tmp_path / 'own.png'};away.png", "sample_0000")


def test_prompts_of_our_own_jobs_stay_as_they_are(tmp_path: Path) -> None:
    text = '|0| a |x| {"foo": [1]}'
    (job,) = jobs_of(tmp_path, f"prompt: '{text}'")
    assert (job.text, job.name) == (text, "prompt_0000")


def test_flags_set_lists(tmp_path: Path) -> None:
    words = ["--reference-path", "a.png", "", "--mask-strategy", "0,0,0,0,8,0.3", "None", "--loop", "3"]
    words += [
        "--prompt",
        "one",
        "two",
        "--aes",
        "6.5",
        "--camera-motion",
        "pan left",
        "--save-fps",
        "8",
        "--align",
        "5",
    ]
    cfg = config(
        tmp_path, "", *words, "--condition-frame-length", "4", "--condition-frame-edit", "0.2", "--flow", "good"
    )
    assert (cfg.reference_path, cfg.mask_strategy) == (("a.png", None), ("0,0,0,0,8,0.3", None))
    assert (cfg.loop, cfg.condition_frame_length, cfg.condition_frame_edit, cfg.align) == (3, 4, 0.2, 5)
    assert (cfg.aes, cfg.flow, cfg.camera_motion, cfg.save_fps) == ("6.5", "good", "pan left", 8.0)
    assert config(tmp_path, "aes: 6.5\nflow: 2", "--aes", "None", "--flow", "null").aes is None
    assert config(tmp_path, "aes: 6.5\nflow: 2", "--flow", "None").flow is None
    assert config(tmp_path, "", "--reference-path", "a.png").reference_path == ("a.png",)
    assert config(tmp_path, "", "reference_path=[a.png, null]").reference_path == ("a.png", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loop: 0", "loop=0: must be an integer >= 1"),
        ("condition_frame_length: 0", "condition_frame_length=0: must be an integer >= 1"),
        ("condition_frame_edit: 1.5", "condition_frame_edit=1.5: must be at most 1"),
        ("align: 0", "align=0: must be an integer >= 1, or null"),
        ("save_fps: 0", "save_fps=0.0: must be a number from 0.1 to 1000"),
        ("aes: -1", "aes=-1.0: must be a number from 0 to 1000"),
        ('aes: "nan"', "aes='nan': must be a number from 0 to 1000"),
        ('release: "1.2"\naes: good', "aes='good': must be a number, or a word with release=1.3"),
        ('release: "1.1"\nflow: 3', "flow=3.0: release=1.1 adds no scores to prompts"),
        ("release: 1.2", 'release=1.2: must be text; write "1.2" in quotes'),
        ('release: "1.4"', "release='1.4': "),
        ('mask_strategy: ["0", "0,,1"]', "mask_strategy.1: '0,,1': reference='' must be a whole number"),
        ("reference_path: a.png", "reference_path='a.png': must be a list"),
    ],
)
def test_keys_that_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        config(tmp_path, f"prompt: a\n{text}")
    assert str(caught.value).startswith(expected), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reference_path: [a, b]", "reference_path: 2 entries for 1 prompts; give one for each, null for none"),
        ("mask_strategy: ['0', '0']", "mask_strategy: 2 entries for 1 prompts"),
        ("release: '1.2'\nprompt: 'a {x}'", "prompt 0: what follows '{' is no JSON"),
        ("loop: 2\nprompt: '|0| a |b| c'", "prompt 0: parts of a prompt are |0| text |2| text"),
    ],
)
def test_lists_and_prompts_that_are_refused(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        jobs_of(tmp_path, text if "prompt: " in text else f"prompt: a\n{text}")
    assert str(caught.value).startswith(expected), str(caught.value)


def test_names_of_several_clips_and_of_a_full_folder() -> None:
    cfg = SampleConfig(weights="w", release="1.1", num_sample=2, prompts=("a", "b"), save_prefix="try_")
    assert [job.name for job in read_jobs(cfg)] == ["try_0-0", "try_0-1", "try_1-0", "try_1-1"]
    moved = with_names(read_jobs(cfg), taken=["try_0-0", "try_3-1"])
    assert [job.name for job in moved] == ["try_4-0", "try_4-1", "try_5-0", "try_5-1"]
    one = replace(cfg, release="1.2", num_sample=1, prompt_as_path=True, save_prefix="")
    assert [job.name for job in read_jobs(one)] == ["a", "b"]
    told = replace(one, prompts=('a fox. {"mask_strategy": "0"}',))
    assert [job.name for job in read_jobs(told)] == ["a fox"]


@pytest.mark.parametrize(
    ("kind", "release", "frames", "length", "loop", "expected"),
    [
        ("opensora_v1_2", "1.2", 51, 5, 3, 51 + 2 * (51 - 17)),
        ("opensora_v1_2", "1.2", 51, 10, 2, 51 + 51 - 34),
        ("sd", "1.1", 16, 4, 3, 16 + 2 * 12),
        ("opensora_v1_3", "1.3", 113, 5, 2, 209),  # 35 + 30 latent frames are 13 pieces, of 16 frames and one more
        ("opensora_v1_3", "1.3", 113, 3, 2, 209),  # 67 are cut to 65
    ],
)
def test_lengths_of_videos(kind: str, release: Any, frames: int, length: int, loop: int, expected: int) -> None:
    given: dict[str, Any] = {"release": release, "loop": loop, "condition_frame_length": length}
    cfg = SampleConfig(weights="w", sampling=SamplingOption(num_frames=frames), **given)
    shape = autoencoder_shape(AUTOENCODER_CONFIGS[kind](path="x"))
    latents = clip_latents(cfg, describe(MODEL_CONFIGS["stdit3"]()), shape)
    assert video_frames(cfg, latents, shape, "in_place") == expected
