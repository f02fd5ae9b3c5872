import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from opensora.cli import main
from opensora.cli.main import run_cli
from opensora.config.load import config_from_argv, config_hash, load_config, save, to_omegaconf, to_yaml
from opensora.config.renamed_keys import RENAMED
from opensora.config.run import AUTOENCODER_CONFIGS, MODEL_CONFIGS, TEXT_ENCODER_CONFIGS, RunConfig, SampleConfig
from opensora.config.schema import build, plain
from opensora.config.strict_yaml import read_yaml, to_yaml_text
from opensora.models.families import MODEL_SIZES
from opensora.utils.errors import UserError
from opensora.utils.sections import section

ROOT = Path(__file__).resolve().parents[2]

GOOD = """\
name: trial
model: {kind: mmdit, size: debug, in_channels: 64, context_in_dim: 256, vec_in_dim: 256}
vae: {kind: dct, spatial: 8, channels: 16}
text: {kind: bytes, dim: 256}
data:
  table: clips.csv
  buckets:
    64px:
      1: [1.0, 8]
      9: [[1.0, 0.5], 2]
optim: {lr: 1e-4}
train: {steps: 100}
"""


@pytest.fixture
def good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return path


def swapped(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new)


PACKED = ["data.micro_batches=4", "data.balance_group=2", "data.tokens_per_sequence=64"]

