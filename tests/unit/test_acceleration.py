"""The parts of acceleration that need no second process."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from acceleration import protocol
from acceleration.blocks import activation_checkpoint
from acceleration.config import MeshConfig, OptimConfig, ParallelConfig, RecomputeConfig
from acceleration.distributed.launcher_variables import first_host, ranks_from_environment, rendezvous_from_environment
from acceleration.distributed.mesh import resolve, view
from acceleration.optim.ema import EMA
from acceleration.optim.optimizers import ema_decay_at, lr_at
from acceleration.sequence import SequenceParallel
from opensora.utils.files.safetensors_files import INDEX, write_weights
from tests.dist.toy import Toy


@pytest.mark.parametrize(
    ("mesh", "world", "wanted"),
    [
        ({}, 1, {"shard": 1}),
        ({}, 6, {"shard": 6}),
        ({"ulysses": 2}, 6, {"shard": 3, "ulysses": 2}),
        ({"replicate": 2, "ulysses": 2}, 8, {"replicate": 2, "shard": 2, "ulysses": 2}),
        ({"shard": 1, "ulysses": -1}, 4, {"ulysses": 4}),
        ({"ring": 2, "tensor": 2, "cfg": 2}, 16, {"shard": 2, "cfg": 2, "ring": 2, "tensor": 2}),
    ],
)
def test_degrees_fill_the_world(mesh: dict[str, int], world: int, wanted: dict[str, int]) -> None:
    degrees = resolve(MeshConfig(**mesh), world)
    assert {axis: degree for axis, degree in degrees.items() if degree > 1 or axis in wanted} == wanted


@pytest.mark.parametrize(
    ("mesh", "world", "remedy"),
    [
        ({"ulysses": 2}, 3, "start a multiple of 2"),
        ({"shard": 2, "ulysses": 2}, 8, "start 4, or change the degrees"),
        ({"replicate": 4}, 1, "start a multiple of 4"),
    ],
)
def test_a_layout_that_does_not_fit_says_what_would(mesh: dict[str, int], world: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        resolve(MeshConfig(**mesh), world)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: MeshConfig(replicate=0),
        lambda: MeshConfig(shard=-1, ulysses=-1),
        lambda: MeshConfig(ulysses=0),
        lambda: RecomputeConfig(kind="first"),
        lambda: RecomputeConfig(blocks=-1),
        lambda: ParallelConfig(timeout_s=0),
        lambda: ParallelConfig(prefetch=-1),
        lambda: OptimConfig(lr=-1.0),
        lambda: OptimConfig(ema_decay=1.0),
        lambda: OptimConfig(betas=(0.9, 1.0)),
        lambda: OptimConfig(lr=1e-4, min_lr=1e-3),
    ],
)
def test_configuration_checks_itself(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="="):
        wrong()


def test_ranks_come_from_the_launcher() -> None:
    slurm = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77"}
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    ranks = ranks_from_environment(slurm)
    assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.launcher) == (5, 8, 1, "slurm")
    assert ranks_from_environment({**slurm, **torchrun}).launcher == "torchrun"  # torchrun inside a SLURM job
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}
    assert ranks_from_environment(batch_script).world_size == 1
    assert ranks_from_environment({}).launcher == "none"


def test_slurm_ranks_meet_at_the_first_host_on_a_port_of_the_attempt() -> None:
    env = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "n[2-3]"}
    host, port = rendezvous_from_environment(env)
    assert host == "n2" and 15000 <= port < 30000
    assert rendezvous_from_environment({**env, "SLURM_RESTART_COUNT": "1"})[1] != port
    assert rendezvous_from_environment({**env, "SLURM_JOB_ID": "78"})[1] != port
    assert rendezvous_from_environment({**env, "MASTER_ADDR": "h", "MASTER_PORT": "9"}) == ("h", 9)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[3-5,9],m1", "n3"), ("gpu-[007,009]", "gpu-007"), ("a,b", "a"), ("r[1-2]x", "r1x")],
)
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_learning_rate_is_a_function_of_the_step() -> None:
    cfg = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine", min_lr=0.1)
    assert [lr_at(step, cfg, 14) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_at(4, cfg, 14) == pytest.approx(1.0)
    assert lr_at(9, cfg, 14) == pytest.approx(0.55)
    assert lr_at(14, cfg, 14) == pytest.approx(0.1)
    assert lr_at(100, OptimConfig(lr=0.3), 14) == 0.3


def test_ema_follows_its_decay() -> None:
    assert ema_decay_at(0, OptimConfig(ema_decay=0.99)) == pytest.approx(0.1)
    assert ema_decay_at(10**6, OptimConfig(ema_decay=0.99)) == 0.99
    assert ema_decay_at(0, OptimConfig(ema_decay=0.99, ema_warmup=False)) == 0.99
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        ema = EMA(model.named_parameters())
        model.weight.fill_(3.0)
    ema.update(model.named_parameters(), 0.75)
    assert ema.shadow["weight"].tolist() == [[1.5, 1.5]]


def test_slots_are_found_by_pattern() -> None:
    model = Toy(depth=2)
    found = [(parent, attribute) for parent, attribute, _ in protocol.slots(model, ("blocks.*.core",))]
    assert found == [(block, "core") for block in model.blocks]
    with pytest.raises(ValueError, match=r"'blocks.\*.missing' matches no Module"):
        list(protocol.slots(model, ("blocks.*.missing",)))
    assert list(protocol.slots(Toy(depth=0), ("blocks.*.core",))) == []


RECOMPUTED = [("none", 0, 0), ("full", 0, 3), ("first", 2, 2), ("first", 9, 3)]


@pytest.mark.parametrize(("kind", "blocks", "wanted"), RECOMPUTED)
def test_recomputation_runs_the_chosen_blocks_twice(kind, blocks: int, wanted: int) -> None:  # type: ignore[no-untyped-def]
    model = Toy(depth=3)
    calls: list[int] = []
    for block in model.blocks:
        block.core.register_forward_hook(lambda *args: calls.append(1))
    activation_checkpoint.apply(model, RecomputeConfig(kind=kind, blocks=blocks))
    model(torch.randn(1, 4, 5), torch.randn(1, 3)).sum().backward()
    assert len(calls) == 3 + wanted


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 12])
def test_parts_cover_the_sequence(degree: int, tokens: int) -> None:
    x = torch.arange(tokens)[None]
    for last in (False, True):
        ranks = [SequenceParallel(view({"ulysses": degree}, rank)) for rank in range(degree)]
        parts = [rank.shard(x, extra_to_last=last) for rank in ranks]
        assert torch.equal(torch.cat(parts, dim=1), x)
        assert max(p.shape[1] for p in parts) - min(p.shape[1] for p in parts) <= 1


def test_text_and_image_surplus_go_to_different_processes() -> None:
    context = SequenceParallel(view({"ulysses": 2})).context(txt_tokens=5, img_tokens=9)
    assert context is not None and context.lengths == (7, 7)


def test_weights_are_written_in_one_file_or_in_shards(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.randn(4, 5) for i in range(5)}  # 80 bytes each
    for shard_bytes, count in ((200, 3), (10**9, 1), (10, 5)):  # each time what was there before is replaced
        files = write_weights(tmp_path, weights.items(), {"format": "pt"}, shard_bytes=shard_bytes)
        assert sorted(tmp_path.iterdir()) == sorted(files)
        shards = [load_file(file) for file in files if file.suffix == ".safetensors"]
        assert len(shards) == count and ((tmp_path / INDEX) in files) == (count > 1)
        found = {name: tensor for shard in shards for name, tensor in shard.items()}
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    assert write_weights(tmp_path / "other", weights.items(), {}, write=False) == []
    assert not (tmp_path / "other").exists()


def test_warm_up_from_a_rate() -> None:
    """The published schedule: r + (k + 1) / (W + 1) (lr - r) for k < W, then lr; without r as it always was."""
    cfg = OptimConfig(lr=5e-5, warmup_steps=4, initial_lr=1e-6)
    wanted = [1e-6 + (k + 1) / 5 * (5e-5 - 1e-6) for k in range(4)] + [5e-5, 5e-5]
    assert [lr_at(step, cfg, 100) for step in range(6)] == pytest.approx(wanted, rel=1e-12)
    plain = OptimConfig(lr=5e-5, warmup_steps=4)
    assert [lr_at(step, plain, 100) for step in range(5)] == pytest.approx([1.25e-5, 2.5e-5, 3.75e-5, 5e-5, 5e-5])
    for wrong in (-1e-6, 1e-4):
        with pytest.raises(ValueError, match=r"initial_lr=.*must be a number from 0 to lr"):
            OptimConfig(lr=5e-5, initial_lr=wrong)
