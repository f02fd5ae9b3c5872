"""Launchers that meet on this machine: real sockets, strangers on the port, connections that are cut."""

import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from launch import member as module
from launch.coordinator import Limits
from launch.coordinator_server import STRANGERS, listen, reserve
from launch.member import Lines, Member, Place, _is_own_name
from launch.rendezvous import About, Order, RunEnded, State, encode
from tests.patience import patience

pytestmark = pytest.mark.timeout(900)
LIMIT_S = 60.0  # of every wait, on a machine that does other things too
LIMITS = Limits(timeout_s=LIMIT_S, last_call_s=0.2, heartbeat_s=2.0)


class Launcher:
    """A member and a thread that stands for its main thread: it meets, and stays in the round."""

    def __init__(self, name: str, port: int, limits: Limits = LIMITS, host: str = "127.0.0.1", **more: Any) -> None:
        about = replace(About(name, name, 1, 2, 2, 1, "", "train.py", "", "2.13.0", "3.11", "abc"), **more)
        self.said: list[str] = []
        self.place: Place | None = None
        self.ended: RunEnded | None = None
        kind = Remote if port < 0 else Member
        self.member = kind(host, abs(port), about, limits, self.said.append, lambda: 0)
        self.meet()

    def meet(self) -> None:
        self.place, self.ended = None, None
        threading.Thread(target=self._meet, daemon=True).start()

    def _meet(self) -> None:
        try:
            self.place = self.member.meet()
        except RunEnded as error:
            self.ended = error

    def result(self) -> Place | RunEnded:
        until(lambda: self.place is not None or self.ended is not None)
        assert self.place or self.ended
        return self.place or self.ended  # type: ignore[return-value]

    def order(self) -> Order:
        until(lambda: self.member.order() is not None)
        order = self.member.order()
        assert order is not None
        return order


class Remote(Member):
    """One of another machine."""

    def _is_own(self, address: str) -> bool:
        return False

    def _leads_to_itself(self, addresses: object) -> bool:
        return False


