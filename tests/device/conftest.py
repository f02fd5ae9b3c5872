"""Where the device can be simulated."""

import pytest
import torch
from torch.utils import backend_registration


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = None
    if torch.cuda.is_available():
        reason = "this machine has a CUDA device: run -m gpu"
    elif not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        reason = f"torch {torch.__version__} knows no backends in Python"
    for item in items:
        if reason and "tests/device/" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=reason))
