"""What may be configured of step caches, a class per kind: ``sampling.cache``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from opensora.utils.limits import Limits, check_limits

MOST = 1e9  # of a calibrated number, either way
_CHANGE = (1e6, "nothing would ever be computed again")
_COUNT = (10_000, "no clip takes more steps, and no model has more blocks")


def _check_threshold(owner: Any) -> None:
    check_limits(owner)
    if not owner.threshold >= 0:
        raise ValueError(f"threshold={owner.threshold}: must be a number >= 0; 0 computes wherever anything changes")


@dataclass(frozen=True, kw_only=True)
class NoCache:
    """Every step computes every block."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache:
    """First-block cache (ParaAttention): reuse what the other blocks did while the first one does about the same."""

    kind: Literal["first_block"] = "first_block"
    threshold: float = 0.05  # largest change of what the first block adds, relative to the last step computed in full

    LIMITS: ClassVar[Limits] = {"threshold": _CHANGE}

    def __post_init__(self) -> None:
        _check_threshold(self)


@dataclass(frozen=True, kw_only=True)
class DBCache:
    """DBCache (cache-dit): the first-block cache with several blocks in front and behind that always run."""

    kind: Literal["dbcache"] = "dbcache"
    threshold: float = 0.08  # change of what the first blocks add, below which the middle ones are reused
    first_blocks: int = 8  # that always run, and whose change decides
    last_blocks: int = 0  # that always run
    warmup_steps: int = 8  # first steps, which compute everything
    max_reuses: int = 0  # of a clip; 0: no limit
    max_in_a_row: int = 0  # reuses between two steps that compute everything; 0: no limit

    LIMITS: ClassVar[Limits] = {
        "threshold": _CHANGE,
        **dict.fromkeys(("first_blocks", "last_blocks", "warmup_steps", "max_reuses", "max_in_a_row"), _COUNT),
    }

    def __post_init__(self) -> None:
        _check_threshold(self)
        for name, least in (("first_blocks", 1), ("last_blocks", 0), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= {least}")
        for name in ("max_reuses", "max_in_a_row"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 0; 0 sets no limit")


# Published polynomials of TeaCache, highest power first (https://github.com/ali-vilab/TeaCache).
TEACACHE_COEFFICIENTS: dict[str, tuple[float, ...]] = {
    "flux": (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    "hunyuan_video": (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
}


@dataclass(frozen=True, kw_only=True)
class TeaCache:
    """TeaCache (arXiv:2411.19108): reuse until the changes of the first block's input, rescaled, add up to enough."""

    kind: Literal["teacache"] = "teacache"
    threshold: float = 0.25  # on the sum of rescaled changes; Flux: 0.25 is about 1.5 times as fast, 0.6 twice
    published: Literal["flux", "hunyuan_video"] | None = None  # whose polynomial rescales a change; null: that of flux
    coefficients: tuple[float, ...] | None = None  # of a polynomial of one's own, highest power first

    LIMITS: ClassVar[Limits] = {"threshold": _CHANGE}

    def __post_init__(self) -> None:
        _check_threshold(self)
        if self.coefficients is not None and self.published is not None:
            raise ValueError(f"published={self.published}: must be null where coefficients are given")
        if self.coefficients is not None and not (self.coefficients and all(abs(c) <= MOST for c in self.coefficients)):
            raise ValueError(f"coefficients: must be numbers of at most {MOST:g}, or null for published ones")

    @property
    def polynomial(self) -> tuple[float, ...]:
        """Coefficients, highest power first."""
        return self.coefficients or TEACACHE_COEFFICIENTS[self.published or "flux"]


@dataclass(frozen=True, kw_only=True)
class MagCache:
    """MagCache (arXiv:2506.09045): reuse while calibrated sizes of what the blocks add say that little changes."""

    kind: Literal["magcache"] = "magcache"
    ratios: tuple[float, ...]
    # calibrated: the size of what the blocks add in a step, relative to the step before; benchmarks/step_caches.py
    # measures them. Clips of another number of steps take the nearest one
    threshold: float = 0.06  # largest error that reuses in a row add up to
    max_in_a_row: int = 3  # reuses between two steps that compute everything
    retention: float = 0.2  # share of the steps at the start that compute everything

    LIMITS: ClassVar[Limits] = {"threshold": _CHANGE, "max_in_a_row": _COUNT}

    def __post_init__(self) -> None:
        _check_threshold(self)
        if not self.ratios or not all(0 < ratio <= MOST for ratio in self.ratios):
            raise ValueError(f"ratios: must be numbers > 0 and at most {MOST:g}, one per step of a calibrated run")
        if self.max_in_a_row < 1:
            raise ValueError(f"max_in_a_row={self.max_in_a_row}: must be an integer >= 1; kind=none reuses nothing")
        if not 0 <= self.retention <= 1:
            raise ValueError(f"retention={self.retention}: must be a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class PyramidAttentionBroadcast:
    """Pyramid attention broadcast (arXiv:2408.12588): attention is computed every few steps, by what it runs along."""

    kind: Literal["pyramid_attention"] = "pyramid_attention"
    spatial: int = 2  # attention over the whole sequence, or within a frame, is computed once in so many steps
    temporal: int = 4  # along time
    cross: int = 6  # over the text
    time_range: tuple[float, float] = (100.0, 800.0)  # times, of 1000 at pure noise, between which it is reused

    LIMITS: ClassVar[Limits] = dict.fromkeys(("spatial", "temporal", "cross"), _COUNT)

    def __post_init__(self) -> None:
        check_limits(self)
        for name in ("spatial", "temporal", "cross"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be an integer >= 1; 1 computes in every step")
        low, high = self.time_range
        if not 0 <= low < high <= 1000:
            raise ValueError(f"time_range={[low, high]}: must be two rising numbers from 0 to 1000")


CacheConfig: TypeAlias = NoCache | FirstBlockCache | DBCache | TeaCache | MagCache | PyramidAttentionBroadcast
CACHE_CONFIGS: Mapping[str, type] = {
    "none": NoCache,
    "first_block": FirstBlockCache,
    "dbcache": DBCache,
    "teacache": TeaCache,
    "magcache": MagCache,
    "pyramid_attention": PyramidAttentionBroadcast,
}
