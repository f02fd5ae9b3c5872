"""launch/setup.sh with a Python that plays: what goes wrong on machines of others, and what is said then.

The real thing, a fresh clone that is set up from the package index, is what runs before these tests do.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.patience import patience

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).resolve().parent.parent.parent
# A Python that makes environments with itself inside, and whose pip notes its arguments and does what $PIP_DOES says.
PLAYS = f"""#!/usr/bin/env bash
here="$(cd "$(dirname "$0")" && pwd)"
if [[ "$1 $2" == "-m venv" ]]; then
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && exit
fi
if [[ "$1 $2" == "-m pip" ]]; then
    echo "$*" >> "$CALLS"
    eval "${{PIP_DOES:-true}}"
    exit
fi
if [[ "$2" == *"import torch"* ]]; then exit 1; fi
if [[ "$2" == *ensurepip* ]]; then exit 0; fi
if [[ "$1" == -c && -n "${{OLD:-}}" ]]; then
    exec {sys.executable} -S -c "import sys; sys.version_info = (3, 9, 1); $2"
fi
exec {sys.executable} -S "$1" "${{2//, pip/}}" "${{@:3}}"
"""
STEPS = ["-r requirements.txt", "--editable", "-r requirements-test.txt", "--no-deps -r requirements-colossalai.txt"]


class Checkout:
    """A copy of what setup.sh reads, in a folder whose name has spaces."""

    def __init__(self, tmp_path: Path) -> None:
        self.root, self.calls = tmp_path / "a folder (1)", tmp_path / "calls"
        (self.root / "launch").mkdir(parents=True)
        for name in ("launch/setup.sh", "pyproject.toml", *(path.name for path in ROOT.glob("requirements*.txt"))):
            shutil.copy(ROOT / name, self.root / name)
        self.python = tmp_path / "some bin" / "python3"
        self.python.parent.mkdir()
        self.python.write_text(PLAYS)
        self.python.chmod(0o755)
        self.env = {"PATH": f"{self.python.parent}:{os.environ['PATH']}", "CALLS": str(self.calls), "HOME": "/tmp"}

    def start(self, how: str = "exec env --default-signal bash launch/setup.sh", **env: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            how,
            shell=True,
            cwd=self.root,
            env=self.env | env,
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def run(self, how: str = "exec bash launch/setup.sh", **env: str) -> tuple[int, str, list[str]]:
        """Exit code, what it said, and what was asked of pip."""
        self.calls.unlink(missing_ok=True)
        process = self.start(how, **env)
        out, err = process.communicate(timeout=60)
        calls = self.calls.read_text().replace(f"{self.root}/", "").splitlines() if self.calls.exists() else []
        return process.returncode, err + out, calls


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_users_get_the_product_and_tests_the_rest(checkout: Checkout) -> None:
    """In a path with spaces; a second call asks pip for nothing, a changed file for what it changes."""
    code, said, calls = checkout.run()
    assert code == 0 and len(calls) == 2 and all(step in call for step, call in zip(STEPS, calls, strict=False)), said
    assert checkout.run() == (0, "", [])
    code, _, calls = checkout.run(OPENSORA_TESTS="1")
    assert code == 0 and len(calls) == 2 and all(step in call for step, call in zip(STEPS[2:], calls, strict=True))
    assert checkout.run(OPENSORA_TESTS="1") == checkout.run() == (0, "", [])
    with (checkout.root / "requirements-test.txt").open("a") as file:
        file.write("another\n")
    assert checkout.run() == (0, "", [])
    assert len(checkout.run(OPENSORA_TESTS="1")[2]) == 2
    with (checkout.root / "requirements.txt").open("a") as file:
        file.write("another\n")
    assert len(checkout.run(OPENSORA_TESTS="1")[2]) == 4
    code, said, calls = checkout.run("bash -euc 'source launch/setup.sh; echo $PYTHON'")
    assert (code, said, calls) == (0, f"{checkout.root}/.venv/bin/python\n", [])


NO_TORCH = "ERROR: No matching distribution found for torch==2.13.0"
OS_ERROR = "ERROR: Could not install packages due to an OSError:"
FAILURES = {
    f"after connection broken by 'NewConnectionError': Failed\n{NO_TORCH}": "the package index was not reached",
    f"could not find torch (from versions: none)\n{NO_TORCH}": "the package index was not reached, or knows no torch",
    f"{NO_TORCH} (from -r": "the package index has no torch==2.13.0 for Python",
    f"{OS_ERROR} [Errno 28] No space left on device": "the disk is full",
    f"{OS_ERROR} [Errno 13] Permission denied: 'x'": "a file cannot be written",
    "ERROR: something else": "see the lines above",
}


@pytest.mark.parametrize("text", FAILURES)
def test_a_failure_of_pip_is_named(checkout: Checkout, text: str) -> None:
    """And the command can be repeated: what pip may have left in halves is built anew, the rest is kept."""
    code, said, _ = checkout.run(PIP_DOES=f"echo -e {shlex.quote(text)}; exit 1")
    assert code == 1 and text.splitlines()[-1][:30] in said
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [said.splitlines()[-1]]
    assert FAILURES[text] in said.splitlines()[-1]
    code, said, calls = checkout.run()
    assert code == 0 and len(calls) == 2
    assert ("built anew: an earlier set-up was interrupted" in said) == ("OSError" in text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_setup_is_done_again(checkout: Checkout, number: signal.Signals) -> None:
    process = checkout.start(PIP_DOES="exec sleep 300")
    deadline = time.monotonic() + patience(60)
    while not checkout.calls.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number and "interrupted; the same command begins anew" in said
    code, said, calls = checkout.run()
    assert code == 0 and len(calls) == 2 and ".venv is built anew: an earlier set-up was interrupted" in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_the_shell_alone_leaves_no_process(checkout: Checkout, number: signal.Signals) -> None:
    process = checkout.start(PIP_DOES="exec sleep 300")
    deadline = time.monotonic() + patience(60)
    while not checkout.calls.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)  # the pipe is closed when the last process has ended
    assert process.returncode == 128 + number and said.count("interrupted; the same command begins anew") == 1, said


def test_an_environment_whose_python_has_changed_is_built_anew(checkout: Checkout) -> None:
    checkout.run()
    python = checkout.root / ".venv/bin/python"
    for broken in ("#!/bin/sh\nexit 1\n", None):  # no pip beside it any more; a link to what was uninstalled
        python.unlink()
        python.write_text(broken) if broken else python.symlink_to("/no/such/python3.9")
        code, said, calls = checkout.run()
        assert code == 0 and len(calls) == 2 and "built anew: its Python is gone, was upgraded" in said
    other = checkout.python.parent / "other"
    other.write_text("#!/bin/sh\nif [ $1 = -c ]; then echo '(3, 12)'; fi\n")
    other.chmod(0o755)
    _, said, _ = checkout.run(OPENSORA_PYTHON=str(other))
    assert f"built anew: OPENSORA_PYTHON={other} is of another version" in said


def test_a_venv_on_another_disk_stays_there(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "big disk").mkdir()
    (checkout.root / ".venv").symlink_to(tmp_path / "big disk")
    assert checkout.run()[0] == 0
    (tmp_path / "big disk/.incomplete").touch()
    assert checkout.run()[0] == 0
    assert (checkout.root / ".venv").is_symlink() and (tmp_path / "big disk/bin/python").is_file()


def test_no_python_that_fits(checkout: Checkout) -> None:
    for name in ("python", "python3.14", "python3.13", "python3.12", "python3.11", "python3.10"):
        shutil.copy(checkout.python, checkout.python.parent / name)
    code, said, _ = checkout.run(OLD="1")
    assert code == 2 and said.startswith(
        "error: Python 3.10, 3.11, 3.12, 3.13 or 3.14 is needed; found: python3=3.9.1 "
    )
    code, said, _ = checkout.run(OPENSORA_PYTHON="/no/such/python")
    assert code == 2 and "found: none, as OPENSORA_PYTHON=/no/such/python." in said  # and not another one in its place
    assert not (checkout.root / ".venv").exists()


def test_a_failure_before_anyone_waits_for_it_is_a_failure(checkout: Checkout) -> None:
    """On a busy machine the set-up may have ended before the shell that started it comes to wait."""
    slowly = checkout.root / "slowly.sh"
    slowly.write_text('trap() { sleep 0.2; builtin trap "$@"; }')
    slow = {"BASH_ENV": str(slowly)}
    code, said, _ = checkout.run(OPENSORA_PYTHON="/no/such/python", **slow)
    assert code == 2 and said.startswith("error: Python 3.10") and not (checkout.root / ".venv").exists()
    source = "exec bash -c '. launch/setup.sh; echo status $?'"
    assert "status 2" in checkout.run(source, OPENSORA_PYTHON="/no/such/python", **slow)[1]


def test_two_at_once_take_turns(checkout: Checkout) -> None:
    if shutil.which("flock") is None:
        pytest.skip("flock is not installed")
    first = checkout.start(PIP_DOES="sleep 3")
    deadline = time.monotonic() + patience(60)
    while not checkout.calls.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    second = checkout.start()
    said = second.communicate(timeout=60)[1]
    assert first.communicate(timeout=60) and (first.returncode, second.returncode) == (0, 0)
    assert "another one is at work in this checkout" in said
    assert len(checkout.calls.read_text().splitlines()) == 2  # both were of the first


def test_what_cannot_be_written_and_who_is_no_bash(checkout: Checkout) -> None:
    (checkout.root / ".venv").write_text("a file")
    code, said, calls = checkout.run()
    assert code == 1 and f"error: {checkout.root}/.venv cannot be written" in said and not calls
    code, said, _ = checkout.run("sh launch/setup.sh") if not is_bash("sh") else (2, "bash launch/setup.sh", [])
    assert code == 2 and "bash launch/setup.sh" in said


def is_bash(shell: str) -> bool:
    return bool(subprocess.run([shell, "-c", "echo $BASH_VERSION"], capture_output=True, text=True).stdout.strip())


def test_a_full_disk_is_seen_before(checkout: Checkout) -> None:
    (checkout.python.parent / "df").write_text("#!/bin/sh\necho F B U A C M; echo x 9 9 102400 9% /\n")
    (checkout.python.parent / "df").chmod(0o755)
    code, said, calls = checkout.run()
    assert code == 1 and "error: 100 MB are free at " in said and not calls
