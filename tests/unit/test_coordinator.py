"""Launchers of several machines: what they say, and what the coordinator makes of any order of events."""

import json
import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from launch.coordinator import COLLECT_S, EXCESS_S, RETURN_S, Coordinator, Limits
from launch.rendezvous import (
    LINE_BYTES,
    About,
    Message,
    Order,
    ProtocolError,
    State,
    VersionError,
    decode,
    encode,
)

LIMITS = Limits(timeout_s=100.0, last_call_s=20.0, heartbeat_s=10.0)


def about(host: str, **more: Any) -> About:
    base = About(f"id-{host}", host, 2, 2, 2, 1, "", "train.py name=first", "seed=3", "2.13.0", "3.11", "abc")
    return replace(base, **more)


class Run:
    """A coordinator, a clock, and launchers that do as they are told at once."""

    def __init__(self, **own: Any) -> None:
        self.now, self.ports = 0.0, iter(range(40000, 50000))
        self.own = about("a", **own)
        self.coordinator = Coordinator(self.own, LIMITS, "a:29400", lambda: next(self.ports), "epoch", 0.0)

    def come(self, host: str, **more: Any) -> Order:
        same = {name: getattr(self.own, name) for name in ("nodes_min", "nodes_max", "restarts")}
        it = about(host, **{**same, **more})
        answer = self.coordinator.hello(it, f"10.0.0.{ord(host[0])}", "10.0.0.97", self.now)
        self.say(host, "waits", it.round)
        return answer

    def say(self, host: str, is_: str, number: int | None = None, **more: int) -> None:
        number = self.coordinator.round if number is None else number
        self.coordinator.heard(f"id-{host}", State(is_, number, **more), self.now)

    def pass_time(self, seconds: float, *silent: str) -> None:
        """Everybody is heard of but the silent ones."""
        end = self.now + seconds
        while self.now < end:
            self.now = min(self.now + 0.5, end)
            for member, machine in self.coordinator.machines.items():
                if machine.lost is None and machine.about.host not in silent:
                    self.coordinator.heard(member, machine.state, self.now)
            self.coordinator.tick(self.now)

    def order(self, host: str) -> Order:
        return self.coordinator.machines[f"id-{host}"].order

    def obey(self, *hosts: str) -> None:
        """Those that are told to stop do, those that are told to start run."""
        for host in hosts:
            if self.order(host).is_ == "stop":
                self.say(host, "waits")
            elif self.order(host).is_ == "start":
                self.say(host, "runs")
        self.coordinator.tick(self.now)


def running(*hosts: str, **own: Any) -> Run:
    run = Run(nodes_min=own.pop("least", len(hosts)), nodes_max=own.pop("most", len(hosts)), **own)
    for host in hosts:
        run.come(host)
    run.pass_time(LIMITS.last_call_s + 1)
    run.obey(*hosts)
    assert run.coordinator.round == 1 and all(run.order(host).is_ == "start" for host in hosts)
    return run


def test_the_ranks_of_uneven_machines() -> None:
    run = Run(nodes_min=3, nodes_max=3, processes=4)
    for host, processes in (("c", 1), ("a", 4), ("b", 2)):
        run.come(host, processes=processes)
    run.coordinator.tick(0.0)
    orders = [run.order(host) for host in "acb"]
    assert [(one.group_rank, one.first_rank) for one in orders] == [(0, 0), (1, 4), (2, 5)]
    assert {(one.group_size, one.world_size, one.port, one.is_) for one in orders} == {(3, 7, 40000, "start")}
    assert "a (rank 0-3), c (rank 4), b (rank 5-6)" in orders[0].text and orders[0].own_address == "10.0.0.97"


def test_nothing_begins_before_all_are_there_and_the_end_names_who_is() -> None:
    run = Run(nodes_min=3, nodes_max=3)
    run.come("a")
    run.come("b")
    run.pass_time(LIMITS.timeout_s - 1)
    assert run.order("a").text == "2 of 3 machines came: a, b; the other one is awaited at a:29400"
    run.pass_time(2)
    for host in "ab":
        assert run.order(host).is_ == "end" and run.order(host).code == 1
        assert run.order(host).text.startswith(
            "error: 2 of 3 machines came within 100 s: a, b; 1 did not reach a:29400: is the same command"
        )


