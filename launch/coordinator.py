"""Decides for the launchers of several machines who runs when: the coordinator, without sockets and without a clock.

A run is a row of rounds. In a round every machine of it runs its processes; it ends when all have finished, when a
process fails, when a machine is gone, or to take in a machine that has come. Then the processes are stopped everywhere,
and the next round begins when enough machines wait for it. Failures are counted here, for all machines alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from launch.rendezvous import FINAL, SAVED, About, Order, State, differences

RETURN_S = 3.0  # for a connection that has ended to be made again, before its machine is gone
COLLECT_S = 0.5  # between the first sign of a failure and the decision which of them was the cause
KNOWN = 64  # hosts that are gone and remembered
EXCESS_S = 5.0  # more than silence may last: then who is here is alive, and one more is too many


@dataclass(frozen=True)
class Limits:
    """Of waiting, in seconds."""

    timeout_s: float = 600.0  # until all must have come
    last_call_s: float = 30.0  # without a newcomer, before fewer than the most begin
    heartbeat_s: float = 15.0  # of silence, until a machine is gone


@dataclass
class Machine:
    """A launcher that has come."""

    about: About
    address: str  # from which it came
    reached: str  # our address that it reached
    came: float
    heard: float
    state: State
    order: Order
    lost: float | None = None  # since when it has no connection


@dataclass(frozen=True)
class Failure:
    """A sign that the round cannot go on. Of several the one of the least weight is the cause.

    Attributes:
        weight: 0 of a process whose exit code is final, 1 of a machine that is gone, 2 of a process that was killed.
    """

    weight: int
    line: str
    code: int
    final: bool = False


class Coordinator:
    """What is known of the machines, and the order of each. All times are of one monotonic clock, in seconds."""

    def __init__(
        self, own: About, limits: Limits, endpoint: str, new_port: Callable[[], int], epoch: str, now: float
    ) -> None:
        """
        Args:
            own: the launcher of this machine, which has rank 0.
            endpoint: where the machines meet, for people.
            new_port: a port that is free on this machine.
            epoch: what no other coordinator has.
        """
        self._own, self._limits, self._endpoint, self._new_port = own, limits, endpoint, new_port
        self._blank = Order("wait", epoch=epoch, heartbeat_s=int(limits.heartbeat_s))
        self.machines: dict[str, Machine] = {}  # in the order in which they came
        self.round, self.failures = own.round, _failures(own, epoch)
        self.ended: Order | None = None
        self.advice = ""  # what is likely if nobody comes, in place of the usual
        self.advice_code = 1
        self.notices: list[str] = []  # for people at this machine; whoever prints them takes them out
        self._roster: list[str] = []  # who is in the round, in the order of their ranks; empty between rounds
        self._finished: set[str] = set()
        self._told: set[str] = set()  # who said what went wrong
        self._failed: list[Failure] = []
        self._decide_at = 0.0
        self._deadline = now + limits.timeout_s
        self._last_came = now
        self._missing: dict[str, str] = {}  # host -> why it is not here

    # --- what happens

    def hello(self, about: About, address: str, reached: str, now: float) -> Order:
        """A launcher has come, or has come back; what it is to do. ``later`` and ``end``: it is not taken in."""
        known = self.machines.get(about.member)
        if known is not None:
            known.lost, known.heard, known.address, known.reached = None, now, address, reached
            return known.order
        if self.ended is not None:
            return replace(self._blank, is_="later", text="a run is just ending there")
        refused = self._refusal(about, address)
        if refused is not None:
            return self.ended or refused
        self._missing.pop(about.host, None)
        self.failures = max(self.failures, _failures(about, self._blank.epoch))
        if not self._roster:
            self.round = max(self.round, about.round)
        self._last_came = now
        state = State("runs", about.round)  # until it says that it does not
        self.machines[about.member] = Machine(about, address, reached, now, now, state, self._blank)
        self.tick(now)
        return self.machines[about.member].order

    def _refusal(self, about: About, address: str) -> Order | None:
        """None for a launcher of this run; one that differs ends the run for all if it has not begun."""
        own = self._own
        if (about.run, about.run or about.command) != (own.run, own.run or own.command):
            ours, theirs = (one.run or one.command for one in (own, about))
            self._refused_one(about, address, f"it starts another run: {theirs}")
            advice = "give the same command on every machine, or another port (--id NAME names runs)"
            return self._refused(f"another run meets at {self._endpoint}: {ours}; this one is {theirs}: {advice}")
        found = "; ".join(differences(about, own))
        if not found:
            return None
        line = f"error: {about.host} ({address}) cannot join {own.host}: {found}"
        if self.round or self._roster:
            self._refused_one(about, address, found)
        else:
            self._end(line, 2)
        return self._refused(line.removeprefix("error: "))

    def _refused_one(self, about: About, address: str, why: str) -> None:
        self.notices.append(f"refused {about.host} ({address}): {why}")
        self._remember(about.host, f"refused, as {why}")
        self.advice, self.advice_code = self.advice or "start the same command with the same code on all machines", 2

    def _remember(self, host: str, why: str) -> None:
        """Why a host is not here."""
        self._missing[host] = why
        if len(self._missing) > KNOWN:
            del self._missing[next(iter(self._missing))]

    def _refused(self, text: str) -> Order:
        return replace(self._blank, is_="end", text=f"error: {text}", code=2)

    def heard(self, member: str, state: State, now: float) -> None:
        """A member said what it does."""
        machine = self.machines.get(member)
        if machine is None:
            return
        machine.heard, machine.lost, machine.state = now, None, state
        if self.ended is None and state.signal and state.is_ == "failed":
            self._end(self._process_line(machine, state), state.code)
        elif state.is_ == "leaves":
            self._left(member, machine, now)
        elif member in self._roster and state.round == self.round and self.ended is None:
            self._progress(member, machine, now)

    def _left(self, member: str, machine: Machine, now: float) -> None:
        begun = bool(self.round)
        why = f"it was stopped there by signal {machine.state.signal}" if machine.state.signal else "its launcher ended"
        self._remove(member, why, now)
        if begun and machine.state.signal and self.ended is None:
            self._end(f"stopped by signal {machine.state.signal} on {self._name(machine)}", SAVED)

    def _progress(self, member: str, machine: Machine, now: float) -> None:
        """Of a machine that is in the round."""
        state = machine.state
        if state.is_ == "finished":
            self._finished.add(member)
        elif state.is_ == "failed" and member not in self._told:
            self._told.add(member)
            final = state.code in FINAL
            weight = 0 if final else 2 if state.code > 128 else 3
            self._fail(Failure(weight, self._process_line(machine, state), state.code, final), now)
        elif state.is_ == "waits" and member not in self._told:
            self._told.add(member)
            self._fail(Failure(1, f"{self._name(machine)} was cut off from {self._own.host}", 1), now)

    def _process_line(self, machine: Machine, state: State) -> str:
        how = "stopped" if state.code == SAVED else "failed"
        return f"rank {state.rank} on {self._name(machine)} {how} first, exit code {state.code}"

    def disconnected(self, member: str, now: float) -> None:
        """Its connection has ended; it may make another one."""
        if member in self.machines:
            self.machines[member].lost = now

    def tick(self, now: float) -> None:
        """Time has passed; to call often."""
        if self.ended is not None:
            return
        for member, machine in list(self.machines.items()):
            silent = now - machine.heard
            if member == self._own.member:
                continue
            if silent > self._limits.heartbeat_s:
                self._remove(member, f"it has not been heard of for {silent:.0f} s", now)
            elif machine.lost is not None and now - machine.lost > RETURN_S:
                self._remove(member, "its connection ended without a word", now)
        if self._roster:
            self._run(now)
        else:
            self._gather(now)

    def _remove(self, member: str, why: str, now: float) -> None:
        machine = self.machines.pop(member)
        self._remember(machine.about.host, why)
        if member in self._roster and member not in self._finished and self.ended is None:
            self._fail(Failure(1, f"{self._name(machine)} is gone: {why}", 1), now)
        elif not self._roster and self.ended is None:
            self.notices.append(f"{self._name(machine)} is gone: {why}")

    # --- between rounds

    def _gather(self, now: float) -> None:
        present = list(self.machines.values())
        for machine in present:
            if machine.state.is_ != "waits":  # it still stops what it ran
                if machine.order.is_ != "stop":
                    machine.order = replace(self._blank, is_="stop", round=max(self.round, machine.state.round))
                self._deadline = now + self._limits.timeout_s
        ready = [one for one in present if one.state.is_ == "waits"]
        waits_for = self._who_is_awaited(ready)
        for machine in ready:
            machine.order = replace(self._blank, text=waits_for)
        if len(ready) < len(present) or any(one.lost is not None for one in present):
            return
        enough = len(ready) >= self._own.nodes_min and now - self._last_came >= self._limits.last_call_s
        if self._own.member in self.machines and (enough or len(ready) >= self._own.nodes_max):
            self._start()
        elif now > self._deadline:
            self._end(*self._who_did_not_come(ready))

    def _start(self) -> None:
        others = [member for member in self.machines if member != self._own.member]
        self._roster = [self._own.member, *others][: self._own.nodes_max]
        self._finished, self._told, self._failed, self._decide_at = set(), set(), [], 0.0
        machines = [self.machines[member] for member in self._roster]
        self.round = 1 + max(self.round, *(one.state.round for one in machines))
        world = sum(one.about.processes for one in machines)
        own_address = machines[1].reached if len(machines) > 1 else ""
        first, port, text = 0, self._new_port(), self._who_runs(machines)
        for i, machine in enumerate(machines):
            machine.order = replace(
                self._blank, is_="start", round=self.round, text=text, group_rank=i, group_size=len(machines),
                first_rank=first, world_size=world, port=port, failures=self.failures, own_address=own_address,
            )  # fmt: skip
            first += machine.about.processes

    # --- in a round

    def _run(self, now: float) -> None:
        if self._finished.issuperset(self._roster):
            self._end("", 0)
        elif self._decide_at and now >= self._decide_at:
            self._decide(now)
        elif not self._decide_at:
            self._newcomers(now)

    def _newcomers(self, now: float) -> None:
        """Those that are not in the round: take them in when there is room, refuse them when there is none."""
        new = [machine for member, machine in self.machines.items() if member not in self._roster]
        for machine in new:
            if machine.state.is_ == "waits":
                machine.order = replace(self._blank, text=f"waiting to be taken in: {self._names(self._roster)} run")
            else:
                machine.order = replace(self._blank, is_="stop", round=machine.state.round)
        ready = [one for one in new if one.state.is_ == "waits" and one.lost is None]
        room = self._own.nodes_max - len(self._roster)
        last_call = now - self._last_came >= self._limits.last_call_s
        if room and ready and not self._finished and (last_call or len(ready) >= room):
            names = ", ".join(self._name(one) for one in ready[:room])
            self._stop(f"{names} came: the processes save and start again with it", gentle=True, now=now)
            return
        for machine in ready[room:]:
            if now - machine.came > self._limits.heartbeat_s + EXCESS_S:
                runs = f"--nodes {self._own.nodes()}, and {self._names(self._roster)} run already"
                machine.order = self._refused(f"{machine.about.host} is one machine too many: {runs}")

    def _fail(self, failure: Failure, now: float) -> None:
        self._failed.append(failure)
        self._decide_at = self._decide_at or now + COLLECT_S

    def _decide(self, now: float) -> None:
        """Which failure was the cause, and whether processes are started again."""
        for member in self._roster:  # its connection ended just now, and others failed because of it
            machine = self.machines.get(member)
            if machine is not None and machine.lost is not None and member not in self._finished:
                self._failed.append(Failure(1, f"{self._name(machine)} is gone: its connection ended", 1))
        cause = min(self._failed, key=lambda one: one.weight)
        most = self._own.restarts
        if cause.final or self.failures >= most:
            self._end(f"error: {cause.line}" if cause.weight == 1 else cause.line, cause.code)
        else:
            self.failures += 1
            self._stop(f"{cause.line}; starting again ({self.failures} of {most})", gentle=False, now=now)

    def _stop(self, line: str, gentle: bool, now: float) -> None:
        for member in self._roster:
            if member in self.machines:
                self.machines[member].order = replace(
                    self._blank, is_="stop", round=self.round, text=line, gentle=gentle, failures=self.failures
                )
        self._roster, self._deadline = [], now + self._limits.timeout_s

    def _end(self, line: str, code: int) -> None:
        """For all, once."""
        self.ended = replace(self._blank, is_="end", text=line, code=code)
        self._roster = []
        for machine in self.machines.values():
            machine.order = self.ended

    # --- words

    def _name(self, machine: Machine) -> str:
        same = [one for one in self.machines.values() if one.about.host == machine.about.host and one is not machine]
        return f"{machine.about.host} ({machine.address})" if same else machine.about.host

    def _names(self, members: Sequence[str]) -> str:
        return ", ".join(self._name(self.machines[one]) for one in members if one in self.machines) or "nobody"

    def _who_runs(self, machines: Sequence[Machine]) -> str:
        first, named = 0, []
        for machine in machines:
            last = first + machine.about.processes - 1
            named.append(f"{self._name(machine)} (rank {first}{f'-{last}' if last > first else ''})")
            first = last + 1
        machines_, processes = "s" * (len(machines) > 1), "es" * (first > 1)
        return f"{len(machines)} machine{machines_}, {first} process{processes}: {_listed(named)}"

    def _came(self, ready: Sequence[Machine]) -> str:
        own = self._own
        wanted = str(own.nodes_max) if own.nodes_min == own.nodes_max else f"{own.nodes_min} to {own.nodes_max}"
        return f"{len(ready)} of {wanted} machines came"

    def _who_is_awaited(self, ready: Sequence[Machine]) -> str:
        left = self._own.nodes_max - len(ready)
        others = "the other one is" if left == 1 else f"the other {left} are"
        names = _listed([self._name(one) for one in ready])
        gone = "".join(f"; {host}: {why}" for host, why in list(self._missing.items())[-3:])
        return f"{self._came(ready)}: {names}; {others} awaited at {self._endpoint}{gone}"

    def _who_did_not_come(self, ready: Sequence[Machine]) -> tuple[str, int]:
        names, missing = _listed([self._name(one) for one in ready]), self._own.nodes_min - len(ready)
        gone = "".join(f"; {host}: {why}" for host, why in list(self._missing.items())[-3:])
        head = f"error: {self._came(ready)} within {self._limits.timeout_s:.0f} s: {names}; {missing} did not reach "
        usual = "is the same command started there, does this address lead there to this machine, and is the port open?"
        return f"{head}{self._endpoint}{gone}: {self.advice or usual}", self.advice_code


def _failures(about: About, epoch: str) -> int:
    """That a launcher has seen; the end of a round that began under another coordinator is one."""
    return about.failures + (about.round > 0 and about.epoch != epoch)


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
