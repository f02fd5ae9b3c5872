"""The launcher's variables: one place reads them, and refuses in one line what is no place in a group."""

import os
import random
import subprocess
import sys

import pytest

from acceleration.distributed.launcher_variables import (
    Ranks,
    candidate_ports,
    check_meeting,
    check_visible_devices,
    first_host,
    ranks_from_environment,
    rendezvous_from_environment,
    restart_count,
)
from acceleration.distributed.rendezvous import StartError
from opensora.utils.console import launched_rank
from opensora.utils.errors import one_line
from tests.conftest import ROOT

ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ONE = Ranks(0, 1, 0, "none")


def read(env: dict[str, str]) -> Ranks:
    ranks = ranks_from_environment(env)
    check_meeting(ranks, env)
    check_visible_devices(env)
    return ranks


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": "1", "LOCAL_RANK": ""},
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "h"},
        {"MASTER_PORT": ""},
        {"SLURM_PROCID": "3"},
        {"SLURM_PROCID": "", "SLURM_STEP_NUM_TASKS": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "GPU-5dd2a3f1-0a4b,MIG-5dd2/1/0"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"OMP_NUM_THREADS": "abc"},
    ],
)
def test_one_process(env: dict[str, str]) -> None:
    assert read(env) == ONE


def test_a_place_among_others() -> None:
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", **ADDRESS}
    assert read(env) == Ranks(5, 8, 1, "torchrun")
    assert read({"RANK": "0", "WORLD_SIZE": "1", **ADDRESS}) == Ranks(0, 1, 0, "torchrun")
    slurm = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n[3-5]"}
    assert read(slurm) == Ranks(2, 4, 0, "slurm")
    assert candidate_ports(5, {"MASTER_PORT": ""}) == candidate_ports(5, {}) and candidate_ports(
        5, {"MASTER_PORT": "5"}
    ) == [5]


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x: must be an integer from 0 to 1 with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0: must be an integer from 1"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE=-1: must be"),
        ({"RANK": "0", "WORLD_SIZE": "1e9"}, "WORLD_SIZE=1e9: must be"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, "WORLD_SIZE=999"),
        ({"RANK": "5", "WORLD_SIZE": "1"}, "RANK=5: must be an integer from 0 to 0"),
        ({"RANK": "٣", "WORLD_SIZE": "8"}, "RANK=٣: must be"),
        ({"RANK": "3"}, "RANK=3 without WORLD_SIZE"),
        ({"RANK": "x"}, "RANK=x without WORLD_SIZE"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: missing with WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT: missing"),
        ({"RANK": "0", "WORLD_SIZE": "2", **ADDRESS, "MASTER_ADDR": " "}, "MASTER_ADDR: missing"),
        ({"RANK": "0", "WORLD_SIZE": "2", **ADDRESS, "MASTER_PORT": "abc"}, "MASTER_PORT=abc: must be"),
        ({"RANK": "0", "WORLD_SIZE": "2", **ADDRESS, "MASTER_PORT": "0"}, "MASTER_PORT=0: must be"),
        ({"RANK": "0", "WORLD_SIZE": "2", **ADDRESS, "MASTER_PORT": "70000"}, "MASTER_PORT=70000: must be"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", **ADDRESS},
            "LOCAL_RANK=2: must be an integer from 0 to 1",
        ),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4", **ADDRESS}, "LOCAL_RANK=4"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4", **ADDRESS}, "LOCAL_WORLD_SIZE=4: must be"),
        ({"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=x: must be"),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=2: must be"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS=many: must be"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "-1"}, "SLURM_LOCALID=-1"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "x"}, "SLURM_JOB_ID=x"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_RESTART_COUNT": "x"}, "SLURM_RESTART_COUNT=x"),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "[["},
            "SLURM_STEP_NODELIST='\\[\\['",
        ),
        ({"CUDA_VISIBLE_DEVICES": "abc"}, "CUDA_VISIBLE_DEVICES=abc: must be"),
        ({"CUDA_VISIBLE_DEVICES": "0;1"}, "CUDA_VISIBLE_DEVICES=0;1: must be"),
    ],
)
def test_no_place_is_one_line_and_exit_code_2(env: dict[str, str], said: str) -> None:
    with pytest.raises(StartError, match=f"^{said}") as caught:
        read(env)
    assert caught.value.exit_code == 2 and one_line(str(caught.value)) == str(caught.value)


def test_first_hosts() -> None:
    assert [first_host(hosts) for hosts in ("n[3-5,9],m1", "a,b", "rack1n[001-004]x", "n3")] == [
        "n3",
        "a",
        "rack1n001x",
        "n3",
    ]


def test_any_environment_is_read_or_refused() -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    names += [f"SLURM_{name}" for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID", "JOB_ID", "RESTART_COUNT")]
    names += ["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "CUDA_VISIBLE_DEVICES"]
    values = [
        "",
        " ",
        "0",
        "1",
        "2",
        "-1",
        "x",
        "1.0",
        "٣",
        "²",
        "\x1b[31m",
        "9" * 5000,
        "n[1-",
        "n1,n2",
        "\udcff",
        "a b",
    ]
    rng = random.Random(0)
    outcomes = set()
    for _ in range(5000):
        env = {name: rng.choice(values) for name in names if rng.random() < 0.7}
        try:
            ranks = read(env)
            rendezvous_from_environment(env)
            restart_count(env)
        except StartError as error:
            outcomes.add("refused")
            assert error.exit_code == 2 and len(str(error)) < 400
        else:
            outcomes.add("read")
            assert 0 <= ranks.rank < ranks.world_size
    assert outcomes == {"read", "refused"}


def test_who_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    said = {
        ("3", None, None): 3,
        ("x", None, None): 0,
        ("", None, None): 0,
        ("", "2", "4"): 2,
        (None, "2", "4"): 2,
        (None, "2", None): 0,
        ("1", "2", "4"): 1,
        ("²", None, None): 0,
    }
    for values, rank in said.items():
        for name, value in zip(names, values, strict=True):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        assert launched_rank() == rank, values


def test_a_command_says_it_in_one_line() -> None:
    program = (
        "from acceleration.distributed import runtime\nfrom opensora.cli.main import run_cli\n"
        "run_cli(lambda _: print(runtime.start(5)) or runtime.stop())"
    )
    cases = (
        {"RANK": "x", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"GLOO_SOCKET_IFNAME": "nothere0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env={**clean, "PYTHONPATH": str(ROOT), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for env in cases
    ]
    done = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [2, 2, 2, 0]
    said = ("error: RANK=x:", "error: MASTER_ADDR: missing", "error: GLOO_SOCKET_IFNAME=nothere0: no such network")
    for (_, err), start in zip(done, said, strict=False):
        assert err.startswith(start) and err.count("\n") == 1, err
    assert "world_size=1" in done[3][0]


@pytest.mark.parametrize("value", ["x", "", "-1", "²", "9" * 30])
def test_a_launcher_that_none_of_ours_wrote_is_no_launcher(value: str) -> None:
    """In a process of its own: signals are remembered once and for all."""
    program = "from opensora.utils import signal_handler; signal_handler.install()"
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none", "OPENSORA_LAUNCHER_PID": value}
    done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
