"""What goes wrong between machines: noticed and named within seconds, or borne; and nothing of the run is lost.

Most are slow. The table is printed with -s, and kept up to date in a file:

    OPENSORA_HOST_TABLE=table.md python -m pytest -m "slow or not slow" -s tests/hosts/test_faults.py
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.dist.harness import run_distributed
from tests.faults.runs import digest, run_with
from tests.hosts.conftest import MakeLab
from tests.hosts.heard import Heard
from tests.hosts.lab import ELSEWHERE, NOBODY, Host, Lab, until
from tests.hosts.training import LIMIT_S, OVERRIDES, PORT, STARTS, Processes, all_said, arguments, finish

pytestmark = pytest.mark.timeout(900)
TIMEOUT_S = 12  # parallel.timeout_s where processes do not meet
HEARTBEAT_S = 5  # of launchers
HANG_S = 8  # guard.hang_s where a network fails under way
SILENT_S = (
    20.0  # until the first line of a command that waits: 5 s, after those that it takes to begin on a busy machine
)
STEPS, EVERY, AT = 6, 2, 3  # of a run that something happens to, its checkpoints, and the step at which it happens
TRAIN = (ROOT / "tests/hosts/paused.py", ROOT / "scripts/diffusion/train.py")
LAUNCHERS = ("torchrun.sh", "variables")
Row = tuple[str, str, str, str, str, str]
TABLE: list[Row] = []
# Holds a port, as a program that is no rank of ours.
STRANGER = """
import socket, sys
server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
print("ready", flush=True)
kept = []
while True:
    kept.append(server.accept()[0])
    if sys.argv[2] == "talks":
        kept[-1].sendall(b"220 ready\\r\\n")
