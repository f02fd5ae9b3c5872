"""The project's text features, each compared with the formulas before it is used."""

import torch

from opensora.models.text.bytes import ByteTextConfig, ByteTextEncoder
from tests.reference.encoders import ByteText, Text

FP32 = 2e-5  # what fp32 may differ from fp64, of features of unit variance


class CheckedText:
    """Features as a run reads them, in the rounding of the library that computes them."""

    def __init__(self, truth: ByteText) -> None:
        self._truth = truth
        self._encoder = ByteTextEncoder(ByteTextConfig(**vars(truth)))

    def encode(self, prompt: str) -> Text:
        found, truth = self._encoder.encode([prompt]), self._truth.encode(prompt)
        rows = found.txt[0]
        if found.mask is not None:
            assert not rows[~found.mask[0]].any()
            rows = rows[found.mask[0]]
        for features, exact in ((rows, truth.rows), (found.y_vec[0], truth.vec)):
            assert features.shape == exact.shape, prompt
            assert torch.allclose(features.double(), exact, rtol=0, atol=FP32), prompt
        return Text(rows, found.y_vec[0])
