"""Errors of exchanges, as gloo and NCCL have them, and which of them mean that another process is gone."""

import pytest

from acceleration.diagnostics.lost_peers import PeerLost, lost_peer, naming_lost_peers
from acceleration.distributed.peers import Peer
from acceleration.distributed.runtime import Runtime

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
CLOSED = f"{GLOO}pair.cc:553] Connection closed by peer [10.77.0.2]:64647. This is typically caused by a remote worker"
RESET = f"{GLOO}pair.cc:534] Read error [10.77.0.2]:5222: Connection reset by peer"
LATE = f"{GLOO}unbound_buffer.cc:85] Timed out waiting 60000ms for recv operation to complete"
NCCL = "NCCL error in: NCCLUtils.hpp:268, remote process exited or there was a network error, NCCL version 2.27.3"


def peers(*hosts: str) -> tuple[Peer, ...]:
    return tuple(
        Peer(rank=i, world_size=len(hosts), host_id=host, host=host, address=f"10.77.0.{ord(host) - 96}")
        for i, host in enumerate(hosts)
    )


@pytest.mark.parametrize(
    ("text", "hosts", "named"),
    [
        (CLOSED, "ab", "host b (10.77.0.2; rank 1) has ended or is cut off"),
        (RESET, "aabb", "host b (10.77.0.2; rank 2-3) has ended"),
        (CLOSED, "bb", "rank 1 has ended"),  # on this host, whose processes share an address
        (CLOSED, "bbb", "another process has ended"),
        (CLOSED, "", "another process has ended"),
        (NCCL, "ab", "rank 1 has ended"),
        (LATE, "abc", "another process has not answered"),
    ],
)
def test_who_is_gone(text: str, hosts: str, named: str) -> None:
    said = lost_peer(text, peers(*hosts), 0)
    assert said is not None and said.startswith(named) and "\n" not in said and "/pytorch" not in said


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory",
        "The size of tensor a (3) must match the size of tensor b (4)",
        "connection closed by peer",  # of something else, such as a data server
        "[/pytorch/third_party/gloo/gloo/allreduce.cc:10] buffers differ in size",
        "",
    ],
)
def test_other_errors_stay_what_they_are(text: str) -> None:
    assert lost_peer(text, peers(*"ab"), 0) is None


def test_the_line_and_the_exit_code() -> None:
    runtime = Runtime(0, 2, 0, None, peers(*"ab"))  # type: ignore[arg-type]
    said = r"^rank 0 on \S+, step 3: host b \(10\.77\.0\.2; rank 1\)"
    with pytest.raises(PeerLost, match=said) as caught, naming_lost_peers(runtime, "step 3"):
        raise RuntimeError(CLOSED)
    assert caught.value.exit_code == 1
    with pytest.raises(ValueError, match="other"), naming_lost_peers(runtime, "step 3"):
        raise ValueError("other")
