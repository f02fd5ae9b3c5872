"""Processes that look for each other among strangers, and at each other before they begin."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from acceleration.diagnostics import preflight
from acceleration.diagnostics.preflight import Facts, assess, differences
from acceleration.distributed import rendezvous as servers
from acceleration.distributed import runtime as runtimes
from acceleration.distributed import search
from acceleration.distributed.addresses import interface_of
from acceleration.distributed.meeting import rendezvous
from acceleration.distributed.peers import Peer, ranges
from acceleration.distributed.rendezvous import RendezvousServer
from acceleration.distributed.runtime import Runtime
from acceleration.distributed.search import Place, StartError, Waiting
from opensora.cli.main import run_cli
from opensora.cli.train import main as train_main
from opensora.config.load import load_config
from opensora.config.run import RunConfig
from opensora.train.setup import Interrupted, start_run
from opensora.train.state import run_lock
from opensora.utils.errors import UserError
from tests.conftest import ROOT
from tests.dist.harness import DistributedFailure, run_distributed
from tests.integration import conftest as integration
from tests.patience import patience

shapes, config = integration.shapes, integration.config  # fixtures


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """Results, or what was raised."""
    results: list[Any] = [None] * len(calls)

    def keep(i: int) -> None:
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=keep, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("0.0.0.0", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def peer(rank: int, world_size: int, **more: Any) -> Peer:
    """A process of this machine, but for what ``more`` says."""
    return replace(Peer.here(rank, world_size), **more)


def meet(me: Peer, ports: list[int], token: str = "job", timeout_s: float = 20, host: str = "127.0.0.1") -> Any:
    """What ``rendezvous`` returns, in silence."""
    return rendezvous(me, [Place(host, "MASTER_ADDR")], ports, token, timeout_s, Waiting(None))


def test_ranks_meet_past_strangers() -> None:
    """A silent one, one that talks, and the server of another job."""
    ports = free_ports(4)
    silent = socket.create_server(("0.0.0.0", ports[0]))
    talker = socket.create_server(("0.0.0.0", ports[1]))
    threading.Thread(target=lambda: talker.accept()[0].sendall(b"220 ready\r\n"), daemon=True).start()
    other = RendezvousServer(peer(0, 2), ports[2:3], "another-job")
    found = in_threads(*(lambda rank=rank: meet(peer(rank, 3), ports, "this-job") for rank in range(3)))
    stores = [store for store, _ in found]
    stores[1].set("a", "b")
    assert stores[0].get("a") == stores[2].get("a") == b"b"
    assert all([one.rank for one in peers] == [0, 1, 2] for _, peers in found)
    assert {peers[1].address for _, peers in found} == {"127.0.0.1"}
    silent.close(), talker.close(), other.close()


def test_copies_of_a_running_machine_are_hosts_of_their_own() -> None:
    """They say that they are one host, but come from an address that is not here."""
    with closing(RendezvousServer(peer(0, 3), free_ports(1), "job")) as server:
        assert server._placed(peer(1, 3), "127.0.0.1") == peer(1, 3)
        one, other = (server._placed(peer(1, 3), f"192.0.2.{number}") for number in (77, 78))
        assert len({peer(0, 3).host_id, one.host_id, other.host_id}) == 3
        elsewhere = peer(1, 3, host_id="another")
        assert server._placed(elsewhere, "192.0.2.77") == elsewhere


def test_who_does_not_come_is_named() -> None:
    ports = free_ports(1)
    said = in_threads(*(lambda rank=rank: meet(peer(rank, 5), ports, timeout_s=1) for rank in (0, 2)))
    assert str(said[0]).startswith(
        "2 of 5 processes came within 1 s; missing: rank 1, 3-4; see their logs; rank 0 listens"
    )
    assert str(said[1]) == str(said[0]) and [one.exit_code for one in said] == [1, 1]


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("0.0.0.0", 0)) as stranger:
        port = stranger.getsockname()[1]
        said = in_threads(
            lambda: meet(peer(0, 2), [port], timeout_s=2),
            lambda: meet(peer(1, 2), [port], timeout_s=3),
        )
    assert str(said[0]).startswith(f"127.0.0.1: port {port} in use by another program")
    assert str(said[1]).startswith("rank 0 did not answer at 127.0.0.1 within")
    assert f"127.0.0.1:{port} (this machine itself, takes connections and says nothing" in str(said[1])


def test_who_shares_a_device_is_named() -> None:
    """On every rank, before a library that cannot say it so well tries to connect them."""
    ports = free_ports(1)
    said = in_threads(*(lambda r=r: meet(peer(r, 3, device=f"gpu-{r % 2}"), ports) for r in range(3)))
    assert {str(one) for one in said} == {"rank 0, 2 share one device (gpu-0): start one process per device"}
    assert {one.exit_code for one in said} == {2}


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


# --- preflight


def facts(rank: int, **more: Any) -> Facts:
    return Facts(
        **{"rank": rank, "host": f"n{rank // 2}", "device": "cpu", "visible": 0, "same": {"code": "a"}, **more}
    )


def test_who_differs_is_named() -> None:
    everyone = [facts(rank) for rank in range(6)]
    assert differences(everyone) == []
    everyone[3] = facts(3, same={"code": "b"})
    assert differences(everyone) == ["code is not the same on all processes: rank 3 on n1 has b, the others a"]


def test_slow_links_and_mixed_devices_are_named() -> None:
    everyone = [facts(rank, link_s=1e-3 if rank % 2 else 1e-4, reduce_s=2e-3) for rank in range(8)]
    report = assess(everyone, 1 << 20)
    assert report.warnings == [] and report.summary.startswith(
        "preflight: 8 processes on 4 hosts, 8 x cpu; all-reduce "
    )
    everyone[3] = facts(3, link_s=1e-2)
    everyone[0] = facts(0, link_s=1e-4, device="other")
    everyone[7] = facts(7, visible=4, link_s=1e-3)
    warnings = assess(everyone, 1 << 20).warnings
    assert warnings.pop(1) == "n3 has 4 GPUs and 2 processes (rank 6-7): some are idle"
    assert len(warnings) == 2 and "rank 0" in warnings[0]
    assert warnings[1].startswith("rank 3 (n1) to rank 4 (n2): 0.1 GB/s, where links between nodes have 1 GB/s")


def look_at_all(differing: int | None) -> str:
    rank = int(os.environ["RANK"])
    runtime = Runtime(rank, int(os.environ["WORLD_SIZE"]), rank, torch.device("cpu"))
    return preflight.preflight(runtime, {"code": "b" if rank == differing else "a"}).summary


def test_preflight_on_processes() -> None:
    said = run_distributed(look_at_all, 2, None, timeout=60)
    assert said[0] == said[1] and re.match(r"preflight: 2 processes on 1 hosts, 2 x cpu; all-reduce \S+ GB/s", said[0])
    with pytest.raises(DistributedFailure, match="code is not the same on all processes: rank 1 has b, the others a"):
        run_distributed(look_at_all, 2, 1, timeout=60)


def look_with_other_settings(config: Path) -> str:
    """Rank 1 reads another seed."""
    cfg = load_config(RunConfig, config, [f"seed={os.environ['RANK']}"])
    with pytest.raises(UserError) as caught:
        start_run(cfg)
    runtimes.stop()
    return str(caught.value)


def test_a_rank_with_other_settings_is_refused(config: Path) -> None:
    """Before anything is written but the lock, which is given back."""
    said = run_distributed(look_with_other_settings, 2, config, timeout=100, init=False)
    assert said[0] == said[1]
    assert re.fullmatch(r"configuration is not the same on all processes: rank 1 has \w+, the others \w+", said[0])
    folder = load_config(RunConfig, config).folder
    assert os.listdir(folder) == [run_lock.LOCK]


def test_a_command_whose_peers_do_not_come(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "9"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", str(config), "parallel.timeout_s=1"])
    with pytest.raises(SystemExit) as caught:
        run_cli(train_main)
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "error: 1 of 2 processes came within 1 s; missing: rank 1; see their logs; rank 0 listens on "
    )
    assert err.count("\n") == 1


def alone(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """The environment of the first of two processes, whose launcher is a person."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": str(free_ports(1)[0]), **variables}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["no-such-machine.invalid", "a..b", "x" * 300])
def test_an_address_that_is_none(
    name: str, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone(monkeypatch, MASTER_ADDR=name)
    monkeypatch.setattr(servers, "RESOLVE_S", 0.5)
    monkeypatch.setattr(sys, "argv", ["train.py", str(config), "parallel.timeout_s=600"])
    with pytest.raises(SystemExit) as caught:
        run_cli(train_main)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1
    assert err.startswith(f"error: MASTER_ADDR={name[:40]}") and "no machine of this name" in err


def test_a_name_that_is_known_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of a cluster that is starting may come after its processes."""
    asked: list[str] = []

    def look_up(host: str, *more: Any, **options: Any) -> list[Any]:
        if host != "node1":
            return known(host, *more, **options)
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known("127.0.0.1", *more, **options)

    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(search, "RESOLVE_PAUSE_S", 0.01)
    ports = free_ports(1)
    found = in_threads(*(lambda rank=rank: meet(peer(rank, 2), ports, host="node1") for rank in range(2)))
    assert len(found[1][1]) == 2 and len(asked) >= 3


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGUSR2")]  # by the same handler


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["SIGTERM", *OTHERS])
def test_the_first_signal_ends_the_wait(name: str, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(monkeypatch, MASTER_ADDR="127.0.0.1")
    command = [sys.executable, str(ROOT / "scripts/diffusion/train.py"), str(config), "parallel.timeout_s=600"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        port, limit = int(os.environ["MASTER_PORT"]), time.monotonic() + patience(100)
        while not listens(port):  # then it waits for the other
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert err.count("\n") == 1 and "stopped before the first step: nothing was trained" in err, err


def listens(port: int) -> bool:
    with socket.socket() as visitor:
        return visitor.connect_ex(("127.0.0.1", port)) == 0


def test_others_that_come_within_the_grace_learn_of_the_signal() -> None:
    """A process that was asked to stop does not leave those alone that are on their way; they stop together."""
    assert runtimes.unless_asked(lambda: True, lambda: time.sleep(0.5) or "all are here") == "all are here"


def test_nobody_comes_and_the_signal_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "GRACE_S", 0.3)
    with pytest.raises(Interrupted):
        runtimes.unless_asked(lambda: True, threading.Event().wait)


# --- after all have come


def start_beside_one_that_does_not(limit_s: int, said: Path) -> str:
    """What rank 0 says when rank 1 has come, and then does nothing more; the file ``said`` is there then."""

    def idle(*_: Any) -> None:
        while not said.exists():
            time.sleep(0.05)
        raise StartError("idle")

    if os.environ["RANK"] == "1":
        runtimes.Connecting = idle  # type: ignore[assignment,misc]
    with pytest.raises(StartError) as caught:
        runtimes.start(limit_s)
    said.touch()
    return str(caught.value)


def test_who_is_not_there_when_a_backend_connects_is_named(tmp_path: Path) -> None:
    (said, _) = run_distributed(start_beside_one_that_does_not, 2, 4, tmp_path / "said", timeout=60, init=False)
    assert said.startswith("gloo cannot connect the processes, says rank 0 on ") and "\n" not in said
    assert "; not there: rank 1 on " in said and said.endswith("; GLOO_SOCKET_IFNAME chooses the interface")


def start_all() -> Any:
    """What a process knows after a start in which the launcher hosts the store, as torchrun does."""
    os.environ.pop("GLOO_SOCKET_IFNAME")
    runtime = runtimes.start(60)
    peers = [(one.rank, one.host, one.address, one.interface) for one in runtime.peers]
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    runtimes.stop()
    return peers, chosen


def test_processes_of_one_host_talk_over_loopback() -> None:
    found = run_distributed(start_all, 2, timeout=60, init=False)
    loopback = interface_of("127.0.0.1")
    peers = [(rank, socket.gethostname(), "127.0.0.1", loopback) for rank in range(2)]
    assert found == [(peers, loopback)] * 2


def start_as_differing(field: str, value: Any) -> tuple[str, int]:
    """Rank 1 is not like rank 0."""
    interface = ""
    if os.environ["RANK"] == "1" and field == "interface":
        interface = value
        os.environ.pop("GLOO_SOCKET_IFNAME")
    elif os.environ["RANK"] == "1":
        real = Peer.here.__func__  # type: ignore[attr-defined]
        Peer.here = classmethod(lambda cls, *args: replace(real(cls, *args), **{field: value}))  # type: ignore[method-assign]
    with pytest.raises(StartError) as caught:
        runtimes.start(30, interface=interface)
    return str(caught.value), caught.value.exit_code


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("torch", "2.0", "the version of torch is not the same on all processes (rank 0 on "),
        ("world_size", 5, "the number of processes (WORLD_SIZE) is not the same on all processes (rank 0 on "),
        ("interface", "nothere0", "parallel.interface=nothere0: no such network interface on "),
    ],
)
def test_who_differs_is_named_by_all_where_the_launcher_hosts_the_store(field: str, value: Any, said: str) -> None:
    found = run_distributed(start_as_differing, 2, field, value, timeout=60, init=False)
    assert found[0] == found[1] and found[0][0].startswith(said) and found[0][1] == 2
