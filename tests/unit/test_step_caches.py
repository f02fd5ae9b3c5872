"""Step caches on one process: golden values of published code, formulas written out here, and what is refused."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from acceleration.distributed import mesh as meshes
from acceleration.protocol import block_names
from opensora.assembly.step_caches import check_cache, step_cache
from opensora.config.load import load_config, to_yaml
from opensora.config.run import RunConfig, SampleConfig
from opensora.inference.check import check_step_cache
from opensora.models.conditions import Conditions
from opensora.models.families import build_model, describe
from opensora.models.layers import joint_blocks
from opensora.models.layers.embedding import sinusoid
from opensora.models.layers.rope import rope_table
from opensora.models.mmdit import MMDiTConfig
from opensora.sampling.caches import (
    CacheConfig,
    DBCache,
    Decision,
    FirstBlockCache,
    MagCache,
    NoCache,
    PyramidAttentionBroadcast,
    TeaCache,
)
from opensora.sampling.caches.decisions import TeaDecisions
from opensora.sampling.evaluation import Evaluation
from opensora.sampling.guidance import Guidance, NoGuidance, TextGuidance
from opensora.sampling.loop import denoise
from opensora.sampling.options import SamplingOption
from opensora.schedulers.euler import Euler
from opensora.utils.errors import UserError
from tests.factored_family import ToyConfig
from tests.golden_autoencoders import relative
from tests.unit.test_config import GOOD
from tests.unit.test_mmdit import DEBUG, inputs, random_model

ONE = meshes.view({})


# --- golden values -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(golden: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(golden / "step_cache.safetensors"), json.loads((golden / "step_cache.json").read_text())


def golden_cache(case: dict[str, Any]) -> CacheConfig:
    if case["method"] == "none":
        return NoCache()
    if case["method"] == "first block cache":
        return FirstBlockCache(threshold=case["threshold"])
    low, high = case["timestep_range"]
    return PyramidAttentionBroadcast(spatial=case["skip"], time_range=(float(low), float(high)))


@torch.no_grad()
@pytest.mark.parametrize("index", range(7))
def test_golden_trajectories(published: tuple[dict[str, Tensor], dict[str, Any]], index: int) -> None:
    """12 Euler steps of a tiny Flux: every step's tokens, and which steps computed."""
    tensors, facts = published
    case, numbers = facts["cases"][index], facts["model"]
    shape = {name: tuple(value) if isinstance(value, list) else value for name, value in numbers.items()}
    model = build_model(MMDiTConfig(**shape, guidance_embed=True, cond_embed=False, patch_size=1))
    model.load_state_dict({name[2:]: x.float() for name, x in tensors.items() if name.startswith("w.")})
    log: list[Decision] = []
    seen: list[Tensor] = []

    def predict(x: Tensor, t: Tensor, known: Conditions) -> Tensor:
        seen.append(x)
        scale = torch.full((1,), case["guidance"])
        ids, txt_ids = tensors["in.img_ids"][None], torch.zeros(1, 5, 3)
        out: Tensor = model(x, ids, known.text, txt_ids, t, known.pooled, guidance=scale)
        return out

    cache = step_cache(golden_cache(case), model, ONE, log.append)
    known = Conditions(text=tensors["in.txt"], pooled=tensors["in.y_vec"])
    solver = Euler([float(t) for t in tensors["in.timesteps"]])
    with cache.during(model):
        last = denoise(predict, tensors["in.img"], solver, NoGuidance(), known, None, watch=cache.watch)
    found, truth = torch.stack([*seen[1:], last]), tensors[f"out.{case['name']}.trajectory"]
    assert relative(found, truth) <= 1e-5
    of_blocks = [decision.computed for decision in log if decision.part == "blocks"]
    of_attention = [decision.computed for decision in log if decision.part == "double_blocks.1.core"]
    always = [True] * 12
    assert (of_blocks or always) == case["computed_tail"]
    assert (of_attention or of_blocks or always) == case["computed_attention"]


