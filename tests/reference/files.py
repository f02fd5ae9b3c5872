"""What a user has before a run, and what a run leaves: clips, table, weights, configuration; records and state."""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference import draws
from tests.reference.encoders import BlockTransform, ByteText, TextEncoder
from tests.reference.mmdit import Shape
from tests.reference.samples import Clip, Shapes
from tests.reference.training import Optimizer, Problem, Record, State

SIDE, SEED, STEPS, MICRO_BATCHES = 32, 11, 5, 4
BATCH_SIZES = {1: 3, 5: 2, 9: 1}  # {frames: samples}: seven micro-batches, two steps, the second with an odd number
SEQUENCE = 80  # image tokens of a pack; the longest sample has 48
REFERENCES = {"v2v_head": 5.0, "i2v_loop": 2.0, "t2v": 1.0, "i2v_head": 3.0, "i2v_tail": 2.0}  # no clip has 33 frames
RESUMED = 2  # a checkpoint after every so many steps, the first of which a run goes on from
HIDDEN, HEADS, AXES, DEPTH, DEPTH_SINGLE = 32, 4, (4, 2, 2), 1, 2
SPATIAL, CHANNELS, PATCH = 4, 4, 2
TEXT = ByteText(dim=64, depth=2, max_words=6, seed=3)
DROPOUT = 0.5
ADAMW = Optimizer(
    kind="adamw", lr=0.02, weight_decay=0.1, clip_norm=0.05, warmup_steps=2, schedule="cosine", min_lr=0.001, eps=1e-6,
    betas=(0.8, 0.95), ema_decay=0.7, ema_warmup=True,
)  # fmt: skip
SGD = Optimizer(
    kind="sgd", lr=0.004, weight_decay=0.02, clip_norm=0.0, warmup_steps=3, schedule="constant", ema_decay=0.6,
    ema_warmup=False,
)  # fmt: skip
OPTIMIZERS = {"adamw": ADAMW, "sgd": SGD}

# (frames, height, width, frames per second, motion score, caption): windows, crops and rates of every sort, among them
# captions longer than the encoder reads, a still that is scaled, and a window without a choice.
ROWS: tuple[tuple[int, int, int, float, float | None, str], ...] = (
    (16, 32, 48, 24.0, 3, "a red kite over the old town"),
    (23, 56, 32, 48.0, 5, "two dogs run"),
    (9, 32, 40, 12.0, None, "rain"),
    (13, 44, 32, 30.0, 2, "a slow train crosses the long bridge at night"),
    (6, 32, 32, 24.0, None, "waves on a beach"),
    (8, 32, 60, 8.0, 7, "a lamp"),
    (1, 40, 32, 0.0, None, "a green door"),
    (1, 32, 56, 0.0, 1, "an apple on a table by the window"),
    (1, 48, 70, 0.0, None, "fog"),
    (1, 32, 32, 0.0, None, "a cat and a hat"),
)


def clips() -> list[Clip]:
    """The rows with their pixels: noise, so that no two windows or crops look alike."""
    found = []
    for sample, (count, height, width, fps, motion, text) in enumerate(ROWS):
        frames = draws.philox("clip", sample).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        found.append(Clip(text=text, frames=frames, fps=fps, motion=motion))
    return found