"""


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """Printed at the end."""
    yield
    if TABLE:
        print("\n" + rendered())


def rendered() -> str:
    """The table in Markdown."""
    head = ("fault", "started by", "s until named", "s until the end", "exit codes", "said")
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *TABLE)) + "\n"


def note(fault: str, start: str, heard: Heard, named: tuple[float, str] | None, outcome: str = "") -> None:
    """A row of the table."""
    seconds = f"{named[0]:.1f}" if named else "borne"
    said = re.sub(r"^(error|HANG): ", "", (named[1] if named else outcome).strip()).replace("|", "/")
    codes = ", ".join(map(str, heard.codes()))
    TABLE.append((fault, start, seconds, f"{max(heard.ended.values()):.1f}", codes, said))
    if "OPENSORA_HOST_TABLE" in os.environ:
        Path(os.environ["OPENSORA_HOST_TABLE"]).write_text(rendered())


# --- processes that do not meet


@dataclass
class Scene:
    """Hosts, how commands are started on them, and the configuration that they train."""

    lab: Lab
    start: str
    config: Path
    limits: list[str]

    @property
    def hosts(self) -> list[Host]:
        """Of the lab."""
        return self.lab.hosts

    def run(self, *overrides: str, hosts: Sequence[Host] = (), **more: Any) -> Processes:
        """The command on all hosts, with one process each."""
        if self.start == "torchrun.sh":
            more.setdefault("options", ("--timeout", TIMEOUT_S, "--heartbeat-timeout", HEARTBEAT_S))
        return STARTS[self.start](hosts or self.hosts, 1, self.command(*overrides), **more)

    def command(self, *overrides: str) -> list[object]:
        """Of one process."""
        return [*TRAIN, *arguments(self.config, *self.limits, *overrides)]


def filtered(scene: Scene) -> Processes:
    scene.hosts[0].filter(PORT)
    return scene.run()


def refused(scene: Scene) -> Processes:
    scene.hosts[0].refuse(PORT)
    return scene.run()


def closed(scene: Scene) -> Processes:
    for host in scene.hosts:
        host.firewall(PORT)
    return scene.run()


def stranger(kind: str) -> Callable[[Scene], Processes]:
    def taken(scene: Scene) -> Processes:
        scene.hosts[0].popen([sys.executable, "-I", "-S", "-c", STRANGER, PORT, kind]).wait_for("ready", 60)
        return scene.run()

    return taken


def other_code(scene: Scene) -> Processes:
    folder = ROOT / "opensora/train"
    scene.hosts[1].private(folder, copy=True)
    scene.hosts[1].run(["sh", "-c", 'echo "# another" >> "$1"', "sh", folder / "loop.py"])
    return scene.run()


def other_configuration(scene: Scene) -> Processes:
    """In the file, which the second host has a copy of."""
    own = scene.config.parent / "own"
    own.mkdir()
    scene.config = scene.config.rename(own / scene.config.name)
    scene.hosts[1].private(own, copy=True)
    scene.hosts[1].run(["sed", "-i", "s/^seed: 3/seed: 4/", scene.config])
    return scene.run()


def mixed(*overrides: str) -> Callable[[Scene], Processes]:
    """More overrides on the second host."""

    def differ(scene: Scene) -> Processes:
        return scene.run(only=0) + scene.run(*overrides, only=1)

    return differ


def other_number(scene: Scene) -> Processes:
    """The second host was told of three."""
    if scene.start == "torchrun.sh":
        three = [*scene.hosts, scene.hosts[0]]
        return scene.run(only=0) + scene.run(only=1, hosts=three)
    return scene.run(only=0) + scene.run(only=1, env={"WORLD_SIZE": "3"})


def both_first(scene: Scene) -> Processes:
    """Both are told that they are rank 0."""
    return scene.run(only=0) + scene.run(only=1, env={"RANK": "0"})


def not_shared(scene: Scene) -> Processes:
    scene.hosts[1].private(scene.config.parent / "run")
    return scene.run()


@dataclass(frozen=True)
class Fault:
    """What is done, what one of them says then, and the exit codes that are right."""

    do: Callable[[Scene], Processes]
    says: str
    codes: tuple[int, ...]
    starts: tuple[str, ...] = LAUNCHERS
    shaped: bool = False


WHERE = rf"10\.77\.0\.1:{PORT}"
NOT_MET: dict[str, Fault] = {
    "port filtered": Fault(filtered, rf"{WHERE}.*(filter|firewall)", (1,), shaped=True),
    "port refused": Fault(refused, rf"{WHERE}.*refused", (1,), shaped=True),
    "all other ports filtered": Fault(closed, r"(filter|firewall)", (1,), shaped=True),
    "port taken, silent": Fault(stranger("silent"), rf"{WHERE}.*another program|port {PORT} in use", (1,)),
    "port taken, talks": Fault(stranger("talks"), rf"{WHERE}.*another program|port {PORT} in use", (1,)),
    "address of nobody": Fault(lambda s: s.run(where=NOBODY), re.escape(NOBODY), (1, 2)),
    "address beyond the router": Fault(lambda s: s.run(where=ELSEWHERE), re.escape(ELSEWHERE), (1, 2)),
    "name of nobody": Fault(lambda s: s.run(where="nowhere"), "nowhere.*no machine of this name", (2,)),
    "address of the other host": Fault(
        lambda s: s.run(where=s.hosts[1].address), r"10\.77\.0\.2", (1, 2), starts=("variables",)
    ),
    "second host missing": Fault(lambda s: s.run(only=0), r"missing: (rank 1|1 of 2)|1 of 2", (1,)),
    "first host missing": Fault(lambda s: s.run(only=1), rf"{WHERE}.*refused", (1,)),
    "other code": Fault(other_code, "code.*h1", (2,)),
    "other configuration": Fault(other_configuration, "configuration is not the same.*rank 1 on h1", (2,)),
    "other command": Fault(mixed("seed=4"), "(configuration|command|run).*h1", (1, 2)),
    "other number of hosts": Fault(
        other_number, r"not the same.*(3 on h1, 2 on h0|rank 0 on h0: 2; rank 1 on h1: 3)", (2,)
    ),
    "both rank 0": Fault(both_first, "two.*rank 0|rank 0.*twice|both.*rank 0", (2,), starts=("variables",)),
    "folder not shared": Fault(not_shared, "h1.*(share|see)", (2,)),
}
CASES = [(fault, start) for fault, about in NOT_MET.items() for start in about.starts]


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "start"), CASES)
def test_who_does_not_meet_is_told_why(fault: str, start: str, make_lab: MakeLab, config: Path) -> None:
    """One line that names it, on time, without a traceback; and somebody says before that for whom they wait."""
    about = NOT_MET[fault]
    limits = [f"parallel.timeout_s={TIMEOUT_S}", f"train.steps={EVERY}"]
    processes = about.do(Scene(make_lab(shaped=about.shaped, names="loopback"), start, config, limits))
    heard = Heard(processes)
    heard.listen(LIMIT_S)
    named = heard.first(rf"error.*({about.says})")
    note(fault, start, heard, named)
    assert {*heard.codes()} <= {*about.codes}, heard
    assert "Traceback" not in str(heard) and sum("error" in line for *_, line in heard.lines) <= len(processes), heard
    assert heard.lines[0][0] < SILENT_S, heard
    assert max(heard.ended.values()) < 3 * TIMEOUT_S + SILENT_S, heard
    written = [path.name for path in (config.parent / "run").glob("[!.]*")]
    assert not written, f"something was written: {written}"


# --- a network that fails under way


@pytest.fixture(scope="module")
def whole(stills: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the run of two processes that nothing happens to."""
    from tests.faults.conftest import CONFIG

    folder = tmp_path_factory.mktemp("whole")
    path = folder / "train.yaml"
    path.write_text(CONFIG.format(output=folder, table=stills))
    overrides = [*OVERRIDES, f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}"]
    assert {one.end for one in run_distributed(run_with, 2, path, overrides, init=False)} == {"finished"}
    return digest(folder / "run")


