"""Notices a process that stands still, and ends the run with a report of where every process is.

Every process has a small one beside it that reads its heartbeat (phase, step, time allowed, current exchange) from
shared memory. It needs neither the interpreter lock nor the process group of what it watches: stacks are written by
``faulthandler`` from a C signal handler. The first to find its process too long in a phase makes a folder, which the
others look for; all write there where their process is, and then end it with exit code 70. Standard library only: as
a program this file is the process beside.
"""

import contextlib
import ctypes
import faulthandler
import itertools
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HUNG = 70  # exit code of every process of a run that hung
LOOK_S = 1.0  # between two looks at the heartbeat and for the folder
PEERS_S = 6.0  # how long to wait for the reports of others
STACKS_S = 2.0  # how long to wait for a process to write its stacks
LAST_S = 9.5  # beyond what is allowed: then all that is above is over, and a process that is still there ends itself
ENDING_S = 10.5  # for a process to end itself; longer than that, so that it can
STACKS = signal.SIGURG  # makes a process write its stacks, and harms nothing: one that has no handler ignores it
# What is sent to a group of processes to stop a run, and must not end those beside the one that trains.
UNTOUCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
CLOSE_S = 10.0  # for a process beside to end by itself when it is not needed any more
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_SIGEV_THREAD = 2  # bits/sigevent-consts.h
_BEAT = struct.Struct("=dqd32sd96s")  # since (monotonic), step, seconds allowed, phase, since, exchange
_EXCHANGE = struct.Struct("=d96s")
_EXCHANGE_AT = _BEAT.size - _EXCHANGE.size
# Where Python meets the process group; what is called there is what the process waits in.
_IN_EXCHANGE = re.compile(
    r'File ".*torch/distributed/(?:distributed_c10d|_functional_collectives)\.py", line \d+ in (\w+)'
)
_NOT_WELL = ("T", "t", "D", "Z")  # states of /proc/PID/status
_NOT_EXCHANGES = ("wrapper", "_new_group_with_tag", "__torch_dispatch__", "<lambda>", "unwrap", "trigger_wait")


class Watchdog:
    """The heartbeat of this process, and the process beside it. One at a time."""

    def __init__(self, folder: Path, rank: int, world_size: int, exchange_s: float, hosts: Sequence[str] = ()) -> None:
        """
        Args:
            folder: made when the run hangs; the same, and a new one for every start, on all processes.
            exchange_s: longest that an exchange may take in any phase.
            hosts: names of the hosts of all ranks, so that the host of one that says nothing is known too.
        """
        self._beat = _scratch()
        self._beat.truncate(mmap.PAGESIZE)
        self._memory = mmap.mmap(self._beat.fileno(), mmap.PAGESIZE)
        self._last = _LastResort()
        self.phase("start", 0, 0.0)
        self._stacks = _scratch()
        faulthandler.register(STACKS, file=self._stacks, all_threads=True, chain=False)
        handles = (self._beat.fileno(), self._stacks.fileno())
        arguments = [*handles, os.getpid(), threading.main_thread().ident, rank, world_size, exchange_s, folder]
        arguments.append(" ".join(f"{name}*{len(list(same))}" for name, same in itertools.groupby(hosts)))
        arguments.append(" ".join(_interfaces("1")))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, UNTOUCHED)  # the mask is inherited
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", __file__, *map(str, arguments)],
                stdin=subprocess.PIPE,  # its end is the end of this process
                stdout=subprocess.PIPE,
                pass_fds=handles,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        threading.Thread(target=self._obey, name="watchdog", daemon=True).start()

    def phase(self, name: str, step: int, allowed_s: float) -> None:
        """A heartbeat: ``name`` begins now and may take ``allowed_s`` seconds; 0: as long as it likes."""
        now = time.monotonic()  # both times come before what they are times of, so that a half-read beat is a young one
        _BEAT.pack_into(self._memory, 0, now, step, allowed_s, name.encode()[:32], now, b"")
        self._last.exit_in(allowed_s + LAST_S if allowed_s else 0.0)

    def exchange(self, name: str) -> None:
        """What the process waits in from now on; "" for nothing."""
        _EXCHANGE.pack_into(self._memory, _EXCHANGE_AT, time.monotonic(), name.encode()[:96])

    def close(self) -> None:
        """End the process beside."""
        self._last.exit_in(0.0)
        faulthandler.unregister(STACKS)
        assert self._process.stdin is not None
        self._process.stdin.close()
        end(self._process, CLOSE_S)

    def _obey(self) -> None:
        assert self._process.stdout is not None
        if self._process.stdout.read(1):
            os._exit(HUNG)


