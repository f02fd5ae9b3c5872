"""The script of mutations says what is so, every row of its table can be made, and every mistake is found."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.mutations import TABLE, Mutation, Stale, edit, verdict

KEYS, TEST = "opensora/utils/rng.py", "tests/reference/test_draws.py"  # a test of a second or two


def run(*names: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.mutations", *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=timeout,
    )


def test_every_row_can_be_made() -> None:
    assert len({row.name for row in TABLE}) == len(TABLE)
    for row in TABLE:
        text = (ROOT / row.file).read_text()
        assert text.count(row.old) == 1 and row.old != row.new, f"{row.name}: {row.old!r} in {row.file}; mend this row"
        if row.file.endswith(".py"):
            compile(text.replace(row.old, row.new), row.file, "exec")
        file, _, test = row.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(), row.test


def test_a_row_that_fits_no_more_is_an_error() -> None:
    for old, new in (("no such line", "x"), ("digest", "x"), ("import hashlib", "import hashlib")):
        with pytest.raises(Stale, match="mend this row"):
            edit(Mutation("stale", KEYS, old, new, TEST), ROOT)


def test_verdicts() -> None:
    """Without a mistake, with one that changes nothing, with one that matters, and with a program that cannot run."""
    assert verdict(TEST).passed
    same = verdict(TEST, mutation=Mutation("same", KEYS, "digest_size=8", "digest_size=2 * 4", TEST))
    assert same.passed
    wrong = verdict(TEST, mutation=Mutation("wrong", KEYS, '"little"', '"big"', TEST))
    assert not wrong.passed and wrong.by_assertion and "2111865749659688570" in wrong.message
    broken = verdict(TEST, mutation=Mutation("broken", KEYS, "digest_size=8", "digest_size=unknown", TEST))
    assert not broken.passed and not broken.by_assertion


@pytest.mark.slow
def test_the_command() -> None:
    done = run("weights drawn twice as large", timeout=110)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " killed " in done.stdout and done.stdout.endswith("1 of 1 mistakes found\n")


def test_an_unknown_name_is_refused() -> None:
    done = run("no such mistake", timeout=60)
    assert done.returncode == 2 and "no such mutation" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_mistake_is_found() -> None:
    done = run(timeout=5400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{len(TABLE)} of {len(TABLE)} mistakes found\n")