def test_golden_decisions_of_teacache(published: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    facts = published[1]["teacache"]
    assert len(facts["cases"]) == 6
    for case in facts["cases"]:
        cfg = TeaCache(threshold=case["threshold"], published=case["coefficients"])
        own = TeaCache(threshold=case["threshold"], coefficients=tuple(facts["coefficients"][case["coefficients"]]))
        for chosen in (cfg, own):
            decisions, steps = TeaDecisions(chosen), len(case["distances"])
            found = [
                not decisions.reuses(distance, Evaluation(0, step, steps, 1 - step / steps))
                for step, distance in enumerate(case["distances"])
            ]
            assert found == case["compute"], case


# --- formulas written out ----------------------------------------------------------------------------------------

STEPS = 14
TIMES = [1 - 0.93 * (step / STEPS) ** 1.3 for step in range(STEPS)] + [0.0]
CACHES: dict[str, CacheConfig] = {
    "first_block": FirstBlockCache(threshold=0.9),
    "never": FirstBlockCache(threshold=0.0),
    "dbcache": DBCache(threshold=0.9, first_blocks=1, last_blocks=1, warmup_steps=2),
    "dbcache into single blocks": DBCache(threshold=0.9, first_blocks=3, last_blocks=0, warmup_steps=0),
    "dbcache with limits": DBCache(
        threshold=5.0, first_blocks=2, last_blocks=1, warmup_steps=1, max_in_a_row=2, max_reuses=6
    ),
    "teacache": TeaCache(threshold=0.7, coefficients=(0.5, 1.1, 0.01)),
    "magcache": MagCache(threshold=0.16, ratios=(1.0, 0.9, 1.04, 1.1, 0.97), max_in_a_row=2),
    "magcache, errors alone": MagCache(threshold=0.3, ratios=(1.0, 1.02, 0.93, 1.05), max_in_a_row=9, retention=0.0),
}


class ByHand:
    """One pass of guidance: the model as one list of blocks on cat(text, image), and what a cache keeps of it."""

    def __init__(self, model: Any, cfg: Any) -> None:
        self.model, self.cfg = model, cfg
        self.kept: Any = None  # what the middle blocks add
        self.last: Any = None  # what a change is measured from
        self.computed: list[bool] = []
        self.sum, self.product, self.error, self.row, self.all = 0.0, 1.0, 0.0, 0, 0

    def velocity(self, img: Tensor, txt: Tensor, y: Tensor, ids: Tensor, cond: Tensor, step: int) -> Tensor:
        model, batch, words = self.model, img.shape[0], txt.shape[1]
        t = torch.full((batch,), TIMES[step], dtype=img.dtype)
        vec = model.time_in(sinusoid(t, 256)) + model.vector_in(y)
        x = torch.cat((model.txt_in(txt), model.img_in(img) + model.cond_in(cond)), dim=1)
        places = torch.cat((torch.zeros(batch, words, 3), ids), dim=1).double()
        rope = rope_table(places, DEBUG.axes_dim, DEBUG.theta, DEBUG.rope_layout)

        def double(block: Any) -> Callable[[Tensor], Tensor]:
            def run(x: Tensor) -> Tensor:
                image, text = block(x[:, words:], x[:, :words], vec, rope)
                return torch.cat((text, image), dim=1)

            return run

        blocks = [double(block) for block in model.double_blocks]
        blocks += [lambda x, block=block: block(x, vec, rope) for block in model.single_blocks]
        first, last = self.always()
        start = x
        for block in blocks[:first]:
            x = block(x)
        signal = (x - start)[:, words:]
        if isinstance(self.cfg, TeaCache):
            block = model.double_blocks[0]
            shift, scale = block.img_mod.lin(F.silu(vec)).unflatten(-1, (6, -1))[:, :2].unbind(1)
            normed = F.layer_norm(x[:, words:], (DEBUG.hidden_size,), eps=1e-6)
            signal = normed * (1 + scale[:, None]) + shift[:, None]
        if self.full(signal, step):
            middle = x
            for block in blocks[first : len(blocks) - last]:
                middle = block(middle)
            self.kept, x = middle - x, middle
            self.computed.append(True)
        else:
            x = x + self.kept
            self.computed.append(False)
        for block in blocks[len(blocks) - last :]:
            x = block(x)
        out: Tensor = model.final_layer(x[:, words:], vec)
        return out

    def always(self) -> tuple[int, int]:
        if isinstance(self.cfg, DBCache):
            return self.cfg.first_blocks, self.cfg.last_blocks
        return (1 if isinstance(self.cfg, FirstBlockCache) else 0), 0

    def full(self, signal: Tensor, step: int) -> bool:
        before = self.last
        change = None if before is None else ((signal - before).abs().mean() / before.abs().mean()).item()
        rule = {FirstBlockCache: self.first_block, DBCache: self.dbcache, TeaCache: self.tea, MagCache: self.mag}
        full = rule[type(self.cfg)](change, step)
        if full or isinstance(self.cfg, TeaCache):
            self.last = signal
        return full

    def first_block(self, change: float | None, step: int) -> bool:
        return change is None or change > self.cfg.threshold

    def dbcache(self, change: float | None, step: int) -> bool:
        cfg = self.cfg
        limits = (cfg.max_in_a_row and self.row == cfg.max_in_a_row) or (cfg.max_reuses and self.all == cfg.max_reuses)
        if change is None or step < cfg.warmup_steps or change >= cfg.threshold or limits:
            self.row = 0
            return True
        self.row, self.all = self.row + 1, self.all + 1
        return False

    def tea(self, change: float | None, step: int) -> bool:
        if step == 0 or step == STEPS - 1 or change is None:
            self.sum = 0.0
            return True
        degree = len(self.cfg.coefficients) - 1
        self.sum += sum(c * change ** (degree - i) for i, c in enumerate(self.cfg.coefficients))
        if self.sum < self.cfg.threshold:
            return False
        self.sum = 0.0
        return True

    def mag(self, change: float | None, step: int) -> bool:
        ratios = self.cfg.ratios
        if step < round(self.cfg.retention * STEPS):
            return True
        at = torch.round(torch.tensor(step * (len(ratios) - 1) / (STEPS - 1), dtype=torch.float64))
        self.product *= ratios[int(at)]
        self.error += abs(1 - self.product)
        self.row += 1
        if self.kept is not None and self.error <= self.cfg.threshold and self.row <= self.cfg.max_in_a_row:
            return False
        self.product, self.error, self.row = 1.0, 0.0, 0
        return True


@torch.no_grad()
@pytest.mark.parametrize("name", CACHES)
def test_blocks_are_reused_as_the_formulas_say(name: str) -> None:
    """Two clips, guided: latents, and the decisions of both passes."""
    model = random_model(DEBUG, torch.float64)
    given, null = inputs(DEBUG, dtype=torch.float64), torch.zeros(2, 5, DEBUG.context_in_dim, dtype=torch.float64)
    texts, vecs = (given["txt"], null), (given["y_vec"], given["y_vec"] * 0)
    x, passes = given["img"], [ByHand(model, CACHES[name]) for _ in texts]
    for step, (now, then) in enumerate(pairwise(TIMES)):
        cond, away = (
            one.velocity(x, txt, y, given["img_ids"], given["cond"], step)
            for one, txt, y in zip(passes, texts, vecs, strict=True)
        )
        x = x + (then - now) * (away + 3.0 * (cond - away))
    found, log = product(model, given, null, CACHES[name])
    assert ((found - x).abs().max() / x.abs().max()).item() <= 1e-12
    for number, one in enumerate(passes):
        assert [d.computed for d in log if d.at.number == number] == one.computed
    if name == "never":
        assert all(d.computed for d in log)
    else:
        assert {d.computed for d in log} == {True, False}


def product(
    model: Any, given: dict[str, Any], null: Tensor, cfg: CacheConfig, guidance: Guidance | None = None
) -> tuple[Tensor, list[Decision]]:
    """The same clips by the product's own loop."""
    log: list[Decision] = []

    def predict(x: Tensor, t: Tensor, known: Conditions) -> Tensor:
        out: Tensor = model(
            x, given["img_ids"], known.text, torch.zeros(*null.shape[:2], 3), t, known.pooled, given["cond"]
        )
        return out

    cache = step_cache(cfg, model, ONE, log.append)
    known = Conditions(text=given["txt"], pooled=given["y_vec"])
    without = Conditions(text=null, pooled=given["y_vec"] * 0)
    guidance = guidance or TextGuidance(SamplingOption(guidance=3.0))
    with torch.no_grad(), cache.during(model):
        found = denoise(predict, given["img"], Euler(TIMES), guidance, known, without, watch=cache.watch)
    return found, log


def test_a_clip_starts_empty_and_leaves_nothing() -> None:
    model = random_model(DEBUG, torch.float64)
    given, null = inputs(DEBUG, dtype=torch.float64), torch.zeros(2, 5, DEBUG.context_in_dim, dtype=torch.float64)
    loop, cores = model.run_stages, [block.core for block in model.double_blocks]
    for cfg in (CACHES["first_block"], PyramidAttentionBroadcast(spatial=3, time_range=(0.0, 1000.0))):
        cache = step_cache(cfg, model, ONE, lambda decision: None)
        first, second = product(model, given, null, cfg), product(model, given, null, cfg)
        assert torch.equal(first[0], second[0]) and first[1] == second[1]
        assert model.run_stages is loop and [block.core for block in model.double_blocks] == cores
        with pytest.raises(ZeroDivisionError), cache.during(model):
            raise ZeroDivisionError
        assert model.run_stages is loop and [block.core for block in model.double_blocks] == cores


def test_one_cache_serves_one_clip_after_another() -> None:
    """What a clip leaves in the same cache is not seen by the next one."""
    model = random_model(DEBUG, torch.float64)
    given = inputs(DEBUG, dtype=torch.float64)
    computed: list[bool] = []
    for cfg in (CACHES["first_block"], PyramidAttentionBroadcast(spatial=3, time_range=(0.0, 1000.0))):
        cache = step_cache(cfg, model, ONE, lambda decision: computed.append(decision.computed))
        for _ in range(2):
            computed.clear()
            with torch.no_grad(), cache.during(model), cache.watch(Evaluation(0, 3, 9, 0.5)):
                model(**given)
            assert computed and all(computed)


def test_outside_an_evaluation_everything_runs() -> None:
    model = random_model(DEBUG, torch.float64)
    given = inputs(DEBUG, dtype=torch.float64)
    log: list[Decision] = []
    with torch.no_grad():
        plain = model(**given)
        for cfg in (*CACHES.values(), PyramidAttentionBroadcast()):
            with step_cache(cfg, model, ONE, log.append).during(model):
                assert torch.equal(model(**given), plain)
    assert log == []


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_bad_numbers_are_never_a_reason_to_reuse(broken: float) -> None:
    model = random_model(DEBUG)
    given = inputs(DEBUG)
    log: list[Decision] = []
    cache = step_cache(FirstBlockCache(threshold=1e6), model, ONE, log.append)
    with torch.no_grad(), cache.during(model):
        for step in range(3):
            with cache.watch(Evaluation(0, step, 3, 0.5)):
                model(**given | {"img": given["img"] + (broken if step == 1 else 0)})
    assert [d.computed for d in log] == [True, True, True]


def test_an_untrained_model_that_adds_nothing_is_reused() -> None:
    """Every block is the identity: 0/0 is no change."""
    model = random_model(DEBUG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] == "lin":
                parameter.zero_()
    found, log = product(model, inputs(DEBUG), torch.zeros(2, 5, DEBUG.context_in_dim), CACHES["first_block"])
    assert [d.computed for d in log if d.at.number == 0] == [True] + [False] * (STEPS - 1)
    assert torch.isfinite(found).all()


def test_pyramid_attention_counts_calls_of_every_pass() -> None:
    """Of any intervals and ranges: call i of a pass computes where i % n == 0, or the time is outside (exclusive)."""
    draw = random.Random(5)
    model = random_model(DEBUG)
    given, null = inputs(DEBUG), torch.zeros(2, 5, DEBUG.context_in_dim)
    for _ in range(6):
        low, every = draw.choice([0.0, 100.0, 1000 * TIMES[9]]), draw.randint(2, 5)
        high = draw.choice([800.0, 950.0, 1000 * TIMES[3]])
        cfg = PyramidAttentionBroadcast(spatial=every, time_range=(low, high))
        _, log = product(model, given, null, cfg)
        for number in (0, 1):
            for part in ("double_blocks.0.core", "single_blocks.1.core"):
                calls = [d.computed for d in log if (d.at.number, d.part) == (number, part)]
                wanted = [i % every == 0 or not low < 1000 * TIMES[i] < high for i in range(STEPS)]
                assert calls == wanted, (cfg, number, part)


@pytest.mark.parametrize("fused", [True, False])
def test_reused_attention_projects_nothing(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No queries, keys and values where what attention gave is given again, but for those that share a product with the
    MLP; the result is that of a model which projects in vain."""
    cfg = replace(DEBUG, fused_qkv=fused)
    model, given, null = random_model(cfg), inputs(cfg), torch.zeros(2, 5, cfg.context_in_dim)
    names = [name for name, _ in model.named_modules() if name.endswith((".qkv", ".q_proj", ".k_proj", ".v_proj"))]
    calls = dict.fromkeys(names, 0)
    for name in names:
        hooked = model.get_submodule(name)
        hooked.register_forward_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    cache = PyramidAttentionBroadcast(spatial=3, time_range=(0.0, 1000.0))
    found, log = product(model, given, null, cache)
    computed = {part: sum(d.computed for d in log if d.part == part) for part in {d.part for d in log}}
    assert names and 0 < sum(computed.values()) < len(log)
    for name in names:
        assert calls[name] == computed[".".join([*name.split(".")[:2], "core"])], name
    monkeypatch.setattr(joint_blocks, "attend", lambda core, project, **more: core(*project(), **more))
    assert torch.equal(product(model, given, null, cache)[0], found) and calls[names[0]] > 2 * STEPS


# --- what is refused ---------------------------------------------------------------------------------------------

BAD = {
    "unknown name": ("{kind: teacahce}", "sampling.cache.kind='teacahce': did you mean teacache?"),
    "a name alone": ("first_block", "sampling.cache='first_block': must be a section with kind, one of none"),
    "a key of another kind": (
        "{kind: first_block, warmup_steps: 3}",
        "sampling.cache.warmup_steps: unknown key; must be one of kind, threshold",
    ),
    "a misspelt key": (
        "{kind: dbcache, treshold: 0.1}",
        "sampling.cache.treshold: unknown key; did you mean threshold",
    ),
    "a threshold below 0": ("{kind: first_block, threshold: -0.1}", "sampling.cache.threshold=-0.1: must be a number"),
    "no first block": ("{kind: dbcache, first_blocks: 0}", "sampling.cache.first_blocks=0: must be an integer >= 1"),
    "an unknown polynomial": (
        "{kind: teacache, published: fluks}",
        "sampling.cache.published='fluks': did you mean flux?",
    ),
    "two polynomials": (
        "{kind: teacache, published: flux, coefficients: [1.0]}",
        "sampling.cache.published=flux: must be null where coefficients are given",
    ),
    "an empty polynomial": ("{kind: teacache, coefficients: []}", "sampling.cache.coefficients: must be numbers"),
    "magcache without ratios": ("{kind: magcache}", "sampling.cache.ratios: missing; must be a list"),
    "magcache with a ratio of 0": (
        "{kind: magcache, ratios: [1.0, 0.0]}",
        "sampling.cache.ratios: must be numbers > 0",
    ),
    "every 0 steps": ("{kind: pyramid_attention, spatial: 0}", "sampling.cache.spatial=0: must be an integer >= 1"),
    "an empty range": (
        "{kind: pyramid_attention, time_range: [800.0, 100.0]}",
        "sampling.cache.time_range=[800.0, 100.0]: must be two rising numbers",
    ),
}


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "sample.yaml"
    path.write_text("weights: outputs/trial\nprompt: a cat\n")
    yield path


@pytest.mark.parametrize("case", BAD)
def test_bad_configurations(case: str, job: Path) -> None:
    given, said = BAD[case]
    with pytest.raises(UserError) as caught:
        load_config(SampleConfig, job, [f"sampling.cache={given}"])
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)


def test_engines_that_gather_by_themselves_take_no_skipped_blocks(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    given = ["parallel.engine=deepspeed", "parallel.zero=3", "parallel.precision.compute=fp32"]
    load_config(RunConfig, path, [*given, "validate.sampling.cache={kind: pyramid_attention}"])
    load_config(RunConfig, path, ["parallel.zero=3", "validate.sampling.cache={kind: first_block}"])
    with pytest.raises(
        UserError, match=r"^validate\.sampling\.cache\.kind=first_block: with parallel\.engine=deepspeed"
    ):
        load_config(RunConfig, path, [*given, "validate.sampling.cache={kind: first_block}"])


def test_good_configurations(job: Path) -> None:
    assert load_config(SampleConfig, job).sampling.cache == NoCache()
    for cfg in (*CACHES.values(), PyramidAttentionBroadcast(temporal=1)):
        text = to_yaml(SampleConfig(weights="x", prompt="y", sampling=SamplingOption(cache=cfg)))
        job.write_text(text)
        assert load_config(SampleConfig, job).sampling.cache == cfg
    found = load_config(SampleConfig, job, ["sampling.cache.kind=teacache", "sampling.cache.threshold=0.4"])
    assert found.sampling.cache == TeaCache(threshold=0.4)


def test_a_model_must_have_what_is_reused() -> None:
    toy, kind = ToyConfig(), "toy_factored"
    check_step_cache("sampling", SamplingOption(cache=FirstBlockCache()), toy)
    check_step_cache("sampling", SamplingOption(cache=PyramidAttentionBroadcast()), toy)
    with pytest.raises(UserError) as caught:
        check_step_cache("sampling", SamplingOption(cache=TeaCache()), toy)
    assert str(caught.value) == (
        "sampling.cache.kind=teacache: model.kind=toy_factored does not state the modulated input of its first block; "
        "use first_block or pyramid_attention"
    )
    bare = describe(toy).__class__(latent_channels=4, patch=(1, 1, 1), width=4, heads=1)
    with pytest.raises(ValueError, match=r"^cache\.kind=dbcache: .* a loop of its own; use pyramid_attention$"):
        check_cache(DBCache(), kind, bare, 40)
    check_cache(PyramidAttentionBroadcast(), kind, bare, 4)
    check_cache(NoCache(), kind, bare, 4)


def test_some_block_must_be_left_to_reuse() -> None:
    blocks = len(block_names(random_model(DEBUG)))
    assert blocks == 4
    for first, last, fits in ((3, 0, True), (4, 0, False), (2, 1, True), (2, 2, False)):
        option = SamplingOption(cache=DBCache(first_blocks=first, last_blocks=last))
        if fits:
            check_step_cache("sampling", option, DEBUG)
        else:
            with pytest.raises(UserError, match=r"^sampling\.cache\.kind=dbcache: runs 4 blocks in every step, and"):
                check_step_cache("sampling", option, DEBUG)
