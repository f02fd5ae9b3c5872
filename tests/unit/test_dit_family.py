"""What DiT, Latte and PixArt say of themselves: operations, refusals, first values, dropped prompts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from acceleration.accounting.peak_memory import state_of
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import LoraConfig, MeshConfig, OptimConfig, ParallelConfig, PrecisionConfig
from acceleration.distributed import mesh as meshes
from acceleration.sequence import SequenceParallel
from acceleration.sharding import fsdp
from opensora.assembly.layout import check_layout
from opensora.assembly.token_layout import forward_arguments
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.models.base import Width, Widths
from opensora.models.conditions import Conditions, TokenBatch
from opensora.models.dit import DiTConfig
from opensora.models.families import FAMILIES, build_model, describe, family_of, init_model_
from opensora.models.latte import LatteConfig
from opensora.models.layers.stages import run_in_order
from opensora.models.pixart import PixArtConfig, PixArtMSConfig, PixArtSigmaConfig
from opensora.planner.forecast import Forecaster
from opensora.planner.meta_model import denoiser_inputs, meta_model, structure
from opensora.schedulers.rectified_flow import RectifiedFlowConfig
from opensora.utils.errors import UserError
from tests.dist.chapters import MODELS, batches, plain_model

KINDS = ("dit", "latte", "pixart", "pixart_ms", "pixart_sigma")


QUICK = ("dit", "latte", "pixart_kv")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    cfg = MODELS[name]
    factored = describe(cfg).token_axes == "factored"
    for frames, places in ((1, 64), (4, 16)):
        batch = MicroBatch(samples=2, txt=6, img=frames * places, frames=frames if factored else None, has_mask=True)
        with torch.device("meta"):
            model = build_model(cfg)
        with FlopCounterMode(display=False) as counter:
            model(**denoiser_inputs(cfg, batch, SequenceParallel(meshes.view({}))))
        forecast = Forecaster(cfg, OptimConfig(), device_type="cpu", objective=RectifiedFlowConfig())
        counted = counter.get_total_flops()
        assert forecast.forward_flops(batch) == pytest.approx(counted, rel=0.01 if name == "pixart_kv" else 0)


WIDTHS = Widths(latents=Width(4, "vae.kind=sd"), text=Width(9, "text.kind=t5"), pooled=Width(9, "text.kind=clip"))


@pytest.mark.parametrize("kind", KINDS)
def test_widths_that_do_not_fit_are_named(kind: str) -> None:
    cfg, family = FAMILIES[kind].sizes["debug"], FAMILIES[kind]
    key = "text.kind=clip" if kind in ("dit", "latte") else "text.kind=t5"
    with pytest.raises(ValueError, match=f"caption_channels=.*{key} gives 9; set model.caption_channels=9"):
        family.check(cfg, WIDTHS)
    family.check(replace(cfg, caption_channels=9), WIDTHS)
    with pytest.raises(ValueError, match=r"in_channels=16: vae.kind=sd gives 4"):
        family.check(replace(cfg, caption_channels=9, in_channels=16), WIDTHS)


def test_models_of_classes_read_no_prompts() -> None:
    cfg = DiTConfig(condition="label_1000")
    FAMILIES["dit"].check(cfg, WIDTHS)
    assert (describe(cfg).num_classes, describe(cfg).pooled_dim, describe(cfg).text) == (1000, 0, "none")


BAD: list[tuple[type, dict[str, Any], str]] = [
    (DiTConfig, {"condition": "label_0"}, "condition=label_0: must be text, or label_N"),
    (DiTConfig, {"condition": "labels_10"}, "condition=labels_10"),
    (DiTConfig, {"num_heads": 7}, "num_heads=7: must be a divisor of hidden_size=1152"),
    (DiTConfig, {"hidden_size": 18, "num_heads": 2}, "hidden_size=18: must be a multiple of 4"),
    (LatteConfig, {"depth": 0}, "depth=0: must be an integer >= 1"),
    (LatteConfig, {"patch_size": (1, 0, 2)}, "patch_size="),
    (PixArtConfig, {"space_scale": 0.0}, "space_scale=0.0: must be a number > 0"),
    (PixArtConfig, {"base_size": 1}, "base_size=1: must be latents of at least a patch, 2"),
    (PixArtConfig, {"input_size": (1, 1, 8)}, "input_size="),
    (PixArtConfig, {"model_max_length": 0}, "model_max_length=0"),
    (PixArtMSConfig, {"hidden_size": 64}, "hidden_size=64: must be a multiple of 3"),
    (PixArtSigmaConfig, {"kv_compress_layer": (28,)}, "kv_compress_layer=28: must be blocks from 0 to 27"),
    (PixArtSigmaConfig, {"kv_compress_scale_factor": 0}, "kv_compress_scale_factor=0"),
]


@pytest.mark.parametrize(("config", "keys", "said"), BAD)
def test_shapes_that_make_no_model_are_refused(config: type, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")) as caught:
        config(**keys)
    assert len(str(caught.value).splitlines()) == 1


def test_tokens_of_compressed_keys_are_not_cut() -> None:
    cfg = MODELS["pixart_kv"]
    for mesh in (MeshConfig(ulysses=2, shard=1), MeshConfig(ring=2, shard=1)):
        with pytest.raises(UserError, match=r"parallel.mesh.(ulysses|ring)=2: blocks of model.kind=pixart_sigma"):
            check_layout(mesh, 2, cfg)
        check_layout(mesh, 2, replace(cfg, kv_compress_layer=()))
    check_layout(MeshConfig(tensor=2), 2, cfg)


def outputs(model: Any, cfg: Any, **changes: Tensor | None) -> Tensor:
    """Of the first micro-batch, with some of its conditions changed."""
    sample = batches(cfg, 0)[0]
    tokens = TokenBatch(x=sample.x, positions=sample.positions, grid=sample.grid.sides)
    told = replace(sample.conditions, **changes)
    return model(**forward_arguments(cfg, tokens, sample.t, told)).detach()


@pytest.mark.parametrize("name", MODELS)
def test_dropped_samples_do_not_know_their_prompts(name: str) -> None:
    """The second sample is dropped: another prompt changes nothing for it, and not being dropped does."""
    cfg = MODELS[name]
    model, told = plain_model(cfg), batches(cfg, 0)[0].conditions
    changes: dict[str, Any] = {}
    if told.text is not None:
        changes["text"] = told.text.flip(0) + 1
    if told.pooled is not None:
        changes["pooled"] = told.pooled.flip(0) + 1
    if told.label is not None:
        changes["label"] = (told.label + 1) % 7
    truth, found = outputs(model, cfg), outputs(model, cfg, **changes)
    assert torch.equal(found[1], truth[1]) and not torch.allclose(found[0], truth[0])
    kept = torch.tensor([False, False])
    assert not torch.allclose(outputs(model, cfg, dropped=kept)[1], truth[1])
    if told.label is not None:  # no class is the one behind the last
        none = torch.full_like(told.label, describe(cfg).num_classes)
        assert torch.equal(outputs(model, cfg, dropped=kept, label=none)[1], truth[1])


def test_pixart_ms_is_told_height_by_width() -> None:
    size = torch.tensor([[480.0, 640.0], [256.0, 128.0]])
    tokens = TokenBatch(x=torch.zeros(2, 1, 16), positions=torch.zeros(2, 1, 3))
    told = Conditions(text=torch.zeros(2, 1, 20), size=size)
    info = family_of(MODELS["pixart_ms"]).arguments(MODELS["pixart_ms"], tokens, torch.zeros(2), told)["data_info"]
    assert torch.equal(info["hw"], size) and info["ar"].tolist() == [[0.75], [2.0]]


@pytest.mark.parametrize("name", ["dit", "pixart", "pixart_kv"])
def test_step_caches_see_what_attention_reads(name: str) -> None:
    cfg, seen = MODELS[name], dict[str, Any]()
    model = plain_model(cfg)

    def look(stages: Any, streams: Any) -> Tensor:
        seen["stated"] = stages[0].modulated(next(iter(stages[0].blocks)), streams)
        return run_in_order(stages, streams)

    model.run_stages = look  # type: ignore[assignment]
    model.blocks[0].attn.qkv.register_forward_pre_hook(lambda _, args: seen.update(read=args[0]))  # type: ignore
    outputs(model, cfg)
    assert torch.equal(seen["stated"], seen["read"])


def test_hidden_text_is_not_read() -> None:
    cfg = MODELS["pixart"]
    model, told = plain_model(cfg), batches(cfg, 0)[0].conditions
    assert told.text is not None and told.text_mask is not None and not told.text_mask.all()
    other = torch.where(told.text_mask[..., None], told.text, 7.0)
    assert torch.allclose(outputs(model, cfg, text=other), outputs(model, cfg), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_first_values(kind: str) -> None:
    """An untrained model gives zeros; what is not zero has the family's deviation."""
    cfg = FAMILIES[kind].sizes["debug"]
    if kind == "pixart_sigma":
        cfg = replace(
            cfg, kv_compress_sampling="conv", kv_compress_scale_factor=2, kv_compress_layer=(1,), qk_norm=True
        )
    model = build_model(cfg)
    init_model_(model, 5)
    values = dict(model.named_parameters())
    assert not outputs(model.double(), cfg).any()
    for name, parameter in values.items():
        inputs, width = parameter[0].numel() if parameter.ndim > 1 else 1, parameter.shape[0]
        zero = name.endswith(".bias") or name.startswith("final_layer.linear") or ".cross_attn.proj" in name
        if zero or "adaLN_modulation" in name:
            assert not parameter.any(), name
        elif name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(".sr.weight"):
            assert (parameter == 0.25).all(), name
        elif name.endswith(("table", "y_embedding")):
            assert 0.3 < parameter.std().item() * inputs**0.5 < 1.8, name
        elif name.startswith(("t_embedder", "y_embedder", "csize", "ar_", "t_block")):
            assert 0.015 < parameter.std().item() < 0.025, name
        else:
            assert parameter.std().item() == pytest.approx((2 / (inputs + width)) ** 0.5, rel=0.15), name


