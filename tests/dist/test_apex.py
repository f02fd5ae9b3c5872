"""Norms and AdamW of NVIDIA apex, by a stand-in with its signatures: what is trained with them is what is trained with
torch's, on every layout, and a checkpoint of one goes on with the other."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acceleration import nvidia_apex
from acceleration.blocks import fused_norms
from acceleration.config import CompileConfig, OptimConfig, ParallelConfig
from acceleration.optim.fused_adamw import FusedAdamW
from opensora.assembly.layout import check_kernels
from opensora.models.families import build_model
from opensora.models.mmdit.config import MMDiTConfig
from opensora.utils.errors import UserError
from tests import fake_apex
from tests.dist import chapters, stdit
from tests.dist.harness import run_distributed
from tests.dist.parity import TOLERANCE, Outcome, fill, relative, worst_error

BY_APEX = ParallelConfig(norm_kernel="apex")
MODELS: dict[str, Any] = {
    **{name: chapters.MODELS[name] for name in ("dit", "latte", "pixart", "pixart_kv")},
    **{name: stdit.MODELS[name] for name in ("stdit", "stdit2", "stdit3", "windows")},
}


def trained(run: stdit.Run) -> tuple[Outcome, dict[str, int]]:
    with fake_apex.installed() as calls:
        return stdit.on_this_layout(run), calls.of


def runs(kind: str = "apex") -> dict[str, Any]:
    optim = replace(stdit.ADAMW, kernel=kind)  # type: ignore[arg-type]
    return {"options": {"norm_kernel": kind}, "optim": optim}


@pytest.mark.parametrize(
    ("world", "mesh", "zero"),
    [
        (1, {}, 0),
        pytest.param(2, {"ulysses": 2}, 3),
        pytest.param(2, {"replicate": 2}, 1, marks=pytest.mark.slow),
        pytest.param(2, {"tensor": 2}, 2, marks=pytest.mark.slow),
    ],
)
def test_training_steps_equal_those_of_torch(world: int, mesh: dict[str, int], zero: int) -> None:
    """Loss, gradients, clipping norm and weights after steps with AdamW, in fp64."""
    truth = stdit.on_one_process(stdit.MODELS["stdit2"], stdit.ADAMW)
    for found, calls in run_distributed(trained, world, stdit.Run("stdit2", world, mesh, zero, **runs())):
        assert worst_error(found, truth) <= TOLERANCE
        assert {"fused_layer_norm", "fused_rms_norm_affine", "FusedAdam"} <= calls.keys()
        assert calls["FusedAdam"] == 1 and calls["step"] == stdit.STEPS  # it is made once


def with_gradient(model: nn.Module, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    module: Any = stdit if name in stdit.MODELS else chapters
    cfg = module.MODELS[name]
    if module is chapters:
        layout = chapters.token_layout(cfg, chapters.SequenceParallel(chapters.meshes.view({})))
        loss = chapters.squares(model, cfg, layout, chapters.batches(cfg, 0)[0])
    else:
        batch: Any = stdit.batches(cfg, 0)[0]
        loss = stdit.loss_share(model, stdit.preparation(cfg, stdit.meshes.view({}))(batch, 0), 100)
    loss.backward()
    return loss.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_of_every_model_is_replaced(name: str) -> None:
    module: Any = stdit if name in stdit.MODELS else chapters
    plain, fused = (module.plain_model(MODELS[name]) for _ in range(2))
    fused_norms.apply(fused, BY_APEX, "cpu")
    loss, gradients = with_gradient(plain, name)
    with fake_apex.installed() as calls, pytest.MonkeyPatch.context() as patch:

        def never(*given: Any, **named: Any) -> Tensor:
            raise AssertionError("a norm of torch's ran")

        for place in ("layer_norm", "rms_norm"):
            patch.setattr(torch.nn.functional, place, never)
            patch.setattr("opensora.models.layers.norm.rms_norm", never)
        found, of_found = with_gradient(fused, name)
    assert calls.of["fused_layer_norm"] >= 4
    assert ("fused_rms_norm_affine" in calls.of) == any("_norm.weight" in key for key in gradients)
    assert ("fused_layer_norm_affine" in calls.of) == (name == "pixart_kv")
    assert relative(found, loss) <= TOLERANCE and of_found.keys() == gradients.keys()
    assert max(relative(of_found[key], gradients[key]) for key in gradients) <= TOLERANCE
    assert fused.state_dict().keys() == plain.state_dict().keys()


def test_the_norms_of_the_mmdit() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_heads": 2, "axes_dim": (4, 6, 6), "depth": 1}
    cfg = MMDiTConfig(
        in_channels=8, context_in_dim=6, vec_in_dim=5, mlp_ratio=2.0, depth_single_blocks=1, **sizes, cond_embed=False
    )
    models = [build_model(cfg).double() for _ in range(2)]
    for model in models:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                fill(name, parameter)
    fused_norms.apply(models[1], BY_APEX, "cpu")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    given = {
        "img": draw(2, 6, 8),
        "img_ids": torch.zeros(2, 6, 3),
        "txt": draw(2, 3, 6),
        "txt_ids": torch.zeros(2, 3, 3),
    }
    given |= {"timesteps": torch.rand(2, generator=generator, dtype=torch.float64), "y_vec": draw(2, 5)}
    truth = models[0](**given)
    with fake_apex.installed() as calls:
        assert relative(models[1](**given), truth) <= TOLERANCE
    assert calls.of.keys() == {"fused_layer_norm", "fused_rms_norm_affine"}


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_what_the_kernels_cannot_do_is_torchs() -> None:
    """Tokens of nobody, and weights of another type than the input."""
    with fake_apex.installed() as calls:
        weight = torch.ones(8)
        assert nvidia_apex.layer_norm(torch.zeros(2, 0, 8), (8,), None, None, 1e-6).shape == (2, 0, 8)
        assert nvidia_apex.rms_norm(torch.zeros(0, 8), (8,), weight, 1e-6).shape == (0, 8)
        assert nvidia_apex.rms_norm(torch.ones(2, 8).double(), (8,), weight, 1e-6).shape == (2, 8)
    assert not calls.of


def saved(folder: Path, kinds: list[str], cfg: Any, runs: list[chapters.Run]) -> dict[str, Tensor]:
    with fake_apex.installed(), pytest.MonkeyPatch.context() as patch:
        for step, (kind, run) in enumerate(zip(kinds, runs, strict=True)):
            patch.setattr(chapters, "ADAMW", replace(chapters.ADAMW, kernel=kind))  # type: ignore[arg-type]
            found = chapters.train_and_save(run, cfg, folder, step, step + 1)
    return found


@pytest.mark.parametrize("first", ["torch", pytest.param("apex", marks=pytest.mark.slow)])
def test_a_checkpoint_of_one_goes_on_with_the_other(first: str, tmp_path: Path) -> None:
    """Three updates by turns, each by a process that reads what the one before has saved, on ZeRO 0, 3 and 1."""
    cfg, then = chapters.MODELS["latte"], {"torch": "apex", "apex": "torch"}[first]
    stages = [chapters.Run("latte", 1, (), zero, kind="adamw") for zero in (0, 3, 1)]
    (whole,) = run_distributed(saved, 1, tmp_path / "torch", ["torch"] * 3, cfg, stages)
    (found,) = run_distributed(saved, 1, tmp_path / "turns", [first, then, first], cfg, stages)
    assert found.keys() == whole.keys()
    assert max(relative(found[name], whole[name]) for name in whole) <= TOLERANCE


# Against torch's AdamW in fp64
SETTINGS: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2}


def pair() -> tuple[list[nn.Parameter], list[nn.Parameter], torch.optim.AdamW, FusedAdamW]:
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in ((3, 4), (5,), (0,))]
    ours, theirs = ([nn.Parameter(x.clone()) for x in drawn] for _ in range(2))
    return (
        ours,
        theirs,
        torch.optim.AdamW(theirs, fused=True, **SETTINGS),
        FusedAdamW(ours, fused=True, **SETTINGS),
    )


def step_both(ours: Any, theirs: Any, optimizers: Any, absent: tuple[int, ...] = ()) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a.grad = None if index in absent else torch.randn(b.shape, dtype=torch.float64)
        b.grad = None if a.grad is None else a.grad.clone()
    for optimizer in optimizers:
        optimizer.step()


def alike(a: FusedAdamW, b: torch.optim.AdamW) -> None:
    for p, q in zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12)
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            assert value.dtype == b.state[q][key].dtype and torch.allclose(value, b.state[q][key], rtol=1e-12)
    names = a.param_groups[0].keys() - {"params"}
    assert {n: a.param_groups[0][n] for n in names} == {n: b.param_groups[0][n] for n in names}


def test_parameters_without_a_gradient_count_for_themselves() -> None:
    with fake_apex.installed():
        ours, theirs, b, a = pair()
        for absent in ((), (1,), (0, 2), ()):
            step_both(ours, theirs, (a, b), absent)
        alike(a, b)


def test_state_that_somebody_wrote_is_read() -> None:
    """By load_state_dict, and into the tensors themselves."""
    with fake_apex.installed():
        ours, theirs, b, a = pair()
        step_both(ours, theirs, (a, b))
        step_both(ours, theirs, (a, b))
        for p, q in zip(ours, theirs, strict=True):
            for tensor in (a.state[p]["step"], b.state[q]["step"]):
                tensor.fill_(11.0)
        step_both(ours, theirs, (a, b))
        alike(a, b)
        a.load_state_dict(deepcopy(b.state_dict()))
        step_both(ours, theirs, (a, b))
        alike(a, b)


def test_settings_of_a_step_are_those_of_the_group() -> None:
    with fake_apex.installed():
        ours, theirs, b, a = pair()
        for lr in (0.1, 0.01, 0.5):
            for optimizer in (a, b):
                optimizer.param_groups[0]["lr"] = lr
            step_both(ours, theirs, (a, b))
        alike(a, b)


def test_auto_takes_apex_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not nvidia_apex.chosen("auto", "norms", "cpu") and not nvidia_apex.chosen("torch", "adam", "cuda")
    assert "not installed with its CUDA extensions" in str(nvidia_apex.missing("adam", "cuda"))
    with fake_apex.installed():
        assert nvidia_apex.chosen("auto", "norms", "cuda") and nvidia_apex.chosen("auto", "adam", "cuda")
        assert not nvidia_apex.chosen("auto", "adam", "cpu")
        # The package of this name on PyPI, or a build without extensions.
        monkeypatch.setattr(nvidia_apex, "find_spec", lambda name: name if name == "apex" else None)
        assert not nvidia_apex.chosen("auto", "norms", "cuda")


def test_what_is_missing_is_said() -> None:
    asked = [nvidia_apex.Asked(f"{part}.key", "auto", part, "cuda") for part in ("norms", "adam")]  # type: ignore
    line = nvidia_apex.check(asked)
    assert (
        line is not None and line.startswith("norms.key=auto, adam.key=auto: apex is not installed") and "pip" in line
    )
    assert nvidia_apex.check([a._replace(choice="torch") for a in asked]) is None
    with pytest.raises(
        ValueError, match=r"^adam\.key=apex: apex runs on cuda, .* on cpu; use adam\.key=torch, or auto$"
    ):
        nvidia_apex.check([asked[1]._replace(choice="apex", device_type="cpu")])


def test_compiled_blocks_keep_torchs_norms() -> None:
    """Which a compiler fuses with what is around them."""
    with pytest.raises(ValueError, match=r"^norm_kernel=apex: must be torch or auto with compile\.enabled=true"):
        ParallelConfig(norm_kernel="apex", compile=CompileConfig(enabled=True))
    with pytest.raises(ValueError, match=r"^kernel=apex: allowed with kind=adamw only"):
        OptimConfig(kind="sgd", kernel="apex")
    model = build_model(chapters.MODELS["dit"])
    cfg = ParallelConfig(norm_kernel="auto", compile=CompileConfig(enabled=True))
    with fake_apex.installed():
        fused_norms.apply(model, cfg, "cuda")
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_says_once_what_stands_in(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both keys on one line; apex by name is refused."""
    both = ParallelConfig(norm_kernel="auto"), OptimConfig(kernel="auto")
    check_kernels(*both)
    (line,) = capsys.readouterr().err.splitlines()
    assert "parallel.norm_kernel=auto, optim.kernel=auto: apex" in line and line.endswith("torch's kernels are used")
    for given in ((BY_APEX,), (ParallelConfig(), OptimConfig(kernel="apex"))):
        with pytest.raises(UserError, match=r"^(parallel\.norm_kernel|optim\.kernel)=apex: apex .*=torch, or auto$"):
            check_kernels(*given)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with fake_apex.installed():
        check_kernels(*both)
        assert capsys.readouterr().err == ""
        check_kernels(both[0], replace(both[1], kind="sgd"))
        check_kernels(replace(both[0], offload="optimizer"), both[1])
        assert "optim.kernel=auto: apex runs on cuda, and this is computed on cpu" in capsys.readouterr().err
