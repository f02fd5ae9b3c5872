"""The generators that docs/training.md documents, by values that must never change: runs are resumed with them."""

import numpy as np
import pytest
import torch

from opensora.datasets.plan import counter_rng
from opensora.utils import rng
from tests.reference import draws

KEYS: dict[tuple[int | str, ...], int] = {
    ("a",): 2111865749659688570,
    (7, 3, 12, "noise"): 8065981336347627641,
    (0, "init", "img_in.weight"): 3117911427839528155,
    ("byte text encoder", 0, "shared.weight"): 5577838030087271384,
}
NOISE = (7, 3, 12, "noise")


@pytest.mark.parametrize("parts", KEYS)
def test_keys(parts: tuple[int | str, ...]) -> None:
    assert draws.key(*parts) == rng.derive_key(*parts) == KEYS[parts]


def test_parts_are_told_apart() -> None:
    keys = [draws.key(*parts) for parts in (("a", "bc"), ("ab", "c"), ("abc",), (1, 2), (12,), ("1", 2), ("1", "2"))]
    assert len(set(keys)) == len(keys)


def test_generators() -> None:
    """torch's for tensors, Philox for single numbers."""
    golden = torch.tensor([-0.15449672937393188, 1.6432806253433228, 1.1335208415985107])
    for found in (draws.normal((3,), *NOISE), torch.randn(3, generator=rng.torch_generator(*NOISE))):
        assert torch.equal(found, golden)
    assert draws.philox(*NOISE).random() == rng.numpy_generator(*NOISE).random() == 0.8221034035440546


def test_columns() -> None:
    """A number for a sample, and where a permutation sends it."""
    assert draws.uniform(12, 7, 0, "crop left") == counter_rng.uniform(np.array([12]), 7, 0, "crop left")[0]
    assert draws.uniform(12, 7, 0, "crop left") == 0.11367727603583411
    assert draws.below(100, 12, 7, 0, "crop left") == counter_rng.integer(12, 100, 7, 0, "crop left") == 11
    golden = [3, 10, 0, 9, 2, 4, 7, 6, 1, 5, 8]
    assert [draws.permuted(i, 11, draws.key("p")) for i in range(11)] == golden
    assert counter_rng.permuted(np.arange(11), 11, draws.key("p")).tolist() == golden


def test_splitmix64_is_the_published_sequence() -> None:
    """Of seed 0, as in the implementation of its authors."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [draws.splitmix64(0, number) for number in range(3)] == published
