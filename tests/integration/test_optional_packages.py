"""Optional packages by the commands that use them; see ``tests.optional_packages``."""

from importlib.util import find_spec

import pytest

from tests import optional_packages
from tests.optional_packages import CASES, Cannot, Case, Place

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return optional_packages.make_place(tmp_path_factory.mktemp("packages"))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_its_command_runs(place: Place, case: Case) -> None:
    try:
        optional_packages.version(case.name)
        case.run(place)
    except Cannot as why:
        pytest.skip(str(why))


@pytest.mark.slow
def test_one_command_with_all_that_go_together(place: Place) -> None:
    """ColossalAI trains on frames by decord, and what it says goes to wandb and TensorBoard."""
    absent = [name for name in ("colossalai", "decord", "wandb") if find_spec(name) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not installed: OPENSORA_TESTS=1 bash launch/setup.sh")
    options = ("parallel.engine=colossalai parallel.zero=0", "data.decoder=decord", "log.wandb=offline")
    run = place.train("together", *options, "log.tensorboard=true", "train.steps=4", "train.checkpoint_every=2")
    assert (run / "exported").is_dir() and (run / "checkpoints").is_dir()
    assert list((run / "wandb").glob("offline-run-*/*.wandb")) and list((run / "tensorboard").iterdir())


def test_what_does_not_run_is_found(place: Place) -> None:
    """A table of results that cannot fail would show nothing."""
    with pytest.raises(optional_packages.Failed, match=r"exit code 2: error: data\.decoder='cv2': must be"):
        place.train("refused", "data.decoder=cv2", processes=1)
