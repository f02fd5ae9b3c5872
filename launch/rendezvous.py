"""What launchers of several machines say to one another: lines of JSON, of a bounded size, with a version.

The launcher of one machine is the coordinator (launch/coordinator.py); every launcher, its own included, keeps a
connection to it (launch/member.py). A member says hello once, and then its state; the coordinator answers with its
order. Both repeat theirs as heartbeats, so that a line that was lost with a connection is said again on the next one.
The port is open to everybody: nothing that comes is unpickled or evaluated, and what is not of this form is no message.
"""

import json
import platform
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MAGIC, VERSION = "opensora-launcher", 1
LINE_BYTES = 32768  # of the longest message
TEXT = 1000  # characters of the longest text in one
MOST = 2**31  # no number in a message is larger
SAVED = 75  # exit code of processes whose state is on disk
FINAL = (2, SAVED)  # bad configuration, which would be refused again; stopped on purpose, the state is saved


class ProtocolError(Exception):
    """What came is no message; one line."""


class RunEnded(Exception):
    """The run is over for this launcher; one line, without a final dot."""

    def __init__(self, line: str, exit_code: int) -> None:
        super().__init__(line)
        self.exit_code = exit_code


class VersionError(ProtocolError):
    """It is a message of a launcher of another version."""


@dataclass(frozen=True)
class About:
    """What a launcher says of itself when it comes.

    Attributes:
        member: what no other launcher has.
        host: name of its machine, for people.
        processes: that it will start.
        nodes_min, nodes_max, restarts: its options.
        run: name of the run, "" if none was given.
        command: script, its configuration and the name of the run, without the path of the code.
        settings: the other arguments, which machines of one run share too.
        torch, python, code: versions, and the digest of the source.
        epoch, round, failures: of the last round that it took part in, empty and 0 at first; failures until then.
    """

    member: str
    host: str
    processes: int
    nodes_min: int
    nodes_max: int
    restarts: int
    run: str
    command: str
    settings: str
    torch: str
    python: str
    code: str
    epoch: str = ""
    round: int = 0
    failures: int = 0

    def nodes(self) -> str:
        """As it is given to --nodes."""
        return str(self.nodes_max) if self.nodes_min == self.nodes_max else f"{self.nodes_min}:{self.nodes_max}"


@dataclass(frozen=True)
class State:
    """What a member does: ``waits`` for a round, ``runs`` this one, has ``finished`` it, or has ``failed`` in it.

    Attributes:
        is_: one of these; ``leaves`` when it goes for good.
        round: the last one that it took part in.
        rank, code: of the process that failed first, the code as the launcher would end with it.
        signal: that this launcher got, 0 if none.
    """

    is_: str
    round: int = 0
    rank: int = 0
    code: int = 0
    signal: int = 0


@dataclass(frozen=True)
class Order:
    """What a member is to do: ``wait``, ``start`` a round, ``stop`` what it runs, ``end``; ``later``: connect again.

    Attributes:
        epoch: of this coordinator, another one after it was started anew.
        text: for people; empty: nothing to say.
        heartbeat_s: how long silence may last.
        group_rank, group_size, first_rank, world_size, port, failures: of the round.
        own_address: where rank 0 is, for its own machine only; the others know by which address they came.
        gentle: let the processes save and leave, however long it takes.
        code: exit code of the end.
    """

    is_: str
    epoch: str = ""
    round: int = 0
    text: str = ""
    heartbeat_s: int = 15
    group_rank: int = 0
    group_size: int = 0
    first_rank: int = 0
    world_size: int = 0
    port: int = 0
    failures: int = 0
    own_address: str = ""
    gentle: bool = False
    code: int = 0


Message = About | State | Order
STATES = ("waits", "runs", "finished", "failed", "leaves")
ORDERS = ("wait", "start", "stop", "end", "later")


def encode(message: Message) -> bytes:
    """The line, with its end."""
    about = {name: _short(value) if isinstance(value, str) else value for name, value in asdict(message).items()}
    line = json.dumps({MAGIC: VERSION, "kind": type(message).__name__, **about}, separators=(",", ":"))
    return line.encode("ascii") + b"\n"


def decode(line: bytes, kind: type[Any]) -> Any:
    """The message of this kind in a line.

    Raises:
        ProtocolError: it is none, or of another version.
    """
    try:
        found = json.loads(line.decode("ascii")) if len(line) <= LINE_BYTES else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or MAGIC not in found:
        raise ProtocolError("no message of a launcher")
    if found[MAGIC] != VERSION or isinstance(found[MAGIC], bool):
        raise VersionError(f"protocol {_short(found[MAGIC], 20)}, not {VERSION}")
    if found.get("kind") != kind.__name__:
        raise ProtocolError(f"no {kind.__name__}")
    message = kind(**{one.name: _checked(found, one.name, one.type) for one in fields(kind)})
    known = {State: STATES, Order: ORDERS}.get(kind)
    if known is not None and message.is_ not in known:
        raise ProtocolError(f"no {kind.__name__}")
    return message


def _checked(found: Mapping[str, Any], name: str, kind: object) -> Any:
    """A field, of the type and the size that it should have."""
    value = found.get(name)
    if kind is str and isinstance(value, str):
        return _short(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST:
        return value
    raise ProtocolError(f"{name} is missing or of another type")


def _short(value: object, most: int = TEXT) -> str:
    """Text that may be printed on one line, whoever sent it."""
    return "".join(one if one.isprintable() else "?" for one in str(value)[:most])


def differences(other: About, own: About) -> list[str]:
    """What two launchers of one run must not differ in, and do: ``torch is not the same: 2.11.0 on b, 2.13.0 on a``."""
    pairs = {
        "--nodes": (other.nodes(), own.nodes()),
        "--restarts": (other.restarts, own.restarts),
        "torch": (other.torch, own.torch),
        "Python": (other.python, own.python),
        "code": (f"digest {other.code}", f"digest {own.code}"),
        "configuration": ("", "") if own.run else _of_one_only(other.settings, own.settings),
    }
    there, here = (other.host, own.host) if other.host != own.host else ("the machine that came", "the first one")
    found = [(name, theirs, ours) for name, (theirs, ours) in pairs.items() if theirs != ours]
    return [f"{name} is not the same: {theirs} on {there}, {ours} on {here}" for name, theirs, ours in found]


def _of_one_only(one: str, other: str) -> tuple[str, str]:
    """The words of two texts that only this and only that one has."""
    words, others = one.split(), other.split()
    left = " ".join(word for word in words if word not in others)
    right = " ".join(word for word in others if word not in words)
    if left or right or one == other:
        return left or "nothing", right or "nothing"
    return one, other  # in another order


def host_name() -> str:
    """This machine's name, for people; it need not be known to anybody."""
    return _short(socket.gethostname(), 64) or "unnamed"


def python_version() -> str:
    """Minor version: 3.11."""
    return ".".join(platform.python_version_tuple()[:2])