Launch = Callable[..., Launcher]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Makes launchers, which leave with the test."""
    made: list[Launcher] = []

    def make(*args: Any, **more: Any) -> Launcher:
        made.append(Launcher(*args, **more))
        return made[-1]

    yield make
    for one in reversed(made):
        one.member.close()


@pytest.fixture
def port() -> int:
    with reserve() as held:
        return int(held.getsockname()[1])


def until(what: Callable[[], bool]) -> None:
    limit = time.monotonic() + patience(LIMIT_S)
    while not what():
        assert time.monotonic() < limit
        time.sleep(0.01)


def test_uneven_launchers_meet_and_end_together(launch: Launch, port: int) -> None:
    first = launch("a", port, processes=2)
    until(lambda: first.member._found)
    second = launch("b", port, processes=3)
    one, other = first.result(), second.result()
    assert isinstance(one, Place) and isinstance(other, Place)
    assert (one.first_rank, other.first_rank, one.world_size, other.world_size) == (0, 2, 5, 5)
    assert one.address == other.address == "127.0.0.1" and one.port == other.port
    first.member.tell(State("finished", 1))
    time.sleep(0.3)
    assert first.member.order() is None  # the other one still runs
    second.member.tell(State("finished", 1))
    assert [(it.order().is_, it.order().code) for it in (first, second)] == [("end", 0)] * 2


def test_the_port_of_a_round_is_rank_0_s_to_bind(launch: Launch, port: int) -> None:
    launch("a", port)
    place = launch("b", port).result()
    assert isinstance(place, Place)
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        with suppress(OSError), socket.socket(family) as rank_0:
            rank_0.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            rank_0.bind((address, place.port))
            rank_0.listen()
            socket.create_connection(("127.0.0.1", place.port), 5).close()


def test_strangers_disturb_nobody(launch: Launch, port: int) -> None:
    """Garbage, halves of messages, floods, and many connections that say nothing, before, while and after they meet."""
    draw, first = random.Random(3), launch("a", port)
    until(lambda: first.member._found)
    hello = encode(About("x" * 8, "x", 1, 2, 2, 1, "", "other.py", "", "1", "3", "c"))
    with ExitStack() as silent:
        for i in range(STRANGERS + 40):
            link = silent.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            with suppress(OSError):
                if i % 3:
                    link.sendall(draw.choice([b"GET / HTTP/1.1\r\n\r\n", draw.randbytes(300), b"\n" * 50, hello[:-9]]))
        for _ in range(150):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as link:
                line = bytearray(hello)
                for _ in range(draw.randint(1, 30)):
                    line[draw.randrange(len(line))] = draw.randrange(256)
                link.sendall(bytes(line) * draw.choice([1, 1, 1, 200]))
        second = launch("b", port)
        assert isinstance(second.result(), Place) and isinstance(first.result(), Place)
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as link:
            link.sendall(b"x" * 10**6)
    time.sleep(0.5)
    assert first.member.order() is None and second.member.order() is None


def test_a_launcher_of_another_version_is_told_so(launch: Launch, port: int) -> None:
    first = launch("a", port)
    until(lambda: first.member._found)
    with socket.create_connection(("127.0.0.1", port), 5) as link:
        link.sendall(encode(About("x", "x", 1, 2, 2, 1, "", "", "", "", "", "")).replace(b'r":1,', b'r":99,'))
        assert b"different versions" in link.makefile("rb").readline()
    assert isinstance(launch("b", port).result(), Place)


@contextmanager
def stranger(port: int, does: str) -> Iterator[None]:
    """Another program on the port."""
    with listen(port) as server:
        server.setblocking(True)

        def serve() -> None:
            kept = []
            with suppress(OSError):
                while True:
                    link, _ = server.accept()
                    kept.append(link)
                    if does == "talks":
                        link.sendall(b"220 ready\r\n")
                    if does == "answers JSON":
                        link.sendall(b'{"opensora": 1}\n')
                    if does == "closes":
                        link.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("where", [1, -1], ids=["this machine", "another machine"])
@pytest.mark.parametrize("does", ["talks", "answers JSON", "closes", "is silent"])
def test_another_program_on_the_port(
    does: str, where: int, launch: Launch, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 1.0)
    with stranger(port, does):
        ended = launch("a", where * port).result()
    assert isinstance(ended, RunEnded) and ended.exit_code == 1
    assert str(ended).startswith(
        f"error: 127.0.0.1:{port} is in use by another program; give --rendezvous another port"
    )


# host, whether it is this machine -> exit code, what is said
NOBODY: dict[str, tuple[str, int, int, str]] = {
    "refused": ("127.0.0.1", -1, 1, "does not answer (connection refused), tried for 1 s: is the same command started"),
    "no such name": ("no..name", 1, 2, "no machine of this name is known here"),
    "no machine's": ("0.0.0.0", 1, 2, "0.0.0.0 is no machine's address; give --rendezvous an address of this machine"),
    "alone": ("localhost", 1, 2, "1 of 2 machines came within 1 s: a; 1 did not reach localhost:"),
}


@pytest.mark.parametrize("case", NOBODY)
def test_who_stays_alone_says_why(case: str, launch: Launch, port: int) -> None:
    host, where, code, said = NOBODY[case]
    ended = launch("a", where * port, replace(LIMITS, timeout_s=1.0), host=host).result()
    assert isinstance(ended, RunEnded) and ended.exit_code == code
    assert said in str(ended) and str(ended).startswith("error: ") and "\n" not in str(ended)


def test_a_port_that_nobody_may_use_is_named(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "CoordinatorServer", refuse)
    ended = launch("a", 80).result()
    assert isinstance(ended, RunEnded) and ended.exit_code == 2
    assert str(ended) == "error: nobody can listen on port 80 of this machine (permission denied)"


class Cable:
    """Carries connections to a port of this machine, until it is pulled (nothing comes through) or cut (they end)."""

    def __init__(self, port: int) -> None:
        self._target, self.pulled, self.closing = port, False, False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._pairs: dict[socket.socket, socket.socket] = {}
        threading.Thread(target=self._carry, daemon=True).start()

    def _carry(self) -> None:
        while not self.closing:
            for link in select.select([self._server, *self._pairs], [], [], 0.02)[0]:
                if self.pulled:
                    time.sleep(0.02)
                elif link is self._server:
                    near, far = self._server.accept()[0], socket.create_connection(("127.0.0.1", self._target), 5)
                    self._pairs |= {near: far, far: near}
                elif link in self._pairs:
                    self._pass_on(link)
        self.cut()
        self._server.close()

    def _pass_on(self, link: socket.socket) -> None:
        other = self._pairs[link]
        with suppress(OSError):
            came = link.recv(65536)
            if came:
                other.sendall(came)
                return
        for one in (link, other):
            del self._pairs[one]
            one.close()

    def cut(self) -> None:
        for link in list(self._pairs):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cable(port: int) -> Iterator[Cable]:
    made = Cable(port)
    yield made
    made.closing = True


def test_a_connection_that_is_cut_is_made_again(launch: Launch, port: int, cable: Cable) -> None:
    first = launch("a", port, restarts=0)
    until(lambda: first.member._found)
    second = launch("b", -cable.port, restarts=0)
    assert isinstance(first.result(), Place) and isinstance(second.result(), Place)
    for _ in range(3):
        cable.cut()
        time.sleep(0.3)
    assert first.member.order() is None and second.member.order() is None
    second.member.tell(State("failed", 1, 1, 77))  # and what is told meanwhile arrives
    assert first.order().code == second.order().code == 77


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_cable_that_is_pulled_is_noticed_at_both_ends(restarts: int, launch: Launch, port: int, cable: Cable) -> None:
    first = launch("a", port, restarts=restarts)
    until(lambda: first.member._found)
    second = launch("b", -cable.port, restarts=restarts)
    assert isinstance(first.result(), Place) and isinstance(second.result(), Place)
    cable.pulled = True
    here, there = first.order(), second.order()
    if not restarts:
        assert [here.is_, here.code] == [there.is_, there.code] == ["end", 1]
        assert here.text.startswith("error: b is gone: it has not been heard of for 2 s")
        assert there.text.startswith(f"error: the launcher at 127.0.0.1:{cable.port} has not been reached for ")
        return
    assert here.is_ == there.is_ == "stop" and "starting again (1 of 1)" in here.text
    cable.pulled = False
    for one in (first, second):
        one.meet()
    again = [one.result() for one in (first, second)]
    assert all(isinstance(one, Place) and one.failures == 1 and one.world_size == 2 for one in again)


def test_a_coordinator_that_is_started_anew_is_found(launch: Launch, port: int) -> None:
    first = Launcher("a", port)
    until(lambda: first.member._found)
    second = launch("b", -port)
    assert isinstance(first.result(), Place) and isinstance(second.result(), Place)
    first.member._closing = True  # without a word, as by SIGKILL
    assert first.member._server is not None
    first.member._server.close(0.0)
    assert second.order().is_ == "stop" and "starting again (1 of 1)" in second.order().text
    second.meet()
    third = launch("a2", port)
    here, there = third.result(), second.result()
    assert isinstance(here, Place) and isinstance(there, Place) and here.failures == there.failures == 1


OWN = ("localhost", "LOCALHOST.", "ip6-localhost", "127.0.0.1", "::1", "me", "ME", "me.cluster")
OTHERS = ("you", "localhosts", "me2", "")


@pytest.mark.parametrize(("host", "own"), [(one, True) for one in OWN] + [(one, False) for one in OTHERS])
def test_whose_name_it_is(host: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Me.domain")
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, *_, **__: [(0, 0, 0, name, None)])
    assert _is_own_name(host) is own


def test_lines_come_after_five_seconds_and_then_with_growing_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], list[tuple[int, str]]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    lines = Lines()
    for second in range(400):
        now[0] = float(second)
        lines.show("a" if second < 150 else "b", lambda text, at=second: said.append((at, text)))
    assert [at for at, _ in said] == [5, 10, 20, 40, 80, 140, 155, 160, 170, 190, 230, 290, 350]
    assert said[5][1] == "a" and said[6][1] == "b"