# name -> (file content or None for the good one, overrides, what the one line must contain)
BAD: dict[str, tuple[str | bytes | None, list[str], str]] = {
    # objectives
    "objective, an unknown kind": (None, ["objective.kind=idpm"], "objective.kind='idpm': did you mean iddpm?"),
    "objective, too few outputs": (
        None,
        ["objective.kind=iddpm"],
        "objective.kind=iddpm: needs 2 values per latent, mod",
    ),
    "objective, times of others": (
        None,
        ["objective={kind: iddpm, learn_sigma: false}"],
        "objective.kind=iddpm: has times up to 1000, model.kind=mmdit reads times up to 1; choose another objective",
    ),
    "objective, unreadable steps": (
        None,
        ["objective={kind: iddpm, learn_sigma: false, timestep_respacing: 10x}"],
        "objective.timestep_respacing='10x': must be a number of steps as 100, numbers for equal sections as 10,20,30",
    ),
    "objective, too many steps": (
        None,
        ["objective={kind: iddpm, learn_sigma: false, timestep_respacing: ddim999}"],
        "objective.timestep_respacing='ddim999': no whole distance between steps gives 999 of 1000",
    ),
    "objective, a version that is a number": (
        None,
        ["objective={kind: rectified_flow_v1, version: 1.3}"],
        'objective.version=1.3: must be text; write "1.3" in quotes',
    ),
    "objective, no time left": (
        None,
        ["objective.t_max=0"],
        "objective.t_max=0.0: must be a number above t_min=0.0, and",
    ),
    "objective, a draw that is none": (
        None,
        ["objective.sample_method=normal"],
        "objective.sample_method='normal': did you mean logit-normal?",
    ),
    "objective, clips without times": (
        None,
        ["objective={kind: rectified_flow_v1, use_timestep_transform: true}", "data.buckets={256px: {5: [1.0, 1]}}"],
        "data.buckets.256px.5: 5 frames are 5//17*5 = 0 latent ones by the rule of objective.version=1.2",
    ),
    "a loss that is no mean of ours": (None, ["train.loss_reduction=sum"], "train.loss_reduction='sum'"),
    "conditions, an unknown kind": (
        None,
        ["conditioning.dropout.conditions={kep: 1}"],
        "conditioning.dropout.conditions.kep: no such kind; must be one of keep, cond, text, null",
    ),
    "conditions, no weight": (
        None,
        ["conditioning.dropout.conditions={keep: 0}"],
        "conditioning.dropout.conditions: every weight is 0; must have one above",
    ),
    "known frames, a negative weight": (None, ["conditioning.known_weight=-1"], "conditioning.known_weight=-1.0: must"),
    "known frames, weighed and left out": (
        None,
        ["conditioning={known_weight: 0.1, known_in_loss: false}"],
        "conditioning.known_weight=0.1: must be 1 with known_in_loss=false",
    ),
    # keys
    "unknown key": (None, ["train.stepz=3"], "train.stepz: unknown key; did you mean steps?"),
    "unknown section": (None, ["optimizer.lr=3"], "optimizer: unknown key; did you mean optim?"),
    "unknown key, nothing close": (None, ["train.qqq=3"], "train.qqq: unknown key; must be one of steps, log_every"),
    "unknown key of validation": (None, ["validate.promts=[a]"], "validate.promts: unknown key; did you mean prompts?"),
    "validation of nothing": (None, ["validate.every=5"], "validate.prompts: missing; give validate.prompts=[TEXT"),
    "validation without bins": (None, ["validate.bins=0"], "validate.bins=0: must be an integer >= 1"),
    "validation without samples": (None, ["validate.samples=-3"], "validate.samples=-3: must be an integer >= 1"),
    "validation of a number": (None, ["validate.table=[3]"], "validate.table.0=3: must be text"),
    "validation, a reference of nobody": (None, ["validate.ref=a.png"], "validate.ref: is for prompts; clips of pro"),
    "validation, another kind": (None, ["validate.cond_type=i2v"], "validate.cond_type='i2v'"),
    "unknown key deep down": (None, ["parallel.mesh.ulises=2"], "parallel.mesh.ulises: unknown key; did you mean ul"),
    "unknown key in a file": (GOOD + "sede: 1\n", [], "sede: unknown key; did you mean seed? (run.yaml:13)"),
    "unknown key of a chosen kind": (
        swapped("dim: 256}\ndata", "dims: 256}\ndata"),
        [],
        "text.dims: unknown key; did you mean d",
    ),
    "a key of another kind": (swapped("spatial: 8", "tiling: true"), [], "vae.tiling: unknown key"),
    "duplicate key": (GOOD + "name: again\n", [], "name: given twice (run.yaml:1 and run.yaml:13)"),
    "duplicate key deep down": (
        swapped("table: clips.csv", "table: clips.csv\n  table: b.csv"),
        [],
        "data.table: given twice",
    ),
    "missing key": (swapped("train: {steps: 100}\n", ""), [], "train.steps: missing; must be a whole number"),
    "missing section": (swapped("vae: {kind: dct, spatial: 8, channels: 16}\n", ""), [], "vae: missing"),
    "missing kind": (swapped("kind: bytes, ", ""), [], "text.kind: missing; must be one of bytes, t5_clip"),
    "key that is no text": (GOOD + "[1, 2]: 3\n", [], "run.yaml:13: a key under the top level"),
    "null key": (GOOD + "~: 3\n", [], "run.yaml:13: a key under the top level"),
    # types
    "text for a whole number": (None, ["train.steps=ten"], "train.steps='ten': must be a whole number"),
    "fraction for a whole number": (None, ["train.steps=1.5"], "train.steps=1.5: must be a whole number"),
    "float that is whole": (None, ["train.steps=1e3"], "train.steps=1000.0: must be a whole number; write 1000"),
    "true for a whole number": (None, ["train.steps=true"], "train.steps=true: must be a whole number"),
    "text for a number": (None, ["optim.lr=fast"], "optim.lr='fast': must be a number"),
    "quoted number": (swapped("lr: 1e-4", 'lr: "1e-4"'), [], "optim.lr='1e-4': must be a number (run.yaml:11)"),
    "true for a number": (None, ["optim.lr=true"], "optim.lr=true: must be a number"),
    "no for a boolean": (None, ["train.export=no"], "train.export=no: must be true or false"),
    "number for a boolean": (None, ["train.export=1"], "train.export=1: must be true or false"),
    "number for text": (swapped("name: trial", "name: 7"), [], 'name=7: must be text; write "7" in quotes'),
    "list for a scalar": (None, ["seed=[1]"], "seed=[1]: must be a whole number"),
    "scalar for a list": (None, ["optim.betas=0.9"], "optim.betas=0.9: must be a list of 2"),
    "list of another length": (None, ["optim.betas=[0.9]"], "optim.betas=[0.9]: must be a list of 2"),
    "wrong type in a list": (None, ["optim.betas=[0.9, x]"], "optim.betas.1='x': must be a number"),
    "scalar for a section": (None, ["train=3"], "train=3: must be a section with steps"),
    "section for a scalar": (None, ["seed.x=3"], "seed={'x': 3}: must be a whole number"),
    "scalar for a chosen section": (None, ["vae=dct"], "vae='dct': must be a section with kind, one of dct"),
    "text for a frame count": (swapped("9: [[", "nine: [["), [], "data.buckets.64px.nine='nine': must be a whole numb"),
    "scalar for a mapping": (None, ["data.buckets=3"], "data.buckets=3: must be a mapping from text"),
    "null where it is not allowed": (None, ["train.steps=null"], "train.steps=null: must be a whole number"),
    "empty value": (swapped("steps: 100", "steps: "), [], "train.steps=null: must be a whole number (run.yaml:12)"),
    "null section": (None, ["model=null"], "model=null: must be a section with kind"),
    "list for a section": (
        swapped("train: {steps: 100}", "train: [1, 2]"),
        [],
        "train=[1, 2]: must be a section with steps",
    ),
    "a key in a list": (
        swapped("train: {steps: 100}", "train: [1, 2]"),
        ["train.steps=3"],
        "train=[1, 2] (run.yaml:12): is a list, in which no key can be set",
    ),
    "a mapping over a list": (
        GOOD + "validate: {prompts: [a]}\n",
        ["validate.prompts.0=b"],
        "validate.prompts=['a'] (run",
    ),
    "a mapping for a bucket's row": (None, ["data.buckets.64px.1={a: 1}"], "data.buckets.64px.1={'a': 1}: write [keep"),
    "a list over a section": (None, ["vae=[]"], "vae=[]: must be a section with kind"),
    "digits that are none": (None, ["data.buckets.²=1"], "data.buckets.²=1: must be a mapping"),
    "digits of another script": (
        None,
        ["data.buckets.64px.٣=[1.0, 1]"],
        "data.buckets.64px.٣='٣': must be a whole number",
    ),
    "a key of 5,000 digits": (None, [f"data.buckets.64px.{'1' * 5000}=1"], "data.buckets.64px.1111"),
    "a number of 5,000 digits": (None, ["seed=" + "1" * 5000], "seed (command line): a whole number beyond 64 bits"),
    "a key of 500 levels": (
        None,
        [".".join("a" * 500) + "=1"],
        "a.a.a.a...: 500 levels (command line); must be at most 32",
    ),
    "a list that takes minutes to read": (
        GOOD + "x: [" + "1," * 170_000 + "]\n",
        [],
        "run.yaml:13: more than 20000 keys and values; give long lists as files",
    ),
    "a value of 500 levels": (
        None,
        ["data.table=" + "[" * 500 + "]" * 500],
        "data.table (command line): nested deeper",
    ),
    # texts
    "a lone surrogate": (GOOD + 'output: "\\ud800"\n', [], "output='\\ud800': holds the surrogate U+D800"),
    "NUL in a text": (GOOD + 'output: "a\\0b"\n', [], "output='a\\x00b': holds the control character U+0000"),
    "a command to the terminal": (None, ["output=\x1b[31m"], "output='\\x1b[31m': holds the control character U+001B"),
    "one in a key": (None, ["train.x\x1b[31m=1"], "train.x\\x1b[31m: unknown key"),
    "a byte that is not UTF-8": (None, ["output=caf\udce9"], "output='caf\\udce9': byte 0xe9 is not UTF-8"),
    "a code beyond Unicode": (GOOD + 'output: "\\UFFFFFFFF"\n', [], "run.yaml: not valid YAML"),
    "a name of 300 bytes": (None, ["name=" + "a" * 300], "name='aaaa"),
    "an empty key in a file": (GOOD + "'': 1\n", [], "'': unknown key"),
    "no output": (None, ["output="], "output='': must be the folder of all runs"),
    "no weights to start from": (None, ["train.init_from="], "train.init_from='': must be a safetensors file"),
    # values
    "nan": (None, ["optim.lr=.nan"], "optim.lr=nan: must be a finite number"),
    "infinity": (None, ["optim.lr=-.inf"], "optim.lr=-inf: must be a finite number"),
    "overflow to infinity": (None, ["optim.lr=1e999"], "optim.lr=inf: must be a finite number"),
    "nan in a free value": (None, ["data.buckets.64px.1=[.nan, 2]"], "data.buckets.64px.1.0=nan: must be a finite"),
    "huge whole number": (None, ["seed=99999999999999999999"], "seed (command line): a whole number beyond 64 bits"),
    "leading zero": (swapped("steps: 100", "steps: 0100"), [], "train.steps=0100 (run.yaml:12): readers disagree on"),
    "underscores": (None, ["train.steps=1_000"], "train.steps='1_000': must be a whole number"),
    "sexagesimal": (None, ["train.steps=1:40"], "train.steps='1:40': must be a whole number"),
    "a choice that is none": (None, ["optim.kind=adam"], "optim.kind='adam': did you mean adamw?"),
    "a choice by another type": (None, ["parallel.zero=true"], "parallel.zero=true: must be one of 0, 1, 2, 3"),
    "a number out of the choices": (None, ["parallel.zero=4"], "parallel.zero=4: must be one of 0, 1, 2, 3"),
    "an offload that is none": (
        None,
        ["parallel.offload=disk"],
        "parallel.offload='disk': must be one of none, optimizer",
    ),
    "unknown kind": (None, ["vae.kind=dtc"], "vae.kind='dtc': did you mean dct?"),
    "unknown size": (None, ["model.size=debugg"], "model.size='debugg': did you mean debug?"),
    "offload of nothing": (None, ["parallel.recompute.offload=true"], "parallel.recompute.offload=true with kind=none"),
    "every block": (None, ["parallel.recompute.every=1"], "parallel.recompute.every=1: must be an integer >= 2"),
    "an unknown compiler": (None, ["parallel.compile.backend=gcc"], "parallel.compile.backend='gcc': must be"),
    "refused by its dataclass": (None, ["parallel.mesh.ulysses=0"], "parallel.mesh.ulysses=0: must be an integer >="),
    "refused by a chosen dataclass": (None, ["vae.channels=0"], "vae.channels=0: must be 1 to"),
    "refused at the top": (None, ["name=a/b"], "name='a/b': must be the name of a folder"),
    "negative": (None, ["train.log_every=-1"], "train.log_every=-1: must be an integer >= 1"),
    "heads not divisible": (None, ["model.num_heads=5"], "model.num_heads=5: must be a divisor of"),
    "decoder": (None, ["data.decoder=opencv"], "data.decoder='opencv': must be one of pyav, decord, torchcodec"),
    "no colour": (None, ["data.background=grue"], "data.background='grue': must be a colour such as white, black"),
    "a colour with alpha": (None, ["data.background=#ff00ff80"], "data.background='#ff00ff80': must be a colour"),
    "no time to decode": (None, ["data.decode_timeout_s=0"], "data.decode_timeout_s=0: must be a number above 0"),
    "bad clips": (None, ["data.max_bad_share=2"], "data.max_bad_share=2: must be a number from 0 to 1"),
    "bad bucket row": (None, ["data.buckets.64px.9=[2.0, 2]"], "data.buckets.64px.9=[2.0, 2]: probabilities"),
    "adapters of no size": (None, ["lora.rank=-1"], "lora.rank=-1: must be an integer >= 0"),
    "adapters that draw": (None, ["lora.dropout=0.1"], "lora.dropout=0.1: must be 0"),
    "adapters of no scale": (None, ["lora.alpha=0"], "lora.alpha=0.0: must be a number > 0"),
    "adapters nowhere": (None, ["lora.targets=[]"], "lora.targets=[]: must name layers"),
    "less than no bad update": (None, ["guard.max_bad=-1"], "guard.max_bad=-1: must be an integer >= 0"),
    "a window of nothing": (None, ["guard.spike_window=2"], "guard.spike_window=2: must be an integer >= 8"),
    "slower than itself": (None, ["guard.straggler=1"], "guard.straggler=1.0: must be a number > 1; 0 names no"),
    "a hang before it begins": (None, ["guard.hang_s=-1"], "guard.hang_s=-1.0: must be a number >= 0; 0 is no wat"),
    "no time to start": (None, ["guard.start_s=0"], "guard.start_s=0.0: must be a number > 0"),
    # across sections
    "adapters of nothing": (None, ["lora.rank=4"], "lora.rank=4: adapters need weights to adapt; give train.init_from"),
    "channels that do not fit": (None, ["vae.channels=32"], "model.in_channels=64: vae.kind=dct"),
    "output channels that do not fit": (None, ["model.out_channels=7"], "model.out_channels=7: a velocity has the 64"),
    "one output channel for all": (None, ["model.out_channels=1"], "model.out_channels=1: a velocity has the 64"),
    "text that does not fit": (
        None,
        ["text.dim=128"],
        "model.context_in_dim=256: text.kind=bytes gives 128",
    ),
    "unknown engine": (
        None,
        ["parallel.engine=fsdp"],
        "parallel.engine='fsdp': must be one of native, deepspeed, coloss",
    ),
    "tensor axis elsewhere": (
        None,
        ["parallel.engine=deepspeed", "parallel.mesh.tensor=2"],
        "parallel.mesh.tensor=2: allowed with engine=deepspeed is 1; use mesh.ulysses, or engine=native",
    ),
    "fp64 elsewhere": (
        None,
        ["parallel.engine=deepspeed", "parallel.precision.compute=fp64"],
        "parallel.precision.compute=fp64: allowed with engine=deepspeed are fp32 and bf16; use one of them, or",
    ),
    "ZeRO 0 in bf16 elsewhere": (
        None,
        ["parallel.engine=deepspeed", "parallel.zero=0"],
        "parallel.zero=0: allowed with engine=deepspeed and precision.compute=fp32 and offload=none only; set th",
    ),
    "DDP by ColossalAI in two types": (
        None,
        ["parallel.engine=colossalai", "parallel.zero=0", "parallel.precision.compute=fp64"],
        "parallel.precision.master=fp32: allowed with engine=colossalai and zero=0 is that of precision.compute, fp64",
    ),
    "DDP by ColossalAI that rounds sums": (
        None,
        [
            "parallel.engine=colossalai",
            "parallel.zero=0",
            "parallel.precision.compute=fp32",
            "parallel.precision.reduce=bf16",
        ],
        "parallel.precision.reduce=bf16: allowed with engine=colossalai and zero=0 is that of precision.compute, fp32",
    ),
    "Gemini in fp32": (
        None,
        ["parallel.engine=colossalai", "parallel.zero=3", "parallel.precision.compute=fp32"],
        "parallel.precision.compute=fp32: allowed with engine=colossalai and zero=3 is bf16; use that, or zero=2",
    ),
    "SGD by Gemini": (
        None,
        ["parallel.engine=colossalai", "parallel.zero=3", "optim.kind=sgd"],
        "optim.kind=sgd: allowed with parallel.engine=colossalai and zero=3 is adamw",
    ),
    "apex, another update": (
        None,
        ["optim.kernel=apex", "optim.kind=sgd"],
        "optim.kernel=apex: allowed with kind=adamw only, and this is sgd; use kernel=torch",
    ),
    "apex, another engine": (
        None,
        ["optim.kernel=apex", "parallel.engine=deepspeed"],
        "parallel.engine=deepspeed: must be native with optim.kernel=apex; or optim.kernel=torch",
    ),
    "apex, masters on the CPU": (
        None,
        ["optim.kernel=apex", "parallel.offload=optimizer"],
        "parallel.offload=optimizer: must be none with optim.kernel=apex; or optim.kernel=torch",
    ),
    "apex, masters in fp64": (
        None,
        ["optim.kernel=apex", "parallel.precision.master=fp64"],
        "parallel.precision.master=fp64: must be fp32 or bf16 with optim.kernel=apex; or optim.kernel=torch",
    ),
    "apex, compiled blocks": (
        None,
        ["parallel.norm_kernel=apex", "parallel.compile.enabled=true"],
        "parallel.norm_kernel=apex: must be torch or auto with compile.enabled=true, which fuses norms",
    ),
    "compiled elsewhere": (
        None,
        ["parallel.engine=deepspeed", "parallel.compile.enabled=true"],
        "parallel.compile.enabled=true: allowed with engine=deepspeed is false",
    ),
    "a choice of shares on a ring": (
        None,
        ["parallel.mesh.dynamic=true", "parallel.mesh.ulysses=2", "parallel.mesh.ring=2"],
        "parallel.mesh.ring=2: allowed with dynamic=true is 1; use ulysses, or dynamic=false",
    ),
    "a choice of shares of one": (None, ["parallel.mesh.dynamic=true"], "parallel.mesh.dynamic=true with ulysses=1"),
    "guidance in training": (None, ["parallel.mesh.cfg=2"], "parallel.mesh.cfg=2: must be 1"),
    "warm-up beyond the end": (None, ["optim.warmup_steps=101"], "optim.warmup_steps=101: must be at most train"),
    "pack that does not divide": (
        None,
        ["data.balance_group=2"],
        "data.balance_group=2: must be a divisor of micro_batches=1",
    ),
    "packs on a ring": (
        None,
        [*PACKED, "parallel.mesh.ring=2"],
        "data.tokens_per_sequence=64: with parallel.mesh.ring=2 must be 0; use parallel.mesh.ulysses",
    ),
    "packs of one": (
        None,
        [*PACKED, "data.balance_group=1"],
        "data.balance_group=1: with tokens_per_sequence=64 must be a divisor of micro_batches=4 from 2 on",
    ),
    "negative sequence": (None, ["data.tokens_per_sequence=-1"], "data.tokens_per_sequence=-1: must be a number >="),
    "auto without a budget": (None, ["data.buckets.64px.1=[1.0, auto]"], "batch size auto needs a budget"),
    "negative cost": (None, ["data.cost.per_token=-1"], "data.cost.per_token=-1"),
    "no table": (None, ["data.table="], "data.table: missing"),
    "no buckets": (None, ["data.buckets={}"], "data.buckets: missing"),
    # the file
    "not UTF-8": (GOOD.encode() + b"output: caf\xe9\n", [], "run.yaml:13: not UTF-8 (byte 0xe9)"),
    "UTF-16": (GOOD.encode("utf-16"), [], "run.yaml:1: not UTF-8"),
    "NUL byte": (GOOD + "output: a\0b\n", [], "run.yaml: not valid YAML: special characters"),
    "tab": (swapped("  table:", "\ttable:"), [], "run.yaml:6: a tab where YAML wants spaces"),
    "broken YAML": (GOOD + "output: [a\n", [], "run.yaml:14: not valid YAML"),
    "a list at the top": ("- a\n", [], "run.yaml: holds a list"),
    "empty file": ("", [], "missing"),
    "two documents": (GOOD + "---\nname: b\n", [], "run.yaml:13: a second document begins"),
    "alias": (GOOD + "output: *x\n", [], "run.yaml:13: aliases and anchors (*x)"),
    "anchor": (GOOD + "output: &x y\n", [], "run.yaml:13: aliases and anchors (*x)"),
    "python tag": (GOOD + "output: !!python/object/apply:os.system [touch hacked]\n", [], "run.yaml:13: the tag"),
    "any tag": (GOOD + "output: !!str 3\n", [], "run.yaml:13: the tag"),
    "merge key": (GOOD + "<<: {seed: 1}\n", [], "<<: unknown key"),
    "interpolation": (GOOD + "output: ${oc.env:HOME}\n", [], "output=${oc.env:HOME} (run.yaml:13): ${...} is not"),
    "deep nesting": (GOOD + "output: " + "[" * 500 + "]" * 500 + "\n", [], "run.yaml:13: nested deeper than"),
    "too large": (GOOD + "# " + "x" * (1 << 20) + "\n", [], "run.yaml: 1048"),
    "missing include": (GOOD + "include: nowhere.yaml\n", [], "include=nowhere.yaml (run.yaml:13): no such file"),
    "include of itself": (GOOD + "include: run.yaml\n", [], "round in a circle (run.yaml -> run.yaml); remove"),
    "include that is no path": (GOOD + "include: {a: 1}\n", [], "include={'a': 1} (run.yaml:13): must be a path"),
    "include of 5,000 characters": (GOOD + f"include: {'a' * 5000}\n", [], "aaa (run.yaml:13): no such file"),
    "include of a folder": (GOOD + "include: /\n", [], "include=/ (run.yaml:13): no such file"),
    "include of a device": (GOOD + "include: /dev/zero\n", [], "include=/dev/zero (run.yaml:13): no such file"),
    "include with a NUL": (GOOD + 'include: "a\\0"\n', [], "include=a\\x00 (run.yaml:13): no such file"),
    "include that is false": (GOOD + "include: false\n", [], "include=False (run.yaml:13): must be a path or a list"),
    # the command line
    "an empty word": (None, [""], "'': not an override"),
    "a word that is no override": (None, ["faster"], "faster: not an override"),
    "a value is missing": (None, ["--train.steps"], "--train.steps: a value is missing"),
    "a value is missing before another": (None, ["--train.steps", "--seed=1"], "--train.steps: a value is missing"),
    "an empty key": (None, ["train..steps=1"], "train..steps=1: an empty key"),
    "a value that is no YAML": (None, ["optim.betas=[1"], "optim.betas (command line): not valid YAML"),
    "an alias": (None, ["optim.lr=*a"], "optim.lr (command line): aliases and anchors (*a) are not allowed"),
    "a star": (None, ["optim.lr=*"], "optim.lr (command line): * begins an alias, which is not allowed; put text"),
    "a number that would become 0": (None, ["optim.lr=1e-400"], "optim.lr=1e-400 (command line): is closer to 0 than"),
    "a value of a section that its own file sets too": (
        None,
        ["data.workers=-1"],
        "data.workers=-1: must be a number >= 0 (command line)",
    ),
    "a value in a table that the file sets too": (
        None,
        ["data.buckets.64px.9=[2, 1]"],
        "probabilities are numbers from 0 to 1; write [keep_prob, batch_size] or [[keep_prob, length_prob], batch_size]"
        " (command line)",
    ),
    "a value of a file beside one of the command line": (
        swapped("table: clips.csv", "table: clips.csv\n  pack: 3"),
        ["data.workers=1"],
        "micro_batches over the number of data-parallel processes suits (run.yaml:7, as data.pack)",
    ),
    "an interpolation": (None, ["train.steps=${x}"], "train.steps=${x} (command line): ${...} is not replaced"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_configuration_is_one_line_and_exit_code_2(
    case: str, good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, overrides, expected = BAD[case]
    if content is not None:
        good.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py", "run.yaml", *overrides])
    with pytest.raises(SystemExit) as caught:
        run_cli(lambda argv: save(config_from_argv(RunConfig, argv, "Train."), "made/config.yaml"))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert expected in err
    assert os.listdir(good.parent) == ["run.yaml"]


def test_there_are_enough_bad_configurations() -> None:
    assert len(BAD) >= 60


def test_the_good_one_is_good(good: Path) -> None:
    cfg = load_config(RunConfig, good)
    assert cfg.name == "trial"
    assert cfg.optim.lr == 1e-4
    assert cfg.model == dataclasses.replace(
        MODEL_SIZES["mmdit"]["debug"], in_channels=64, context_in_dim=256, vec_in_dim=256
    )
    assert cfg.vae.kind == "dct" and cfg.vae.channels == 16
    assert cfg.data.buckets["64px"] == {1: [1.0, 8], 9: [[1.0, 0.5], 2]}
    assert cfg.folder == Path("outputs/trial")


@pytest.mark.parametrize(
    "override",
    [["train.log_every=7"], ["--train.log_every=7"], ["--train.log_every", "7"], ["--train.log-every", "7"]],
)
def test_overrides_in_every_spelling(good: Path, override: list[str]) -> None:
    assert load_config(RunConfig, good, override).train.log_every == 7


def test_the_last_override_wins(good: Path) -> None:
    assert load_config(RunConfig, good, ["seed=1", "--seed", "2"]).seed == 2


def test_text_needs_no_yaml_quotes(good: Path) -> None:
    cfg = load_config(RunConfig, good, ["name=123", "train.init_from=a: b", "train.resume=none"])
    assert (cfg.name, cfg.train.init_from, cfg.train.resume) == ("123", "a: b", "none")
    assert load_config(RunConfig, good, ["train.init_from=null"]).train.init_from is None


def test_a_negative_number_is_a_value(good: Path) -> None:
    assert load_config(RunConfig, good, ["--parallel.mesh.shard", "-1"]).parallel.mesh.shard == -1


def test_a_table_is_replaced_as_a_whole_but_a_row_of_it_can_be_set(good: Path) -> None:
    whole = load_config(RunConfig, good, ["data.buckets={32px: {1: [1.0, 1]}}"])
    assert whole.data.buckets == {"32px": {1: [1.0, 1]}}
    row = load_config(RunConfig, good, ["data.buckets.64px.1=[0.5, 4]"])
    assert row.data.buckets["64px"] == {1: [0.5, 4], 9: [[1.0, 0.5], 2]}


def test_a_new_kind_forgets_the_keys_of_the_old_one(good: Path) -> None:
    cfg = load_config(RunConfig, good, ["vae.kind=hunyuan", "vae.tiling=true"])
    assert cfg.vae == AUTOENCODER_CONFIGS["hunyuan"](tiling=True)


def test_a_size_is_the_base_whatever_layer_names_it(good: Path) -> None:
    good.write_text(swapped("size: debug, ", "").replace("in_channels: 64,", "in_channels: 64, mlp_ratio: 3,"))
    cfg = load_config(RunConfig, good, ["model.size=debug"])
    assert cfg.model.depth == MODEL_SIZES["mmdit"]["debug"].depth
    assert cfg.model.mlp_ratio == 3.0


def test_includes_merge_in_order_relative_to_their_file(good: Path) -> None:
    folder = good.parent / "parts"
    folder.mkdir()
    (folder / "a.yaml").write_text("seed: 1\noutput: a\ntrain: {steps: 5, log_every: 2}\n")
    (folder / "b.yaml").write_text("include: c.yaml\nseed: 2\n")
    (folder / "c.yaml").write_text("seed: 3\noptim: {eps: 1e-8}\n")
    good.write_text("include: [parts/a.yaml, parts/b.yaml]\n" + GOOD)
    cfg = load_config(RunConfig, good)
    assert (cfg.seed, cfg.output, cfg.train.steps, cfg.train.log_every) == (2, "a", 100, 2)
    assert (cfg.optim.eps, cfg.optim.lr) == (1e-8, 1e-4)


def test_a_mistake_in_an_include_names_that_file(good: Path) -> None:
    (good.parent / "a.yaml").write_text("seed: 1\ntrain: {log_every: x}\n")
    good.write_text("include: a.yaml\n" + GOOD)
    with pytest.raises(UserError, match=r"^train\.log_every='x': must be a whole number \(\S*a\.yaml:2\)$"):
        load_config(RunConfig, good)


def test_a_longer_circle_of_includes_is_refused(good: Path) -> None:
    (good.parent / "a.yaml").write_text("include: run.yaml\n")
    good.write_text("include: a.yaml\n" + GOOD)
    with pytest.raises(UserError, match=r"run\.yaml -> a\.yaml -> run\.yaml"):
        load_config(RunConfig, good)


def test_includes_without_end_are_refused(good: Path) -> None:
    for number in range(20):  # each includes the next twice: 2^20 files
        (good.parent / f"{number}.yaml").write_text(f"include: [{number + 1}.yaml, {number + 1}.yaml]\n")
    (good.parent / "20.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match="include adds up to more than 100 files"):
        load_config(RunConfig, "0.yaml")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "name too long", "loop", "NUL"])
def test_what_is_no_file_is_no_configuration(kind: str, good: Path) -> None:
    os.mkfifo("pipe")
    os.symlink("loop", "loop")
    os.mkdir("folder")
    path = {"device": "/dev/zero", "name too long": "a" * 5000, "NUL": "a\0b"}.get(kind, kind)
    with pytest.raises(UserError, match="cannot be read"):
        load_config(RunConfig, path)
    with pytest.raises(UserError, match="cannot be read"):
        config_from_argv(RunConfig, [path], "Train.")


def test_text_is_no_grammar(good: Path) -> None:
    for text in ("???", "${x}", "${", "\\\\${", "${oc.env:HOME}", "a: b"):
        cfg = load_config(RunConfig, good, [f"output={text}", "seed=1"])
        assert cfg.output == text
        save(cfg, "saved.yaml")
        assert load_config(RunConfig, "saved.yaml") == cfg


def test_the_same_file_may_be_included_twice(good: Path) -> None:
    (good.parent / "a.yaml").write_text("seed: 1\n")
    good.write_text("include: [a.yaml, a.yaml]\n" + GOOD)
    assert load_config(RunConfig, good).seed == 1


@pytest.mark.parametrize(
    "name",
    ["plain", "1e-4", "no", "true", "012", "null", "~", "a: b", "${x}", "ä ö", "0x1F", " b", "#", "*a", "!x", "16:9"],
)
def test_the_saved_configuration_reads_back_equal(good: Path, name: str) -> None:
    cfg = dataclasses.replace(load_config(RunConfig, good), output=name)
    save(cfg, "saved/config.yaml")
    again = load_config(RunConfig, "saved/config.yaml")
    assert again == cfg
    assert config_hash(again) == config_hash(cfg)
    assert os.listdir("saved") == ["config.yaml"]


def test_the_resolved_configuration_states_every_field(good: Path) -> None:
    text = to_yaml(load_config(RunConfig, good))
    for cls in (MODEL_CONFIGS["mmdit"], AUTOENCODER_CONFIGS["dct"], TEXT_ENCODER_CONFIGS["bytes"]):
        assert all(f"{field.name}:" in text for field in dataclasses.fields(cls))
    assert " size:" not in text


def test_the_hash_changes_with_any_value(good: Path) -> None:
    cfg = load_config(RunConfig, good)
    others = [["seed=43"], ["optim.lr=2e-4"], ["data.buckets.64px.1=[0.5, 8]"], ["train.init_from=x"]]
    hashes = {config_hash(load_config(RunConfig, good, override)) for override in others} | {config_hash(cfg)}
    assert len(hashes) == 5 and all(len(text) == 16 for text in hashes)


def test_a_sampling_job(good: Path) -> None:
    good.write_text("weights: outputs/trial\n")
    cfg = load_config(SampleConfig, good, ["--prompt", "a red circle: moves [left]", "--num-sample", "2"])
    assert (cfg.prompt, cfg.num_sample, cfg.model, cfg.vae) == ("a red circle: moves [left]", 2, None, None)
    assert load_config(SampleConfig, good, ["prompts=[a, b]", "sampling.seed=0"]).prompts == ("a", "b")
    assert load_config(SampleConfig, good).prompt is None  # of a script, whose prompts are in its batches
    for key in ("save_dir", "lora", "prompt_csv", "weights"):
        with pytest.raises(UserError, match=rf"^{key}='': must be"):
            load_config(SampleConfig, good, ["prompt=x", f"{key}="])
    with pytest.raises(UserError, match=r"^sampling\.num_steps=0: must be an integer >= 1"):
        load_config(SampleConfig, good, ["prompt=x", "sampling.num_steps=0"])
    for word, said in (
        ("sampling.guidance_low=2", "sampling.guidance_low=2.0: must be null without low_noise, a second expert"),
        ("low_noise={weights: w, boundary: 1}", "low_noise.boundary=1.0: must be a number between 0 and 1, or null"),
        (
            "low_noise={weights: ''}",
            "low_noise.weights='': must be a run folder, an export folder or a safetensors file",
        ),
    ):
        with pytest.raises(UserError) as error:
            load_config(SampleConfig, good, ["prompt=x", word])
        assert str(error.value) == f"{said} (command line)"


def test_help_explains_and_exits(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        config_from_argv(RunConfig, ["--help"], "Train a model.")
    assert caught.value.code == 0
    assert "Train a model." in capsys.readouterr().out


def test_overrides_come_after_the_file(good: Path) -> None:
    for argv in (["--seed", "1", "run.yaml"], ["seed=1", "run.yaml"]):
        with pytest.raises(UserError, match="the configuration file comes first"):
            config_from_argv(RunConfig, argv, "Train.")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"^nowhere\.yaml: cannot be read \(No such file or directory\)"):
        load_config(RunConfig, "nowhere.yaml")


def _fail(_: list[str]) -> None:
    raise UserError("key=1:\n  must be one of 2")


def test_rank_0_speaks_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []
    monkeypatch.setattr(main.time, "sleep", waited.append)
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)
    cases = (("0", "error: key=1: must be one of 2\n", 0), ("1", "error: rank 1: key=1: must be one of 2\n", 1))
    for rank, line, waits in cases:
        monkeypatch.setenv("RANK", rank)
        waited.clear()
        with pytest.raises(SystemExit) as caught:
            run_cli(_fail)
        assert caught.value.code == 2 and len(waited) == waits
        assert capsys.readouterr().err == line


def test_run_cli_passes_the_exit_code_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for returned, code in ((None, 0), (0, 0), (75, 75)):
        with pytest.raises(SystemExit) as caught:
            run_cli(lambda _, value=returned: value)
        assert caught.value.code == code


def test_our_own_mistakes_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda _: 1 // 0)


def test_a_process_ends_with_one_line_and_no_traceback(good: Path) -> None:
    program = (
        "from opensora.cli.main import run_cli\n"
        "from opensora.config import RunConfig\nfrom opensora.config.load import config_from_argv\n"
        "run_cli(lambda argv: print(config_from_argv(RunConfig, argv, 'Train.')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "run.yaml", "train.stepz=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: train.stepz: unknown key; did you mean steps? (command line)\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Small:
    kind: Literal["small"] = "small"
    width: int
    ratio: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Large:
    kind: Literal["large"] = "large"
    names: tuple[str, ...] = ()
    limits: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    either: int | str | None = None

    def __post_init__(self) -> None:
        if self.either == "x":
            raise ValueError("names and either do not go together")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    part: Any = section({"small": Small, "large": Large}, sizes={"small": {"s": Small(width=1), "m": Small(width=2)}})
    spare: Any = section({"small": Small}, optional=True)


def test_building_any_tree() -> None:
    tree = build(Tree, {"part": {"kind": "large", "names": ["a"], "limits": {"x": [1, 2]}, "either": "y"}})
    assert tree == Tree(part=Large(names=("a",), limits={"x": (1, 2.0)}, either="y"))
    assert isinstance(tree.part.limits["x"][1], float)
    assert build(Tree, plain(tree)) == tree
    assert build(Tree, {"part": {"kind": "small", "size": "m", "ratio": 3}}).part == Small(width=2, ratio=3.0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"part": {"kind": "small"}}, "part.width: missing; must be a whole number"),
        ({"part": {"kind": "large", "size": "s"}}, "part.size: unknown key"),
        ({"part": {"kind": ["small"]}}, "part.kind=['small']: did you mean"),
        ({"part": {"kind": "large", "names": ["a", 1]}}, 'part.names.1=1: must be text; write "1" in quotes'),
        ({"part": {"kind": "large", "names": "a"}}, "part.names='a': must be a list, each text"),
        ({"part": {"kind": "large", "limits": {"x": [1]}}}, "part.limits.x=[1]: must be a list of 2"),
        ({"part": {"kind": "large", "limits": {1: [1, 2]}}}, "part.limits.1=1: must be text"),
        ({"part": {"kind": "large", "either": 1.5}}, "part.either=1.5: must be a whole number or text or null"),
        ({"part": {"kind": "large", "either": "x"}}, "part: names and either do not go together"),
        (
            {"part": {"kind": "small", "size": "m"}, "spare": {"kind": "large"}},
            "spare.kind='large': must be one of small",
        ),
        ({"part": None}, "part=null: must be a section with kind, one of small, large"),
    ],
)
def test_mistakes_in_any_tree(data: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(Tree, data)
    assert message in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_training_configurations_load(path: Path) -> None:
    assert load_config(RunConfig, path).name


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sample").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sampling_configurations_load(path: Path) -> None:
    assert load_config(SampleConfig, path, ["--prompt", "a cat"]).weights


def test_configurations_of_python_scripts(good: Path) -> None:
    """A dict, and one of OmegaConf with its interpolations, are read as the file would be, and given back."""
    wanted = load_config(RunConfig, good, ["seed=7"])
    as_dict = read_yaml(good)[0]
    assert load_config(RunConfig, as_dict, ["seed=7"]) == wanted
    given = OmegaConf.create({**as_dict, "seed": "${train.steps}"})
    assert load_config(RunConfig, given).seed == wanted.train.steps
    assert load_config(RunConfig, to_omegaconf(wanted)) == wanted
    for odd in ({**as_dict, "seed": "${nothing.there}"}, {**as_dict, "seed": "???"}, {**as_dict, "sede": 1}):
        with pytest.raises(UserError) as error:
            load_config(RunConfig, OmegaConf.create(odd))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["seed", "text.seed", "optim.lr", "train.steps", "data.buckets.64px.1"])
