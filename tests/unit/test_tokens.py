import pytest
import torch

from opensora.utils.tokens import image_ids, pack, unpack


def test_unpack_undoes_pack() -> None:
    latents = torch.randn(2, 3, 5, 4, 6)
    tokens = pack(latents, 2)
    assert tokens.shape == (2, 5 * 2 * 3, 3 * 4)
    assert torch.equal(unpack(tokens, (5, 4, 6), 2), latents)


def test_a_token_holds_the_patch_at_its_id() -> None:
    latents = torch.randn(1, 3, 2, 4, 6)
    tokens, ids = pack(latents, 2), image_ids((2, 4, 6), 2)
    assert ids.shape == (12, 3) and ids.dtype == torch.float32
    for token, (t, h, w) in zip(tokens[0], ids.int().tolist(), strict=True):
        assert torch.equal(token, latents[0, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].reshape(-1))  # c, ph, pw


def test_time_is_the_slowest_axis() -> None:
    assert image_ids((2, 1, 2), 1).tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]


def test_sizes_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="multiples of patch=2"):
        pack(torch.zeros(1, 1, 1, 3, 4), 2)
