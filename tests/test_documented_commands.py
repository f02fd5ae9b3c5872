"""What the README, the docs and docstrings tell people to type: all of it is known to ``tests.documented_commands``."""

import pytest

from tests.documented_commands import Found, collect, main, small, unknown, why_not


def test_every_command_is_run_or_has_a_reason() -> None:
    commands = collect()
    texts = {found.text for found in commands}
    assert {"bash launch/demo.sh", "python -m opensora.cli.plot outputs/first"} <= texts
    assert len(commands) > 60
    assert [(found.place, small(found.text)) for found in unknown(commands)] == []


def test_what_no_rule_knows_is_found() -> None:
    assert unknown([Found("python -m opensora.cli.plot FOLDER", "README.md")])
    assert not unknown([Found("python -m opensora.cli.plot outputs/first", "README.md")])
    assert why_not("RUN=outputs/first sbatch launch/slurm.sbatch") and not why_not("bash launch/demo.sh")


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_command_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["documented_commands"])
    assert main() == 0