@pytest.mark.parametrize("value", [10**400, -(2**63), 2**64])
def test_whole_numbers_of_python_have_64_bits(key: str, value: int) -> None:
    """A dict may hold what no YAML of ours says, and what no tensor or file could hold."""
    layer: Any = OmegaConf.to_container(OmegaConf.create(GOOD))
    *above, last = key.split(".")
    inner = layer
    for name in above:
        inner = inner.setdefault(int(name) if name.isdigit() else name, {})
    inner[int(last) if last.isdigit() else last] = [1.0, value] if last.isdigit() else value
    with pytest.raises(UserError, match=rf"^{re.escape(key)}(\.1)?: a whole number beyond 64 bits$"):
        load_config(RunConfig, layer)


@pytest.mark.parametrize("pattern", ["*.csv", "**/clips.parquet", "*"])
def test_a_glob_needs_no_quotes_on_the_command_line(pattern: str, good: Path) -> None:
    assert load_config(RunConfig, good, [f"data.table={pattern}"]).data.table == pattern


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["run.yaml", "--help"], ["run.yaml", "seed=x", "--help"]])
def test_help_is_given_wherever_it_is_asked_for(
    argv: list[str], good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        config_from_argv(RunConfig, argv, "Train.")
    assert caught.value.code == 0 and "usage: CONFIG.yaml" in capsys.readouterr().out


def test_keys_that_had_other_names_are_read(good: Path) -> None:
    """From a file, an override and Python; the new names are keys that there are."""
    values: dict[str, Any] = {"unused_rows": "report", "balance_group": 1, "text": 0.5, "pooled": 0.5}
    values["objective"] = {"kind": "rectified_flow", "sigma_min": 0.25}

    def at(tree: Any, keys: Sequence[str | int]) -> Any:
        return tree if not keys else at(tree[keys[0]], keys[1:])

    for old, new in RENAMED.items():
        value = values.get(str(new[0][-1]), 7)
        override = load_config(RunConfig, "run.yaml", [f"{'.'.join(map(str, old))}={value}"])
        tree = plain(override)
        for name in new:
            del at(tree, name[:-1])[name[-1]]
        for key in old[:-1]:
            tree.setdefault(key, {})
        at(tree, old[:-1])[old[-1]] = value
        (good.parent / "old.yaml").write_text(to_yaml_text(tree))
        for cfg in (override, load_config(RunConfig, tree), load_config(RunConfig, "old.yaml")):
            found = plain(cfg)
            for name in new:
                want = value if not isinstance(value, dict) else {**at(found, name), **value}
                assert at(found, name) == want, name


def test_a_section_that_had_another_name_keeps_what_is_left_in_it(good: Path) -> None:
    cfg = load_config(RunConfig, "run.yaml", ["flow.sigma_min=0.5", "flow.text_dropout=0.25"])
    assert cfg.objective.sigma_min == 0.5
    assert (cfg.conditioning.dropout.text, cfg.conditioning.dropout.pooled) == (0.25, 0.25)
    good.write_text(GOOD + "flow: {sigma_min: 0.5, text_dropout: 0.25}\n")
    assert load_config(RunConfig, "run.yaml") == cfg
    good.write_text(GOOD + "flow: {sigma_min: 2}\n")
    line = len(good.read_text().splitlines())
    with pytest.raises(UserError, match=rf"objective\.sigma_min=2.*\(run\.yaml:{line}, as flow\.sigma_min\)"):
        load_config(RunConfig, "run.yaml")


def test_an_old_key_inside_a_section_of_the_command_line(good: Path) -> None:
    """``section={old: value}`` is ``section.old=value``, for every key that had another name."""
    values = {"empty_rows": "error", "pack": 1, "max_returns": 7, "aside_s": 7.5, "text_dropout": 0.25}
    for old in RENAMED:
        if old == ("flow",):
            continue
        section, key = ".".join(map(str, old[:-1])), str(old[-1])
        inside = load_config(RunConfig, "run.yaml", [f"{section}={{{key}: {values[key]}}}"])
        assert inside == load_config(RunConfig, "run.yaml", [f"{section}.{key}={values[key]}"])
    cfg = load_config(RunConfig, "run.yaml", ["flow={kind: rectified_flow, text_dropout: 0.25, sigma_min: 0.5}"])
    assert (cfg.objective.sigma_min, cfg.conditioning.dropout.pooled) == (0.5, 0.25)
    with pytest.raises(UserError, match=r"data\.pack: is called data\.balance_group now.* out \(command line\)$"):
        load_config(RunConfig, "run.yaml", ["data={pack: 1, balance_group: 1}"])
    with pytest.raises(UserError, match=r"conditioning\.dropout\.text='x': .*\(command line, as flow\)$"):
        load_config(RunConfig, "run.yaml", ["flow={text_dropout: x}"])
    with pytest.raises(UserError, match=r"flow: unknown key; .*\(command line\)$"):
        load_config(RunConfig, "run.yaml", ["flow=null"])


def test_a_mistake_in_a_free_mapping_names_where_it_was_made(good: Path) -> None:
    good.write_text(GOOD + "conditioning: {dropout: {text: 0.1}}\n")
    with pytest.raises(UserError, match=r"conditioning\.masks: .*\(command line\)$"):
        load_config(RunConfig, "run.yaml", ["conditioning.masks.random=0.1"])


def test_a_key_under_both_names_is_refused(good: Path) -> None:
    good.write_text(GOOD.replace("  table:", "  pack: 1\n  balance_group: 1\n  table:"))
    with pytest.raises(UserError, match=r"data\.pack: is called data\.balance_group now.*\(run\.yaml:\d+\)$"):
        load_config(RunConfig, "run.yaml")