def limits() -> list[str]:
    """Of a run that a network fails."""
    steps = [f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}"]
    return [*steps, f"guard.hang_s={HANG_S}", f"guard.save_s={2 * HANG_S}", "guard.start_s=100"]


def unplug(host: Host) -> None:
    host.pull_cable()


def cut_power(host: Host) -> None:
    host.kill()


def kill_all(host: Host) -> None:
    host.kill(power_cut=False)


UNDER_WAY: dict[str, tuple[str, Callable[[Host], None]]] = {
    "cable pulled in data": ("data", unplug),
    "cable pulled in forward": ("forward", unplug),
    "cable pulled in reduce": ("update", unplug),
    "cable pulled in save": ("save", unplug),
    "host loses power": ("forward", cut_power),
    "host loses power in save": ("save", cut_power),
    "all processes of a host killed": ("forward", kill_all),
}


def paused(processes: Processes, folder: Path, world_size: int = 2) -> None:
    """Waits until all ranks are where they stop."""

    def there() -> bool:
        assert all(process.poll() is None for process in processes), all_said(processes)
        return len(list(folder.glob("rank-*"))) == world_size

    until(there, LIMIT_S, "ranks that are where they stop")


def pausing(folder: Path, phase: str) -> dict[str, str]:
    """The environment of ranks that stop there."""
    folder.mkdir()
    return {"PAUSE_IN": phase, "PAUSE_AT": str(AT), "PAUSE_FOLDER": str(folder)}


@pytest.mark.parametrize("start", LAUNCHERS)
@pytest.mark.parametrize("fault", UNDER_WAY)
@pytest.mark.slow
def test_a_network_that_fails_is_named_and_nothing_is_lost(
    fault: str, start: str, make_lab: MakeLab, config: Path, tmp_path: Path, whole: str
) -> None:
    """On the first host by one line; the same command then goes on to the same state."""
    phase, do = UNDER_WAY[fault]
    scene = Scene(make_lab(names="loopback"), start, config, limits())
    processes = scene.run(env=pausing(tmp_path / "pause", phase))
    paused(processes, tmp_path / "pause")
    second = scene.hosts[1]
    heard = Heard(processes)
    do(second)
    (tmp_path / "pause/go").touch()
    heard.listen(LIMIT_S)
    named = heard.first(r"h1 is gone|(error|suspect|rank 1).*h1")
    note(fault, start, heard, named)
    assert heard.processes[0].returncode in (1, 70) and "Traceback" not in str(heard), heard
    assert max(heard.ended.values()) < 6 * HANG_S, heard
    second.plug_in() if second.up else second.boot()
    again = scene.run()
    assert finish(again) == [0, 0], all_said(again)
    assert digest(tmp_path / "run") == whole


# A process that waits in an exchange for ever, and its watchdog; without the time that torch takes.
WAITING = """
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("watchdog", sys.argv[1])
watchdog = sys.modules["watchdog"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watchdog)
rank = int(sys.argv[3])
one = watchdog.Watchdog(watchdog.Path(sys.argv[2]), rank, 3, 2.0, ["h0", "h1", "h2"])
one.phase("forward", 3, 100.0)
print("ready", flush=True)
time.sleep(1)
one.exchange("all_reduce")
time.sleep(100)
"""


def test_a_cable_and_a_host_are_named(make_lab: MakeLab, tmp_path: Path) -> None:
    """Of three hosts one has lost its cable and one its power."""
    lab = make_lab(hosts=3)
    script = [sys.executable, "-c", WAITING, ROOT / "acceleration/diagnostics/watchdog.py", tmp_path / "hang"]
    processes = [host.popen([*script, rank]) for rank, host in enumerate(lab.hosts)]
    for process in processes:
        process.wait_for("ready", 60)
    lab.hosts[1].pull_cable()
    lab.hosts[2].kill()
    assert finish(processes[:2]) == [70, 70], all_said(processes)
    report = (tmp_path / "hang/report.txt").read_text()
    assert "suspect: rank 1 (h1, pid " in report and "its host: eth0 has no carrier" in report, report
    assert "rank 2 (h2): no word" in report and report.count("suspect") == 1, report


# --- what is borne

BORNE: dict[str, dict[str, float]] = {
    "5 % of packets lost": {"loss": 0.05},
    "200 ms delay each way": {"delay_ms": 200},
    "10 Mbit/s": {"rate_mbit": 10},
}


@pytest.mark.slow
@pytest.mark.parametrize("start", LAUNCHERS)
@pytest.mark.parametrize("fault", BORNE)
def test_a_bad_network_is_borne(
    fault: str, start: str, make_lab: MakeLab, config: Path, tmp_path: Path, whole: str
) -> None:
    lab = make_lab(shaped=True, names="loopback")
    lab.shape(**BORNE[fault])
    processes = Scene(lab, start, config, [f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}"]).run()
    heard = Heard(processes)
    heard.listen(2 * LIMIT_S)
    assert heard.codes() == [0, 0], heard
    assert digest(tmp_path / "run") == whole
    note(fault, start, heard, None, "the same state")
