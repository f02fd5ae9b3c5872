"""Bytes that leave a host, by formula; rates of links, and what the planner makes of them."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from acceleration.accounting.comm_volume import step_bytes
from acceleration.accounting.host_traffic import OtherHosts, leaving_host, shares_leaving, summary
from acceleration.accounting.rank_layout import MicroBatch, RankLayout
from acceleration.config import MeshConfig, ParallelConfig, RecomputeConfig
from acceleration.diagnostics import interface_bytes
from acceleration.diagnostics.links import Links
from acceleration.distributed import mesh as meshes
from acceleration.distributed.mesh import AXES, Axis
from opensora.cli.forecast import main
from opensora.planner.devices import DEVICES
from opensora.planner.meta_model import structure
from opensora.planner.network import Network
from opensora.utils.errors import UserError
from tests import factored_family
from tests.dist.problem import MODEL
from tests.unit.test_placement import degrees_of

ROOT = Path(__file__).resolve().parents[2]


class SameHost(OtherHosts):
    """Of a process's peers those of its own host."""

    def follows(self, axis: str, degree: int | None = None) -> bool:
        return not super().follows(axis, degree)

    def counted(self, axis: Axis) -> tuple[bool, ...]:
        return tuple(not far and rank != axis.rank for rank, far in enumerate(super().counted(axis)))


def everywhere(*batches: MicroBatch) -> dict[int, Sequence[MicroBatch]]:
    """The same micro-batches on every rank."""
    return {rank: batches for rank in range(32)}


def layouts(count: int) -> list[tuple[dict[str, int], ParallelConfig, list[MicroBatch], str]]:
    """(degrees, configuration, micro-batches, host of every rank) of layouts drawn at random."""
    draw, found = random.Random(5), []
    while len(found) < count:
        degrees = degrees_of(**{axis: draw.choice((1, 1, 2, 3, 4)) for axis in draw.sample(AXES, 3) if axis != "cfg"})
        world = prod(degrees.values())
        if degrees["tensor"] == 3 or world > 24 or (degrees["tensor"] * degrees["ulysses"] > 4):
            continue
        recompute = RecomputeConfig(kind=draw.choice(("none", "full", "selective")))  # type: ignore[arg-type]
        cfg = ParallelConfig(zero=draw.randrange(4), mesh=MeshConfig(**degrees), recompute=recompute)  # type: ignore[arg-type]
        parts = [d for d in meshes.divisors(degrees["ulysses"])] if degrees["ring"] == 1 else [None]
        batches = [
            MicroBatch(
                samples=draw.randint(1, 3), txt=5, img=15 * draw.randint(1, 9), frames=draw.choice((1, 3, 5)),
                has_mask=draw.random() < 0.5, degree=draw.choice(parts),
            )
            for _ in range(draw.randint(1, 3))
        ]  # fmt: skip
        found.append((degrees, cfg, batches, "".join(draw.choices("abc", k=world))))
    return found


@pytest.mark.parametrize("kind", ["joint", "factored"])
def test_within_hosts_and_between_them_is_all(kind: str) -> None:
    """By the same formulas: what every process sends is what stays on its host and what leaves it."""
    model: Any = MODEL if kind == "joint" else factored_family.ToyConfig()
    profile, seen = structure(model), Counter[str]()
    for degrees, cfg, batches, hosts in layouts(150):
        for rank in range(len(hosts)):
            place = RankLayout(meshes.view(degrees, rank), cfg)
            every = step_bytes(profile, place, batches)
            far = step_bytes(profile, replace(place, peers=OtherHosts(place, hosts, "nccl")), batches)
            near = step_bytes(profile, replace(place, peers=SameHost(place, hosts, "nccl")), batches)
            assert +(Counter(far) + Counter(near)) == +Counter(every), (degrees, hosts, rank)
            seen.update(axis for axis in far if far[axis] and near.get(axis))
    assert seen["ulysses"] > 20  # some were on the host, and some were not
    assert all(sent >= 0 for sent in every.values())


def test_one_host_sends_nothing_and_alone_on_a_host_all() -> None:
    profile = structure(MODEL)
    for degrees, cfg, batches, hosts in layouts(40):
        alone = [str(rank) for rank in range(len(hosts))]
        assert leaving_host(profile, cfg, degrees, "a" * len(hosts), everywhere(*batches), "a") == {}
        for rank in range(len(hosts)):
            found = leaving_host(profile, cfg, degrees, alone, everywhere(*batches), str(rank), "nccl")
            sent = step_bytes(profile, RankLayout(meshes.view(degrees, rank), cfg), batches)
            assert found == {axis: count for axis, count in sent.items() if count}