@pytest.mark.parametrize("sampling", ["ave", "uniform", "uniform_every", "conv"])
def test_coarser_keys_are_those_of_the_first_places(sampling: Any) -> None:
    """Written out for one clip of two frames, on a grid that the factor does not divide."""
    from opensora.models.pixart.layers import CompressedAttention

    attention = CompressedAttention(8, 2, qk_norm=False, sampling=sampling, factor=2).double()
    x = torch.randn(3, 2 * 5 * 4, 8, dtype=torch.float64)
    found = attention.compressed(x, (2, 5, 4)).detach()
    grid = x.reshape(3, 2, 5, 4, 8)
    rows = []
    for frame in range(2):
        for i in range(0, 4, 2):
            for j in range(0, 4, 2):
                square = grid[:, frame, i : i + 2, j : j + 2]  # (B, 2, 2, D)
                if sampling == "conv":
                    mixed = torch.einsum("bijd,dij->bd", square, attention.sr.weight[:, 0]) + attention.sr.bias
                    rows.append(torch.nn.functional.layer_norm(mixed, (8,), eps=1e-5))
                else:
                    rows.append(square[:, 0, 0])
    truth = x[:, ::2] if sampling == "uniform_every" else torch.stack(rows, dim=1)
    assert torch.allclose(found, truth.detach(), atol=1e-12)