def end(process: "subprocess.Popen[Any]", within_s: float) -> int:
    """Exit code of a process that is about to end; one that does not, being stopped for example, is killed."""
    try:
        return process.wait(within_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


class _SigEvent(ctypes.Structure):
    """``struct sigevent`` of Linux."""

    _fields_ = (
        ("value", ctypes.c_ssize_t),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("rest", ctypes.c_char * 40),
    )


class _LastResort:
    """A timer of the system that ends this process with the right exit code also while Python cannot run.

    Whoever holds the interpreter's lock for ever keeps every thread of Python from ending the process, and to be killed
    gives another exit code. At its time the C library calls ``_exit(HUNG)`` in a thread of its own.
    """

    def __init__(self) -> None:
        self._timer: ctypes.c_void_p | None = None
        if sys.platform != "linux":
            return
        libc = ctypes.CDLL(None)
        self._library = libc if hasattr(libc, "timer_create") else ctypes.CDLL("librt.so.1")  # glibc before 2.34
        leave = ctypes.cast(libc._exit, ctypes.c_void_p)
        event = _SigEvent(value=HUNG, notify=_SIGEV_THREAD, function=leave.value)
        timer = ctypes.c_void_p()
        if self._library.timer_create(time.CLOCK_MONOTONIC, ctypes.byref(event), ctypes.byref(timer)) == 0:
            self._timer = timer

    def exit_in(self, seconds: float) -> None:
        """In place of the time set before; 0: never."""
        if self._timer is not None:
            whole = int(seconds)
            times = (ctypes.c_long * 4)(0, 0, whole, int((seconds - whole) * 1e9))  # once
            self._library.timer_settime(self._timer, 0, times, None)


def _scratch() -> Any:
    """A file without a name."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("watchdog"), "r+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


@dataclass(frozen=True, kw_only=True)
class RankState:
    """Where a process is."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since_s: float  # in this phase, or exchange
    late: bool  # longer than allowed
    exchange: str  # that it waits in; "" if it does not wait for others
    line: str  # of the main thread, the innermost
    state: str  # as the system sees the process
    network: str = ""  # what its host has lost of the network since the start

    @property
    def suspect(self) -> bool:
        """It does not wait for others, is stopped, stuck in the kernel or dead, or its host is cut off."""
        return not self.exchange or self.state[:1] in _NOT_WELL or bool(self.network)

    def __str__(self) -> str:
        doing = f"is in {self.exchange}" if self.exchange else f"does not wait for others: {self.line}"
        doing += f", {self.state}{'; its host: ' if self.network else ''}{self.network}"
        return f"rank {self.rank} ({self.host}, pid {self.pid}), step {self.step}, {self.phase}: {doing}"


def verdict(places: Iterable[RankState], world_size: int, hosts: Sequence[str] = ()) -> str:
    """What to look at first: who is silent, who does not wait while others do, or who waits in what.

    Args:
        hosts: of all ranks, where they are known.
    """
    found = {place.rank: place for place in places}
    by_exchange: dict[tuple[str, str, int], list[RankState]] = defaultdict(list)
    for place in found.values():
        if not place.suspect:
            by_exchange[(place.exchange, place.phase, place.step)].append(place)
    lines = _silent([rank for rank in range(world_size) if rank not in found], hosts)
    missing = bool(lines)
    suspects = sorted((place for place in found.values() if place.suspect), key=lambda place: place.rank)
    lines += [f"suspect: {place}" for place in suspects]
    if not suspects and len(by_exchange) > 1:
        lines.append("suspect: processes wait in different exchanges")
    if not suspects and not missing and len(by_exchange) == 1:
        names = list(dict.fromkeys(place.host for place in found.values()))
        network = f"the network between {', '.join(names[:8])}" if len(names) > 1 else "the network"
        lines.append(f"suspect: all wait in the same exchange: {network}, or a process that left it too early")
    for (exchange, phase, step), group in sorted(by_exchange.items(), key=lambda item: len(item[1])):  # few before many
        ranks = ", ".join(str(rank) for rank in sorted(place.rank for place in group))
        lines.append(f"rank {ranks}: step {step}, {phase}: waits in {exchange}")
    return "\n".join(lines)


def _silent(ranks: Sequence[int], hosts: Sequence[str]) -> list[str]:
    """A line for every host of which all are silent, else for every rank."""
    if not hosts:
        return [f"rank {rank}: no word, its process or its machine is gone" for rank in ranks]
    lines = []
    for host, group in itertools.groupby(ranks, key=lambda rank: hosts[rank]):
        them = list(group)
        whole = len(them) == hosts.count(host)
        cause = "their host is gone or cut off" if whole and len(them) > 1 else "its process or its host is gone"
        lines.append(f"rank {', '.join(map(str, them))} ({host}): no word, {cause}")
    return lines


def where(stacks: str, main_thread: int) -> tuple[str, str]:
    """(exchange, innermost line) of the main thread in what ``faulthandler`` wrote; the last if it wrote often."""
    found = "", "stack unknown"
    for block in re.split(r"\n(?=(?:Current thread|Thread) 0x)", stacks):
        head, _, body = block.partition("\n")
        if f"0x{main_thread:016x}" in head:
            calls = [name for name in _IN_EXCHANGE.findall(body) if name not in _NOT_EXCHANGES]
            found = (calls[-1] if calls else ""), body.split("\n")[0].strip()
    return found


class _Monitor:
    """The process beside the one that trains."""

    def __init__(self, argv: list[str]) -> None:
        beat, stacks, self.pid, self.thread, self.rank, self.world_size = map(int, argv[:6])
        self.exchange_s, self.folder = float(argv[6]), Path(argv[7])
        counted = [pair.rpartition("*") for pair in argv[8].split()]
        self.hosts = [name for name, _, count in counted for _ in range(int(count))]
        self.connected = set(argv[9].split())
        self.memory = mmap.mmap(beat, mmap.PAGESIZE, prot=mmap.PROT_READ)
        self.stacks = stacks
        if sys.platform == "linux":  # were this process stopped, it would not see that the other has ended
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT, 0, 0, 0)

    def watch(self) -> None:
        """Until the process ends, or is ended."""
        while not select.select([0], [], [], LOOK_S)[0]:  # its end of the pipe closes when it ends
            if self._place("", "").late or self.folder.exists():
                self._end()
                return

    def _place(self, called: str, line: str) -> RankState:
        """Where the process is, by its heartbeat, what it ``called`` and the ``line`` it is in."""
        since, step, allowed, phase, exchange_since, exchange = _BEAT.unpack_from(self.memory)
        in_phase, in_exchange = time.monotonic() - since, time.monotonic() - exchange_since
        exchange = _text(exchange)
        return RankState(
            rank=self.rank,
            host=socket.gethostname(),
            pid=self.pid,
            step=step,
            phase=_text(phase),
            since_s=round(in_exchange if exchange else in_phase, 1),
            late=0 < allowed < in_phase or (bool(exchange) and in_exchange > self.exchange_s),
            exchange=exchange or called,
            line=line,
            state=_state(self.pid),
            network=", ".join(f"{name} has no carrier" for name in sorted(self.connected & _interfaces("0"))),
        )

    def _end(self) -> None:
        try:
            self._report()
        except OSError as error:  # a full disk must not keep the run alive
            os.write(2, f"HANG: {self._place('', '')}; no report: {error}\n".encode())
        os.write(1, b"x")
        if not _ended(self.pid, ENDING_S):  # it is stopped
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def _report(self) -> None:
        """Say where this process is; the first rank that is heard of says what that means."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stacks = self._take_stacks()
        place = self._place(*where(stacks, self.thread))
        _write(self.folder / f"rank-{self.rank:05d}.txt", f"{json.dumps(asdict(place))}\n\n{stacks}")
        report, deadline = self.folder / "report.txt", time.monotonic() + PEERS_S
        while not report.exists() and time.monotonic() < deadline:
            if self.rank == 0 and len(self._heard()) == self.world_size:
                break
            time.sleep(0.2)
        heard = self._heard()
        if report.exists() or heard[0].name != f"rank-{self.rank:05d}.txt":
            return
        places = [found for file in heard if (found := _read(file)) is not None] or [place]
        late = max((place for place in places if place.late), key=lambda place: place.since_s, default=place)
        text = f"no progress for {late.since_s:.0f} s in step {late.step}, {late.phase}; stacks: {self.folder}"
        text = f"HANG: {text}\n{verdict(places, self.world_size, self.hosts)}\n"
        os.write(2, text.encode())  # before the file, at whose sight the others end, and a launcher this process
        _write(report, text)

    def _heard(self) -> list[Path]:
        return sorted(self.folder.glob("rank-*.txt"))

    def _take_stacks(self) -> str:
        """What ``faulthandler`` writes on the signal; a process that is stopped or stuck in the kernel does not."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACKS)
        size, deadline = -1, time.monotonic() + STACKS_S
        while (now := os.fstat(self.stacks).st_size) != size or not size:
            if time.monotonic() > deadline:
                break
            size = now
            time.sleep(0.1)
        return os.pread(self.stacks, 1 << 20, 0).decode(errors="replace")


def _write(path: Path, text: str) -> None:
    """All at once."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text)
    aside.rename(path)


def _read(path: Path) -> RankState | None:
    """What another process said of itself; None if that cannot be read."""
    try:
        place = RankState(**json.loads(path.read_text().partition("\n")[0]))
        return place if place.late in (True, False) and place.since_s >= 0 else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


def _state(pid: int) -> str:
    """As ``S (sleeping)``."""
    try:
        return re.search(r"^State:\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]  # type: ignore[index]
    except (OSError, TypeError):
        return "state unknown"


def _interfaces(carrier: str) -> set[str]:
    """Network interfaces of this host that are up and have a carrier ("1") or none ("0"): cable and switch are there.

    Bridges are left out, as they lose it when nobody is connected.
    """
    found = set()
    for folder in Path("/sys/class/net").glob("*"):
        with contextlib.suppress(OSError):  # that of one that is down cannot be read
            if (folder / "carrier").read_text().strip() == carrier and not (folder / "bridge").exists():
                found.add(folder.name)
    return found


def _ended(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if os.getppid() != pid:
            return True
        time.sleep(0.05)
    return False


if __name__ == "__main__":
    _Monitor(sys.argv[1:]).watch()
