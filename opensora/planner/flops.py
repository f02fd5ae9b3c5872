"""Floating-point operations of a transformer; a multiplication with its addition counts as two."""


def linear_flops(inputs: int, outputs: int, rows: int) -> int:
    """Forward of a linear layer."""
    return 2 * inputs * outputs * rows


def attention_flops(queries: int, keys: int, hidden: int) -> int:
    """Forward of attention of one sequence, all heads together: scores, and weighted values."""
    return 4 * queries * keys * hidden


def training_flops(forward: int) -> int:
    """Forward and backward: for every product in forward backward has two. Recomputation is not counted."""
    return 3 * forward


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: the share of ``peak`` (FLOP/s) that model FLOPs alone would take."""
    return flops / seconds / peak
