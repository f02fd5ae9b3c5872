"""Memory of engines that cut the state by themselves: DeepSpeed and ColossalAI, by their own accounts of it.

Bytes per parameter by ZeRO stage (arXiv:1910.02054), with fp32 masters and a cut over all processes:

=====  =======================  ================================  ===========  ==============================
stage  weights that compute     gradients                         masters      moments, moving average
=====  =======================  ================================  ===========  ==============================
0      whole, the masters       whole                             (the same)   whole
1      whole, in compute type   whole                             1/n          1/n
2      whole, in compute type   1/n                               1/n          1/n
3      1/n, in compute type     1/n                               1/n          1/n
=====  =======================  ================================  ===========  ==============================

Beside these are the buffers in which exchanges are bundled, at the sizes that the vendors set by default; a bundle is
never larger than the model. A bound from above: all parts are taken to be largest at the same time.
"""

from collections.abc import Sequence
from math import prod

from acceleration.accounting.activation_memory import Segment, Timeline
from acceleration.accounting.model_profile import ModelProfile, ShardUnit
from acceleration.accounting.peak_memory import MOMENTS, Footprint
from acceleration.accounting.rank_layout import RankLayout
from acceleration.config import OptimConfig

FP32 = 4
# Values in a bundle. DeepSpeed: reduce_bucket_size and allgather_bucket_size, two of the former as it overlaps them;
# with ZeRO 3 stage3_max_live_parameters and stage3_prefetch_bucket_size. ColossalAI: reduce_bucket_size_in_m, and with
# ZeRO 3 two chunks.
DEEPSPEED_BUCKET, DEEPSPEED_LIVE, COLOSSALAI_BUCKET = 5 * 10**8, 10**9 + 5 * 10**7, 12 * 2**20
GEMINI_CHUNK = 32 * 2**20  # min_chunk_size_m, of ColossalAI with ZeRO 3


def state_of(structure: ModelProfile, place: RankLayout, optim: OptimConfig, frozen: int = 0) -> Footprint:
    """What a process keeps on its device between steps, and its gradients."""
    count, world, zero = structure.count, place.mesh.world_size, place.cfg.zero
    piece = count if zero == 0 else -(-count // world)
    compute = place.itemsize("compute")
    on_device = place.cfg.offload == "none"
    if zero == 0:
        weights = count * compute
        state = weights
    else:
        weights = (piece if zero == 3 else count) * compute + piece * FP32 * on_device
        state = piece * FP32
    accumulated = compute if place.cfg.engine == "colossalai" or zero == 0 else FP32
    gradients = (count if zero < 2 else piece) * accumulated
    return Footprint(
        weights=weights,
        optimizer=state * MOMENTS[optim.kind] * on_device,
        ema=state * bool(optim.ema_decay) * on_device,
        gradients=gradients,
        gathered=0,
        buffers=0,
        activations=0,
        frozen=frozen,
    )


def peak(
    structure: ModelProfile,
    place: RankLayout,
    optim: OptimConfig,
    line: Timeline,
    *,
    batches: int = 1,
    frozen: int = 0,
) -> Footprint:
    """The most that a process holds in a step; ``line``: of one micro-batch."""
    state, zero, compute = state_of(structure, place, optim, frozen), place.cfg.zero, place.itemsize("compute")
    count, is_deepspeed = structure.count, place.cfg.engine == "deepspeed"
    live = DEEPSPEED_LIVE if is_deepspeed else 2 * max(GEMINI_CHUNK, *map(_values, structure.units))
    gathered = min(count, live) * compute if zero == 3 else 0
    bucket = min(count, DEEPSPEED_BUCKET if is_deepspeed else COLOSSALAI_BUCKET)
    bundles = 2 if is_deepspeed and zero else 1  # one is filled while another is sent
    wide = max(compute, place.itemsize("reduce"))
    if zero == 0:
        bucket = count  # gradients lie in the bundles of torch's DDP, or are flattened for DeepSpeed
    return Footprint(
        **vars(state) | {"gathered": gathered, "buffers": bundles * bucket * wide, "activations": _highest(line)}
    )


def _values(unit: ShardUnit) -> int:
    return sum(prod(parameter.shape) for parameter in unit.parameters)


def _highest(line: Timeline) -> int:
    parts: Sequence[Segment] = (line.before, *line.forward, line.between, *line.backward, line.after)
    return max(part.peak for part in parts)