@dataclass(frozen=True, kw_only=True)
class Case:
    """What varies between the runs that are compared."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    rope: Literal["half", "interleaved"] = "half"  # of the file that the run starts from
    drawn: bool = False  # start from drawn weights, without a file
    flux: bool = False  # train in Flux's layout, with fused projections and interleaved pairs, whatever the file has
    plain: bool = False  # other options: no mask, condition or guidance, centre crops, a shift of its own, small steps
    pack: int = 1
    damaged: frozenset[int] = frozenset()
    times: tuple[float, float] | None = None  # of an expert
    lora: tuple[int, float] | None = None  # rank, alpha
    references: Literal["none", "learned", "left out"] = "none"  # known frames, and whether they are in the loss

    @property
    def micro_batches(self) -> int:
        return 2 if self.plain else MICRO_BATCHES

    @property
    def text(self) -> ByteText:
        return replace(TEXT, mask=not self.plain)


def problem(text: TextEncoder, case: Case = Case()) -> Problem:
    """What ``write_config`` states; ``text``: the encoder ``case.text``, or what it was compared with."""
    found = Problem(
        seed=SEED,
        steps=STEPS,
        micro_batches=case.micro_batches,
        clips=clips(),
        shapes=Shapes(side=SIDE, batch_sizes=BATCH_SIZES, multiple=SPATIAL * PATCH),
        model=Shape(heads=HEADS, axes=AXES, depth=DEPTH, depth_single=DEPTH_SINGLE, rope=case.rope),
        autoencoder=BlockTransform(SPATIAL, CHANNELS),
        text=text,
        text_dropout=DROPOUT,
        optim=OPTIMIZERS[case.optimizer],
        pack=case.pack,
        damaged=case.damaged,
        times=case.times,
        lora=case.lora,
        references={} if case.references == "none" else REFERENCES,
        known_in_loss=case.references != "left out",
    )
    if not case.plain:
        return found
    return replace(found, cond=False, guidance=False, sigma_min=0.02, alpha=2.5, crop="center", suffix=False)


def weight_shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter of the model, by the names of Open-Sora 2's files."""
    d, tokens = HIDDEN, CHANNELS * PATCH**2
    linear = {"img_in": (d, tokens), "cond_in": (d, tokens + PATCH**2), "txt_in": (d, TEXT.dim)}
    for name, inputs in (("time_in", 256), ("vector_in", TEXT.dim), ("guidance_in", 256)):
        linear |= {f"{name}.in_layer": (d, inputs), f"{name}.out_layer": (d, d)}
    norms = []
    for block in (f"double_blocks.{i}" for i in range(DEPTH)):
        for stream in ("img", "txt"):
            linear |= {f"{block}.{stream}_attn.{part}": (d, d) for part in ("q_proj", "k_proj", "v_proj", "proj")}
            linear |= {f"{block}.{stream}_mod.lin": (6 * d, d), f"{block}.{stream}_mlp.0": (4 * d, d)}
            linear |= {f"{block}.{stream}_mlp.2": (d, 4 * d)}
            norms += [f"{block}.{stream}_attn.norm.{which}_norm.scale" for which in ("query", "key")]
    for block in (f"single_blocks.{i}" for i in range(DEPTH_SINGLE)):
        linear |= {f"{block}.q_proj": (d, d), f"{block}.k_proj": (d, d), f"{block}.v_mlp": (5 * d, d)}
        linear |= {f"{block}.linear2": (d, 5 * d), f"{block}.modulation.lin": (3 * d, d)}
        norms += [f"{block}.norm.{which}_norm.scale" for which in ("query", "key")]
    linear |= {"final_layer.linear": (tokens, d), "final_layer.adaLN_modulation.1": (2 * d, d)}
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    return shapes | {name: (d // HEADS,) for name in norms}


def used(weights: dict[str, Any], *, plain: bool) -> dict[str, Any]:
    """Those that the model has."""
    return {name: w for name, w in weights.items() if not plain or not name.startswith(("cond_in.", "guidance_in."))}


def alive() -> dict[str, Tensor]:
    """Weights of which none is zero: the drawn ones would hide most of the network at first."""
    found = {}
    for name, shape in weight_shapes().items():
        size = 0.06 if name.startswith("final_layer.linear") else 0.2  # velocities of about one
        found[name] = draws.normal(shape, "weights", name).double() * size
        if name.endswith(".scale"):
            found[name] += 1
    return found


def write_weights(path: Path, weights: dict[str, Tensor], rope: str = "half") -> Path:
    """As a user's file, with the names of Open-Sora 2."""
    save_file(weights, path, metadata={"format": "pt", "rope_layout": rope, "fused_qkv": "false"})
    return path


def write_clips(folder: Path, damaged: frozenset[int] = frozenset()) -> Path:
    """Lossless files, and the table; what is damaged holds no picture."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for sample, clip in enumerate(clips()):
        count, height, width, _ = clip.frames.shape
        name = f"clip-{sample}.{'png' if count == 1 else 'mkv'}"
        if sample in damaged:
            (folder / name).write_bytes(b"nothing to see")
        elif count == 1:
            Image.fromarray(clip.frames[0]).save(folder / name)
        else:
            write_lossless(folder / name, clip)
        row = {"path": name, "text": clip.text, "num_frames": count, "height": height, "width": width}
        rows.append(row | {"fps": clip.fps or "", "motion_score": "" if clip.motion is None else clip.motion})
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return folder / "clips.csv"


def write_lossless(path: Path, clip: Clip) -> None:
    """FFV1 of RGB: what is read is what was written."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=Fraction(clip.fps))
        stream.height, stream.width, stream.pix_fmt = clip.frames.shape[1], clip.frames.shape[2], "bgr0"
        for frame in clip.frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def model_section(rope: str, *, guidance: bool = True, cond: bool = True, fused: bool = False) -> dict[str, Any]:
    """The model of ``weight_shapes``."""
    return {
        "kind": "mmdit",
        "in_channels": CHANNELS * PATCH**2,
        "patch_size": PATCH,
        "vec_in_dim": TEXT.dim,
        "context_in_dim": TEXT.dim,
        "hidden_size": HIDDEN,
        "num_heads": HEADS,
        "depth": DEPTH,
        "depth_single_blocks": DEPTH_SINGLE,
        "axes_dim": list(AXES),
        "guidance_embed": guidance,
        "cond_embed": cond,
        "fused_qkv": fused,
        "rope_layout": rope,
    }


def encoder_sections(text: ByteText = TEXT) -> dict[str, Any]:
    return {"vae": {"kind": "dct", "spatial": SPATIAL, "channels": CHANNELS}, "text": {"kind": "bytes", **vars(text)}}


def write_config(path: Path, table: Path, *, init_from: Path | None, case: Case = Case()) -> Path:
    """The training configuration of ``problem``; the run's folder is ``run`` beside the file."""
    optim = dict(vars(OPTIMIZERS[case.optimizer])) | {"betas": list(OPTIMIZERS[case.optimizer].betas)}
    stated = problem(TEXT, case)
    config = {
        "name": "run",
        "output": str(path.parent),
        "seed": SEED,
        "model": model_section(
            "interleaved" if case.flux else case.rope, guidance=stated.guidance, cond=stated.cond, fused=case.flux
        ),
        **encoder_sections(case.text),
        "flow": {"text_dropout": DROPOUT, "sigma_min": stated.sigma_min, "flow_shift": stated.alpha}
        | (dict(zip(("t_min", "t_max"), stated.times, strict=True)) if stated.times else {}),
        "conditioning": {"references": stated.references, "known_in_loss": stated.known_in_loss},
        "data": {
            "table": str(table),
            "buckets": {f"{SIDE}px_ar1:1": {frames: [1.0, size] for frames, size in BATCH_SIZES.items()}},
            "micro_batches": case.micro_batches,
            "balance_group": case.pack,
            "tokens_per_sequence": SEQUENCE if case.pack > 1 else 0,
            "crop": stated.crop,
            "prompt_suffix": stated.suffix,
            "workers": 0,
            "max_bad_share": 1.0,
        },
        "parallel": {"precision": {"compute": "fp64", "reduce": "fp64", "master": "fp64"}, "timeout_s": 60},
        "optim": optim,
        "lora": {"rank": case.lora[0], "alpha": case.lora[1], "export_names": "peft"} if case.lora else {},
        "train": {
            "steps": STEPS,
            "log_every": 1,
            "checkpoint_every": RESUMED,
            "init_from": str(init_from) if init_from else None,
        },
    }
    path.write_text(yaml.safe_dump(config))
    return path


def read_run(folder: Path, case: Case = Case()) -> tuple[list[Record], State]:
    """The records of metrics.jsonl, and weights, moments and average of the last checkpoint."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [
        Record(loss=line["loss"], grad_norm=line["grad_norm"], lr=line["lr"]) for line in lines if "loss" in line
    ]
    held = read_checkpoint(max((folder / "checkpoints").glob("step-*")))
    sections = [("model.", ""), ("ema.", ""), ("optimizer.state.", ".exp_avg"), ("optimizer.state.", ".exp_avg_sq")]
    return records, State(*(named(_section(held, *section), case) for section in sections))


def named(weights: Mapping[str, Tensor], case: Case) -> dict[str, Tensor]:
    """With the names and the order of the file that the run started from."""
    if not case.flux:
        return dict(weights)
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for fused, parts, sizes in (
            (".qkv.", (".q_proj.", ".k_proj.", ".v_proj."), (HIDDEN, HIDDEN, HIDDEN)),
            (".linear1.", (".q_proj.", ".k_proj.", ".v_mlp."), (HIDDEN, HIDDEN, 5 * HIDDEN)),
        ):
            if fused in name:
                split = zip(parts, weight.split(sizes), strict=True)
                found |= {name.replace(fused, part): piece for part, piece in split}
                break
        else:
            found[name] = weight
    turned = (".q_proj.", ".k_proj.", "query_norm", "key_norm")
    return {name: _half_split(weight) if any(t in name for t in turned) else weight for name, weight in found.items()}


def _half_split(rows: Tensor) -> Tensor:
    """Of every head, channel 2d to d and 2d + 1 to Dh/2 + d."""
    pairs = rows.unflatten(0, (-1, HIDDEN // HEADS // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def read_checkpoint(step: Path) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint's files, whose entries are boxes named ``KEY@OFFSET,OFFSET,...``."""
    boxes: dict[str, list[tuple[tuple[int, ...], Tensor]]] = defaultdict(list)
    for file in sorted(step.glob("shard-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                key, _, at = name.rpartition("@")
                boxes[key].append((tuple(map(int, at.split(","))) if at else (), opened.get_tensor(name)))
    return {key: _joined(parts) for key, parts in boxes.items()}


def _joined(parts: list[tuple[tuple[int, ...], Tensor]]) -> Tensor:
    ends = [[at + size for at, size in zip(offset, box.shape, strict=True)] for offset, box in parts]
    whole = torch.full([max(sizes) for sizes in zip(*ends, strict=True)], torch.nan, dtype=parts[0][1].dtype)
    for offset, box in parts:
        whole[tuple(slice(at, at + size) for at, size in zip(offset, box.shape, strict=True))] = box
    return whole


def _section(held: Mapping[str, Tensor], prefix: str, suffix: str = "") -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix).removesuffix(suffix): value
        for key, value in held.items()
        if key.startswith(prefix) and key.endswith(suffix)
    }


def read_export(folder: Path, case: Case = Case()) -> dict[str, Tensor]:
    """What the run wrote for sampling, or with adapters for peft."""
    if not case.lora:
        return named(load_file(folder / "exported" / "model.safetensors"), case)
    adapters = load_file(folder / "exported" / "adapter_model.safetensors")
    described = json.loads((folder / "exported" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == case.lora
    return {name.removeprefix("base_model.model."): tensor for name, tensor in adapters.items()}