def test_by_hand() -> None:
    """Two hosts of two, one sample whose heads and tokens are cut evenly, weights in rows that four divide."""
    profile, batch = structure(MODEL), MicroBatch(samples=1, txt=8, img=8)
    values = sum(prod(parameter.shape) for unit in profile.units for parameter in unit.parameters)

    def leaving(mesh: dict[str, int], zero: Any, backend: str, hosts: str = "aabb") -> dict[str, int]:
        cfg = ParallelConfig(zero=zero, mesh=MeshConfig(**{"shard": 1} | mesh))
        return leaving_host(profile, cfg, degrees_of(**mesh), hosts, everywhere(batch), "a", backend)

    # One process of a host has its next one on the other: an all-reduce of fp32 sends 2 * 3/4 of all.
    assert leaving({"replicate": 4}, 0, "gloo") == {"replicas": pytest.approx(values * 4 * 1.5, rel=0.01)}
    # bf16 weights twice, fp32 gradients once, three quarters of each; gloo sends the gradients twice.
    by_nccl, by_gloo = (leaving({"shard": 4}, 3, backend)["fsdp"] for backend in ("nccl", "gloo"))
    assert by_nccl == pytest.approx(values * 0.75 * (2 + 2 + 4), rel=0.15)  # padding of tiny weights
    assert by_gloo / by_nccl == pytest.approx(1.5, rel=0.01)
    # In turns every process sends to another host.
    assert leaving({"shard": 4}, 3, "nccl", "abab")["fsdp"] == 2 * by_nccl
    # Copies within hosts: the gradients' pieces go to the other copy, from both processes.
    hybrid = leaving({"replicate": 2, "shard": 2}, 3, "nccl")
    assert hybrid == {"replicas": pytest.approx(values * 4, rel=0.1)}
    # Each process sends to three, two of which are on the other host.
    place = RankLayout(meshes.view({"ulysses": 4}), ParallelConfig(mesh=MeshConfig(ulysses=4)))
    one = step_bytes(profile, place, [batch])
    assert leaving({"ulysses": 4}, 2, "nccl")["ulysses"] == 2 * one["ulysses"] * 2 // 3
    assert "ulysses" not in leaving({"shard": 2, "ulysses": 2}, 2, "nccl")


def test_shares_are_those_of_the_formulas_where_all_send_the_same() -> None:
    profile, batch = structure(MODEL), MicroBatch(samples=2, txt=24, img=48)
    for degrees, cfg, _, hosts in layouts(60):
        if any(24 % (degrees["ring"] * degrees["ulysses"]) or 4 % degrees[axis] for axis in ("ulysses", "tensor")):
            continue
        numbers = [sorted(set(hosts)).index(host) for host in hosts]
        sent = step_bytes(profile, RankLayout(meshes.view(degrees), cfg), [batch])
        shares = shares_leaving(degrees, cfg.zero, numbers)
        by_host = [leaving_host(profile, cfg, degrees, hosts, everywhere(batch), host, "nccl") for host in set(hosts)]
        for axis, count in sent.items():
            most = max(found.get(axis, 0) for found in by_host)
            assert most == pytest.approx(count * shares[axis], rel=0.01), (axis, degrees, hosts)


def test_the_line_about_hosts() -> None:
    mesh = degrees_of(shard=2, ulysses=2)
    assert summary(mesh, ["n1", "n1", "n2", "n2"], [0, 2, 1, 3], {"fsdp": 3 * 2**29}) == (
        "2 hosts: n1 has rank 0-1 (the launcher's 0, 2), n2 has rank 2-3 (the launcher's 1, 3); ulysses stays within a "
        "host, shard crosses hosts; n1 sends the others 1.5 GiB per step (fsdp 1.5 GiB; predicted)"
    )
    uneven = summary(degrees_of(shard=4, ulysses=2), ["a"] * 3 + ["b"] * 5, range(8), {})
    assert uneven == ("2 hosts: a has rank 0-2, b has rank 3-7; shard and ulysses (1 of 4 groups) cross hosts")
    many = summary(degrees_of(shard=40), [f"n{i}" for i in range(40)], range(40), {})
    assert many.startswith("40 hosts: n0 has rank 0, ") and ", 32 more; shard crosses hosts" in many


DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:  100       1    0    0    0     0          0         0      200       1    0    0    0     0       0          0
eth0.5:{0}       1    0    0    0     0          0         0 {1}       1    0    0    0     0       0          0
"""


def test_what_an_interface_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "dev"
    monkeypatch.setattr(interface_bytes, "COUNTERS", table)
    assert interface_bytes.bytes_sent("lo") is None  # no such system
    table.write_text(DEV.format(123456789012, 987654321098))
    assert interface_bytes.bytes_sent("eth0.5") == 987654321098 and interface_bytes.bytes_sent("lo") == 200
    assert interface_bytes.bytes_sent("eth0") is None and interface_bytes.bytes_sent("") is None
    table.write_text("eth0: 1 2 3\n")
    assert interface_bytes.bytes_sent("eth0") is None


RATES = Links(processes=(2, 2), within=2e9, between=1e8, device="cpu")


def test_links_are_what_was_written(tmp_path: Path) -> None:
    RATES.write(tmp_path / "links.json")
    assert Links.read(tmp_path / "links.json") == Links.read(tmp_path) == RATES


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-9],
        lambda text: "[]",
        lambda text: text.replace("1e8", "-1").replace("100000000.0", "-1"),
        lambda text: text.replace("100000000.0", "NaN"),
        lambda text: text.replace("100000000.0", "true"),
        lambda text: text.replace("2,", '"2",'),
        lambda text: json.dumps({**json.loads(text), "processes": []}),
        lambda text: json.dumps({**json.loads(text), "processes": [0]}),
        lambda text: json.dumps({**json.loads(text), "other": 1}),
        lambda text: json.dumps({"within": 1.0}),
    ],
)
def test_damaged_links_are_refused_in_one_line(damage: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    RATES.write(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=r"--links=.*links\.json: [^\n]+$"):
        main([str(ROOT / "configs/train/demo.yaml"), "--world", "4", "--links", str(path)])


def test_links_of_other_hosts_are_refused() -> None:
    h100 = DEVICES["h100"]
    assert Network.of_links(RATES, h100, 16).processes == (2,) * 8
    uneven = replace(RATES, processes=(3, 5))
    assert Network.of_links(uneven, h100, 8).processes == (3, 5)
    with pytest.raises(ValueError, match=r"measured on hosts of 3 \+ 5 processes, which 16 are not"):
        Network.of_links(uneven, h100, 16)
    with pytest.raises(ValueError, match="which 5 are not"):
        Network.of_links(RATES, h100, 5)
    one_host = Network.of_links(replace(RATES, processes=(8,), between=None), h100, 64)
    assert one_host.processes == (8,) * 8 and one_host.between == 8 * h100.net_bandwidth and one_host.within == 2e9


def test_time_is_of_the_slower_link() -> None:
    network = Network((2, 2), within=100.0, between=10.0)
    assert network.seconds(degrees_of(shard=4), 3, {"fsdp": 200}, {}) == {"fsdp": 20.0}
    assert network.seconds(degrees_of(shard=2, ulysses=2), 3, {"ulysses": 200}, {}) == {"ulysses": 2.0}
    slow = replace(network, latency_within=0.5, latency_between=7.0)
    found = slow.seconds(degrees_of(shard=2, ulysses=2), 3, {"ulysses": 200, "fsdp": 200}, {"ulysses": 4, "fsdp": 2})
    assert found == {"ulysses": 2.0 + 4 * 0.5, "fsdp": 20.0 + 2 * 7.0}
    # Both processes send to the other copy by the one link.
    assert network.seconds(degrees_of(replicate=2, shard=2), 3, {"replicas": 200}, {}) == {"replicas": 40.0}


def forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str], rates: Links, *more: str) -> dict[str, Any]:
    rates.write(tmp_path / "links.json")
    command = ["--world", str(sum(rates.processes)), "--links", str(tmp_path), "--top", "1", "--json", *more]
    assert main([str(ROOT / "configs/train/stage1.yaml"), *command]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_hybrid_sharding_where_hosts_are_slow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With links of one speed there is nothing to gain; with slow ones between hosts a copy on every host pays."""
    settings = ("model.size=debug", "model.in_channels=64", "data.micro_batches=16", "parallel.zero=3")
    slow = forecast(tmp_path, capsys, Links(processes=(8, 8), within=4e11, between=1e9), *settings)
    assert "replicate=2 across hosts x shard=" in slow["hybrid"] and slow["hybrid"].endswith("faster, and it fits")
    assert slow["best"][0]["zero"] == 0 or slow["best"][0]["mesh"]["replicate"] >= 2
    equal = forecast(tmp_path, capsys, Links(processes=(8, 8), within=1e9, between=1e13), *settings)
    assert equal["hybrid"] is None or equal["hybrid"].endswith("not faster")


@pytest.mark.slow
def test_hybrid_sharding_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = Links(processes=(2,) * 8, within=4e11, between=1e9)
    found = forecast(tmp_path, capsys, rates, "data.micro_batches=16", "--memory-gib", "60")
    assert "faster, but it needs" in found["hybrid"], found["hybrid"]
    assert all(best["mesh"].get("replicate", 1) < 8 for best in found["best"])