def test_the_null_text_beyond_its_rows_repeats_the_last() -> None:
    from opensora.models.layers.caption import CaptionEmbedder, for_every_sample

    embedder = CaptionEmbedder(3, 4, rows=2)
    torch.nn.init.normal_(embedder.y_embedding)
    null = embedder.null(4)
    assert torch.equal(null, embedder.y_embedding[[0, 1, 1, 1]])
    assert torch.equal(for_every_sample(torch.tensor([[1, 0], [1, 1]]), 4), torch.tensor([[1, 0], [1, 1]] * 2).bool())
    with pytest.raises(ValueError, match="text mask of 2 rows"):
        for_every_sample(torch.ones(2, 2), 3)


def test_the_null_text_keeps_its_digits() -> None:
    """In fp32 beside bf16 that computes, as the masters of what is trained: it is saved and exported. In an adapted
    model it is a part of the base. The forecast counts it so."""
    cfg, precision = FAMILIES["pixart"].sizes["debug"], PrecisionConfig(compute="bf16", reduce="fp32", master="fp32")
    place = RankLayout(meshes.view({}), ParallelConfig(precision=precision))
    for adapters in (LoraConfig(), LoraConfig(rank=2, targets=family_of(cfg).lora_targets)):
        model = meta_model(cfg, adapters)
        fsdp.materialize(model, precision, torch.device("cpu"), lambda name, tensor: None)
        is_base = bool(adapters.rank)
        assert model.get_parameter("y_embedder.y_embedding").dtype == (torch.bfloat16 if is_base else torch.float32)
        held = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        assert state_of(structure(cfg, adapters=adapters), place, OptimConfig()).weights == held


@pytest.mark.parametrize(("model", "fits"), [("kind: pixart", False), ("kind: dit, condition: label_9", True)])
def test_other_engines_keep_nothing_frozen(model: str, fits: bool, tmp_path: Path) -> None:
    path, text = tmp_path / "a.yaml", "{kind: classes, num_classes: 9}" if fits else "{kind: bytes, dim: 32}"
    shape = "in_channels: 16, caption_channels: 32, hidden_size: 36, num_heads: 2, depth: 1"
    path.write_text(
        f"name: a\nmodel: {{{model}, {shape}}}\nvae: {{kind: dct, channels: 16}}\ntext: {text}\n"
        "data: {table: a.csv, buckets: {32px: {1: [1.0, 1]}}}\nobjective: {kind: iddpm}\n"
        "parallel: {engine: deepspeed, precision: {compute: fp32}}\ntrain: {steps: 1}\n"
    )
    if fits:
        assert load_config(RunConfig, path).parallel.engine == "deepspeed"
        return
    with pytest.raises(UserError, match=r"parallel.engine=deepspeed: model.kind=pixart has parameters") as caught:
        load_config(RunConfig, path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in ("mmdit", "hunyuan_video", "toy_factored")])
def test_sequences_hold_one_sample_each(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        f"name: a\nmodel: {{kind: {kind}, in_channels: 16, caption_channels: 32, hidden_size: 36, num_heads: 2}}\n"
        "vae: {kind: dct, channels: 16}\ntext: {kind: bytes, dim: 32}\nobjective: {kind: iddpm}\n"
        "data: {table: a.csv, tokens_per_sequence: 64, micro_batches: 2, balance_group: 2, "
        "buckets: {32px: {1: [1.0, 1]}}}\ntrain: {steps: 1}\n"
    )
    with pytest.raises(UserError, match=f"tokens_per_sequence=64: model.kind={kind} takes one sample per sequence"):
        load_config(RunConfig, path)
