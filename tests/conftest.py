"""What every test shares."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_media() -> Path:
    """A folder of real clips (clips/, captions.csv, images/, edge_cases/), which the repository does not hold."""
    folder = Path(os.environ.get("OPENSORA_MEDIA", ROOT.parent / "shared" / "media"))
    if not (folder / "captions.csv").is_file():
        pytest.skip(f"no real clips at {folder}; set OPENSORA_MEDIA to a folder with captions.csv and clips/")
    return folder