def test_fewer_than_most_begin_after_the_last_call() -> None:
    run = Run(nodes_min=2, nodes_max=4)
    run.come("a")
    run.pass_time(30)
    run.come("b")
    run.pass_time(LIMITS.last_call_s - 1)
    assert run.order("a").is_ == "wait" and "2 of 2 to 4 machines came" in run.order("a").text
    run.pass_time(1.5)
    assert run.order("a").is_ == run.order("b").is_ == "start" and run.order("b").group_size == 2


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "nodes": ({"nodes_max": 4}, "--nodes is not the same: 2:4 on b, 2 on a"),
    "restarts": ({"restarts": 5}, "--restarts is not the same: 5 on b, 1 on a"),
    "torch": ({"torch": "2.11.0"}, "torch is not the same: 2.11.0 on b, 2.13.0 on a"),
    "python": ({"python": "3.12"}, "Python is not the same: 3.12 on b, 3.11 on a"),
    "code": ({"code": "def"}, "code is not the same: digest def on b, digest abc on a"),
    "configuration": (
        {"settings": "optim.lr=1 seed=3"},
        "configuration is not the same: optim.lr=1 on b, nothing on a",
    ),
    "order": ({"settings": "seed=4 seed=3"}, "configuration is not the same: seed=4 on b, nothing on a"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_launcher_that_differs_ends_the_wait_on_all(case: str) -> None:
    fields, said = DIFFERENT[case]
    run = Run(nodes_min=2, nodes_max=2)
    run.come("a")
    answer = run.come("b", **fields)
    assert answer == run.order("a") and answer.is_ == "end" and answer.code == 2
    assert answer.text == f"error: b (10.0.0.98) cannot join a: {answer.text.partition(': ')[2].partition(': ')[2]}"
    assert said in answer.text


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_launcher_that_differs_does_not_disturb_those_that_run(case: str) -> None:
    run = running("a", "b", least=1, most=3)
    before = run.order("a")
    answer = run.come("c", **DIFFERENT[case][0])
    run.pass_time(LIMITS.last_call_s + 1)
    assert answer.is_ == "end" and answer.code == 2 and "cannot join a" in answer.text
    assert run.order("a") == before and "refused c" in run.coordinator.notices[0]


def test_another_run_is_refused_and_disturbs_nobody() -> None:
    run = Run(nodes_min=2, nodes_max=2)
    run.come("a")
    answer = run.come("x", command="train.py name=second", torch="1.0")
    assert answer.is_ == "end" and answer.code == 2
    assert "another run meets at a:29400: train.py name=first; this one is train.py name=second" in answer.text
    assert run.come("y", run="mine").is_ == "end"
    run.come("b")
    run.coordinator.tick(run.now)
    assert run.order("a").is_ == "start"
    named = Run(nodes_min=2, nodes_max=2, run="mine")
    named.come("a", run="mine")
    assert named.come("b", run="mine", command="train.py", settings="folder=b").is_ != "end"


def test_one_machine_too_many_is_refused_when_the_others_are_known_to_live() -> None:
    run = running("a", "b")
    run.come("c")
    run.pass_time(LIMITS.heartbeat_s + EXCESS_S - 1)
    assert run.order("c").is_ == "wait"
    run.pass_time(2)
    assert run.order("c").is_ == "end" and run.order("c").code == 2 and "one machine too many" in run.order("c").text
    assert run.order("a").is_ == run.order("b").is_ == "start"


def test_a_process_that_fails_starts_all_again_until_the_restarts_are_used() -> None:
    run = running("a", "b", restarts=1)
    run.say("b", "failed", rank=3, code=137)
    run.pass_time(0.2)
    run.say("a", "failed", rank=0, code=1)  # because of it
    run.pass_time(COLLECT_S)
    assert run.order("a").is_ == run.order("b").is_ == "stop" and not run.order("a").gentle
    assert run.order("a").text == "rank 3 on b failed first, exit code 137; starting again (1 of 1)"
    run.obey("a", "b")
    assert run.order("a").is_ == "start" and run.order("a").failures == 1 and run.order("a").round == 2
    run.obey("a", "b")
    run.say("a", "failed", rank=1, code=70)
    run.pass_time(1)
    assert run.order("b").is_ == "end" and run.order("b").code == 70
    assert run.order("b").text == "rank 1 on a failed first, exit code 70"


@pytest.mark.parametrize("code", [2, 75])
def test_codes_that_are_final(code: int) -> None:
    run = running("a", "b", restarts=3)
    run.say("a", "failed", rank=0, code=1)
    run.say("b", "failed", rank=2, code=code)
    run.pass_time(1)
    assert run.order("a").is_ == "end" and run.order("a").code == code and "rank 2 on b" in run.order("a").text


def test_a_signal_anywhere_ends_all() -> None:
    run = running("a", "b", restarts=3)
    run.say("b", "failed", rank=2, code=143, signal=15)
    assert run.order("a").is_ == "end" and run.order("a").code == 143
    waiting = running("a", "b", restarts=3)
    waiting.say("b", "failed", rank=2, code=1)
    waiting.pass_time(1)
    waiting.say("a", "waits")
    waiting.say("b", "leaves", signal=2)
    assert waiting.order("a").is_ == "end" and waiting.order("a").code == 75
    before = Run(nodes_min=3, nodes_max=3)
    before.come("a")
    before.come("b")
    before.say("b", "leaves", signal=2)
    before.pass_time(1)
    assert before.order("a").is_ == "wait" and "b: it was stopped there by signal 2" in before.order("a").text


@pytest.mark.parametrize(("cut", "after_s"), [("power", LIMITS.heartbeat_s), ("killed", RETURN_S)])
def test_a_host_that_dies_is_named_in_time(cut: str, after_s: float) -> None:
    """By silence, or by the end of its connection; the failures that it causes elsewhere are not the cause."""
    run = running("a", "b", restarts=0)
    if cut == "killed":
        run.coordinator.disconnected("id-b", run.now)
        run.say("a", "failed", rank=0, code=1)
        after_s = COLLECT_S
    run.pass_time(after_s - 0.1, "b")
    assert run.order("a").is_ == "start"
    run.pass_time(1.5, "b")
    assert run.order("a").is_ == "end" and run.order("a").code == 1
    assert run.order("a").text.startswith("error: b is gone: ")


def test_a_connection_that_comes_back_is_no_failure() -> None:
    run = running("a", "b", restarts=0)
    run.coordinator.disconnected("id-b", run.now)
    run.pass_time(RETURN_S - 0.5)
    assert run.come("b").is_ == "start"
    run.say("b", "runs")
    run.pass_time(30)
    assert run.order("a").is_ == "start"


def test_a_host_that_dies_and_comes_back_fixed() -> None:
    run = running("a", "b", restarts=1)
    run.pass_time(LIMITS.heartbeat_s + 1.5, "b")
    run.obey("a")
    assert run.order("a").is_ == "wait" and "1 of 2 machines came: a" in run.order("a").text
    assert "b: it has not been heard of for" in run.order("a").text
    run.pass_time(50)
    run.come("b", member="id-b")
    run.coordinator.tick(run.now)
    assert run.order("b").is_ == "start" and run.order("b").failures == 1 and run.order("b").round == 2


def test_a_host_that_dies_and_comes_back_elastic() -> None:
    run = running("a", "b", least=1, most=2, restarts=1)
    run.pass_time(LIMITS.heartbeat_s + 1.5, "b")
    run.obey("a")
    assert run.order("a").is_ == "start" and run.order("a").group_size == 1 and run.order("a").failures == 1
    run.obey("a")
    run.come("b")
    run.coordinator.tick(run.now)
    assert run.order("a").is_ == "stop" and run.order("a").gentle  # saved first, and no failure
    run.obey("a")
    assert run.order("b").is_ == "start" and run.order("b").group_size == 2 and run.order("b").failures == 1


def test_a_machine_that_has_finished_may_go() -> None:
    run = running("a", "b", restarts=0)
    run.say("b", "finished")
    run.coordinator.disconnected("id-b", run.now)
    run.pass_time(60, "b")
    assert run.order("a").is_ == "start"
    run.say("a", "finished")
    run.pass_time(1)
    assert run.order("a").is_ == "end" and run.order("a").code == 0


def test_a_coordinator_started_anew_counts_what_was_used() -> None:
    run = Run(nodes_min=2, nodes_max=2, restarts=3)
    run.come("b", round=4, failures=1, epoch="earlier")
    run.come("a")
    run.coordinator.tick(0.0)
    assert run.order("a").is_ == "start" and run.order("a").round == 5 and run.order("a").failures == 2


# --- messages


MESSAGES: list[Message] = [about("a"), State("runs", 3), Order("start", text="x", port=5, gentle=True)]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_comes_back(message: Message) -> None:
    line = encode(message)
    assert line.endswith(b"\n") and line.count(b"\n") == 1 and decode(line, type(message)) == message


@pytest.mark.parametrize("message", MESSAGES)
def test_damaged_lines_are_messages_or_refused(message: Message) -> None:
    """Bytes and fields at random; whatever comes through has the types of a message, and prints on one line."""
    draw = random.Random(5)
    values: list[Any] = [None, True, -1, 2**31, 1.5, float("nan"), 10**30, "", "\x1b[2J\n\ud800", "x" * 5000, [], {}]
    values += [3, "waits", "start"]
    for _ in range(3000):
        line = bytearray(encode(message))
        if draw.random() < 0.5:
            for _ in range(draw.randint(1, 4)):
                line[draw.randrange(len(line))] = draw.randrange(256)
        else:
            fields = json.loads(line)
            fields[draw.choice(list(fields))] = draw.choice(values)
            line = bytearray(json.dumps(fields).encode())
        try:
            found = decode(bytes(line), type(message))
        except ProtocolError:
            continue
        for name, value in vars(found).items():
            assert type(value) is type(getattr(message, name)), name
            assert not isinstance(value, str) or (len(value) <= 1000 and (value == "" or value.isprintable())), name


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"GET / HTTP/1.1\r",
        b"null",
        b"[" * 20000,
        b'{"a":' * 5000,
        b"9" * 20000,
        b"\x16\x03\x01",
        b"x" * LINE_BYTES,
    ],
)
def test_strangers_are_no_launchers(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(line, About)


def test_a_launcher_of_another_version_is_known_as_one() -> None:
    with pytest.raises(VersionError):
        decode(encode(about("a")).replace(b'"opensora-launcher":1', b'"opensora-launcher":2'), About)


# --- any order of events


@dataclass
class Launcher:
    """As launch/member.py behaves, at the mercy of a network."""

    about: About
    state: State = field(default_factory=lambda: State("waits"))
    alive: bool = True
    connected: bool = False
    cable: bool = True
    heard: float = 0.0
    stops_at: float | None = None
    fails: int | None = None
    work_s: float = 0.0
    ended: int | None = None
    inbox: "deque[tuple[float, Order]]" = field(default_factory=deque)
    outbox: "deque[tuple[float, State]]" = field(default_factory=deque)
    sent: Order | None = None
    told: State | None = None
    sent_at: float = 0.0
    told_at: float = 0.0


class World:
    """Launchers that come, die by power cut or kill, lose their cable, fail, and come back, at random times."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        most = self.draw.randint(2, 4)
        least = self.draw.choice([most, self.draw.randint(1, most)])
        self.restarts, self.now = self.draw.randint(0, 4), 0.0
        self.base = {"nodes_min": least, "nodes_max": most, "restarts": self.restarts}
        ports = iter(range(10000, 60000))
        own = about("h0", **self.base)
        self.coordinator = Coordinator(own, LIMITS, "h0:29400", lambda: next(ports), "epoch", 0.0)
        self.launchers = [Launcher(own)]
        self.launchers += [Launcher(about(f"h{i}", **self.base), alive=False) for i in range(1, most)]
        self.rounds: dict[int, dict[int, tuple[Order, About]]] = {}
        self.comes = 0

    def step(self, faults: bool) -> None:
        self.now += 0.25
        for launcher in self.launchers:
            if faults:
                self.fate(launcher)
            if launcher.alive and launcher.ended is None:
                self.live(launcher)
        self.coordinator.tick(self.now)
        for launcher in self.launchers:
            self.carry(launcher)

    def fate(self, it: Launcher) -> None:
        draw, own = self.draw, it is self.launchers[0]
        if not it.alive and draw.random() < 0.02:
            self.comes += 1
            fresh = replace(it.about, member=f"id-{it.about.host}-{self.comes}", round=0, failures=0, epoch="")
            self.launchers[self.launchers.index(it)] = Launcher(fresh, heard=self.now)
        elif it.alive and not own and draw.random() < 0.004:
            it.alive = False
            if it.connected and draw.random() < 0.5:  # its kernel says so; else it is a power cut
                self.coordinator.disconnected(it.about.member, self.now)
        elif it.alive and not own and draw.random() < 0.006:
            it.cable = not it.cable
        elif it.alive and it.state.is_ == "runs" and draw.random() < 0.003:
            it.fails = draw.choice([1, 1, 70, 137, 2])

    def live(self, it: Launcher) -> None:
        if it.connected and it.cable and self.now - it.heard > LIMITS.heartbeat_s:
            it.connected = False
        if not it.connected and it.cable and self.draw.random() < 0.5:
            it.inbox.clear(), it.outbox.clear()
            answer = self.coordinator.hello(it.about, "10.0.0.1", "10.0.0.97", self.now)
            if answer.is_ == "later":
                it.ended = 99
                return
            it.connected, it.heard, it.sent, it.told = True, self.now, None, None
            self.obey(it, answer)
        if not it.connected or self.now - it.heard > LIMITS.heartbeat_s:
            it.connected = False
            if it.state.is_ in ("runs", "failed") and self.now - it.heard > LIMITS.heartbeat_s and it.stops_at is None:
                it.stops_at = self.now + self.draw.random() * 3
        if it.stops_at is not None and self.now >= it.stops_at:
            it.stops_at, it.state = None, State("waits", it.state.round)
        if it.state.is_ == "runs" and it.stops_at is None:
            it.work_s -= 0.25
            if it.fails is not None:
                it.state = State("failed", it.state.round, it.about.processes, it.fails)
            elif it.work_s <= 0:
                it.state = State("finished", it.state.round)

    def obey(self, it: Launcher, order: Order) -> None:
        it.heard = self.now
        new = order.is_ == "start" and order.round > it.state.round
        if order.is_ == "end":
            it.ended = order.code
        elif it.state.is_ == "waits":
            if new:
                self.begin(it, order)
        elif it.stops_at is None and (new or (order.is_ == "stop" and order.round >= it.state.round)):
            it.stops_at = self.now + self.draw.random() * 3

    def begin(self, it: Launcher, order: Order) -> None:
        it.state, it.fails, it.work_s = State("runs", order.round), None, 60.0
        it.about = replace(it.about, round=order.round, failures=order.failures, epoch=order.epoch)
        there = self.rounds.setdefault(order.round, {})
        assert order.group_rank not in there, "two machines with one rank"
        there[order.group_rank] = (order, it.about)

    def carry(self, it: Launcher) -> None:
        """What is on its way between a launcher and the coordinator, in order, after up to a second."""
        machine = self.coordinator.machines.get(it.about.member)
        if not it.alive or not it.connected or machine is None or it.ended is not None:
            return
        late = self.now + self.draw.random()
        if machine.order != it.sent or self.now - it.sent_at > 2:
            it.inbox.append((max(late, it.inbox[-1][0] if it.inbox else 0.0), machine.order))
            it.sent, it.sent_at = machine.order, self.now
        if it.state != it.told or self.now - it.told_at > 2:
            it.outbox.append((max(late, it.outbox[-1][0] if it.outbox else 0.0), it.state))
            it.told, it.told_at = it.state, self.now
        while it.cable and it.inbox and it.inbox[0][0] <= self.now and it.ended is None:
            self.obey(it, it.inbox.popleft()[1])
        while it.cable and it.outbox and it.outbox[0][0] <= self.now:
            self.coordinator.heard(it.about.member, it.outbox.popleft()[1], self.now)

    def check_rounds(self) -> None:
        least, most = self.base["nodes_min"], self.base["nodes_max"]
        for number, there in self.rounds.items():
            orders = [order for order, _ in there.values()]
            same = {(one.group_size, one.world_size, one.port, one.failures) for one in orders}
            assert len(same) == 1, (number, same)
            assert least <= orders[0].group_size <= most
            assert orders[0].failures <= self.restarts
            for rank, (order, who) in there.items():
                assert order.first_rank == rank * 2 and (rank == 0) == (who.host == "h0")


@pytest.mark.parametrize("seed", range(150))
def test_whatever_happens_a_run_ends_alike_on_all_machines(seed: int) -> None:
    """Some minutes of faults, then peace: every launcher that lives then ends, all with the same code."""
    world = World(seed)
    while world.now < 240 and world.coordinator.ended is None:
        world.step(faults=True)
    for launcher in world.launchers:
        launcher.cable, launcher.fails = True, launcher.fails if launcher.state.is_ == "failed" else None
        if not launcher.alive and world.coordinator.ended is None:
            launcher.__dict__.update(vars(Launcher(replace(launcher.about, member=f"last-{launcher.about.host}"))))
            launcher.about = replace(launcher.about, round=0, failures=0, epoch="")
            launcher.heard = world.now
    while world.now < 2000 and any(one.alive and one.ended is None for one in world.launchers):
        world.step(faults=False)
    world.check_rounds()
    ended = world.coordinator.ended
    assert ended is not None, "it never ends"
    codes = {one.ended for one in world.launchers if one.alive}
    assert codes <= {ended.code, 99}, (codes, ended)
    assert ended.code == 0 or ended.text
