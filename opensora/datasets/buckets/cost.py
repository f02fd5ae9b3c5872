"""What a micro-batch costs: seconds, or anything proportional to them, from its tokens.

    cost(B samples of L tokens) = per_batch + B (per_sample + per_token L + per_token2 L K)

with K the tokens that one attends to: L in a model whose tokens all meet, fewer where it keeps time and space apart,
as its family says (``Denoising.attention_pairs``). A transformer of width d multiplies 24 L d^2 + 4 L K d times per
layer and sample, which is L + L K / 6d up to scale: the default, with d of the 11B model.

``python -m opensora.cli.calibrate RUN_FOLDER`` fits the four numbers to a run's times. They belong to the
configuration, because the order of samples depends on them: a run must not change its own.

With ``parallel.mesh.dynamic`` the cost is that of a micro-batch whose samples are each cut for all p processes of the
ulysses axis. Where groups of d of them have n whole samples each, n = B d/p rounded up, it takes

    per_batch + p n (sample/d + per_token encode_tokens) + p per_token (exchange_tokens + exchange n L (d-1)/d^2)

with sample = per_sample + per_token L + per_token2 L K, and the last term where d > 1. Per layer 4 n L D (d-1)/d^2
elements are sent in forward and as many in backward: on one H100 node and with the 11B model that is 0.08 of the time
of the products at half the peak, and four exchanges of 30 us are as long as 90 tokens. T5-XXL takes 130 a prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from math import isfinite
from typing import ClassVar, TypeAlias

import numpy as np

from opensora.utils.limits import Limits

TEMPORAL_STRIDE = 4  # frames per latent frame after the first

Measure: TypeAlias = Callable[[int, int, int], tuple[int, int]]
# (frames, height, width) of a clip -> (its image tokens, the pairs of them that meet in attention)


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Time of a micro-batch; only ratios matter."""

    per_batch: float = 0.0  # of every micro-batch, however small
    per_sample: float = 0.0  # text tokens, mostly
    per_token: float = 1.0  # per image token
    per_token2: float = 1 / (6 * 3072)  # per pair of image tokens: attention
    exchange: float = 0.1  # with mesh.dynamic: what moving a token between processes takes, relative to per_token
    exchange_tokens: float = 100.0  # and what exchanges take however little they move, in tokens on one process
    encode_tokens: float = 0.0  # and a sample's autoencoder and text encoder on each process that has it, likewise

    LIMITS: ClassVar[Limits] = dict.fromkeys(
        ("per_batch", "per_sample", "per_token", "per_token2", "exchange", "exchange_tokens", "encode_tokens"),
        (1e12, "sums would lose the smaller terms"),
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: must be a number >= 0")
        if self.per_token + self.per_token2 == 0:
            raise ValueError("per_token=0: per_token2 is 0 too; a sample must cost more, the more tokens it has")

    @property
    def terms(self) -> np.ndarray:
        """(4,) the numbers that ``features`` are multiplied by."""
        return np.array([self.per_batch, self.per_sample, self.per_token, self.per_token2])

    def sample(self, tokens: int, pairs: int) -> float:
        """One sample of a micro-batch, of so many image tokens and pairs of them that meet."""
        return self.per_sample + self.per_token * tokens + self.per_token2 * tokens * (pairs / tokens)

    def batch(self, samples: int, tokens: int, pairs: int) -> float:
        """A micro-batch of ``samples`` such samples."""
        return self.per_batch + samples * self.sample(tokens, pairs)

    def shared(self, rows: np.ndarray, degree: int, whole: int) -> np.ndarray:
        """(n,) times of micro-batches, by their (n, 4) ``features``, divided among groups of ``degree`` processes."""
        samples, tokens, keys = rows[:, 1], rows[:, 2] / rows[:, 1], rows[:, 3] / rows[:, 2]
        most = largest_group(samples, degree, whole)
        # No product of matrices: its rounding may differ between machines, whose processes must choose alike.
        sample = self.per_sample + tokens * (self.per_token + keys * self.per_token2)
        alone = sample / degree + self.per_token * self.encode_tokens
        moved = np.zeros(len(rows))
        if degree > 1:
            moved = self.per_token * (self.exchange_tokens + self.exchange * most * tokens * (degree - 1) / degree**2)
        return self.per_batch + whole * (most * alone + moved)


def largest_group(samples: np.ndarray, degree: int, whole: int) -> np.ndarray:
    """(n,) most whole samples of each micro-batch that a group of ``degree`` of ``whole`` processes has."""
    return np.ceil(samples * degree / whole)


def features(samples: np.ndarray, tokens: np.ndarray, keys: np.ndarray | None = None) -> np.ndarray:
    """(n, 4) what the cost of micro-batches is linear in: 1, B, B L, B L K; ``keys``: K, all tokens if not given."""
    keys = tokens if keys is None else keys
    return np.stack([np.ones_like(tokens), samples, samples * tokens, samples * tokens * keys], axis=-1)


def fit(rows: np.ndarray, seconds: np.ndarray) -> CostConfig:
    """The cost, none of its numbers negative, whose relative errors are smallest in the mean square.

    Args:
        rows: (n, 4) sums of ``features``; ``seconds``: (n,) what each took, > 0.

    Raises:
        ValueError: the samples are of one length.
    """
    lengths = rows[:, 2] / rows[:, 1]  # mean tokens of a sample
    if len(rows) == 0 or np.ptp(lengths) < 0.05 * lengths.mean():
        raise ValueError("the samples have one length: the times need steps of several")
    scaled = rows / seconds[:, None]  # relative errors: sums of terms are to be 1
    best, least = None, np.inf
    # At most four terms: try every set of them that has a term in tokens, and keep the best without a negative one.
    for size in range(1, 5):
        for chosen in map(list, combinations(range(4), size)):
            part = scaled[:, chosen]
            units = np.abs(part).max(axis=0)  # terms differ by many powers of ten
            terms, _, rank, _ = np.linalg.lstsq(part / units, np.ones(len(rows)), rcond=None)
            terms = terms / units
            error = float(((part @ terms - 1) ** 2).sum())
            if rank == size and (terms >= 0).all() and error < least and max(chosen) >= 2:
                least, best = error, dict(zip(chosen, terms.tolist(), strict=True))
    assert best is not None  # per_token alone is always possible
    names = ("per_batch", "per_sample", "per_token", "per_token2")
    return CostConfig(**{name: best.get(number, 0.0) for number, name in enumerate(names)})


@dataclass(frozen=True)
class FullAttention:
    """The measure of a model whose image tokens all meet, behind a causal autoencoder of four frames a latent one."""

    spatial_multiple: int  # pixels one token spans on a side

    def __call__(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """See ``Measure``."""
        per_frame = (height // self.spatial_multiple) * (width // self.spatial_multiple)
        tokens = ((frames - 1) // TEMPORAL_STRIDE + 1) * per_frame
        return tokens, tokens * tokens
