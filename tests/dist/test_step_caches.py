"""Step caches on any layout: the latents and the decisions of one process, in fp64 to 1e-10, and no process waits.

What a cache computes is held to formulas in tests/unit/test_step_caches.py; here the truth is the same code on one
process. Data-parallel groups work on other clips and decide otherwise, while ZeRO 3 gathers weights over all of them.
"""

from functools import cache

import pytest
from torch import Tensor

from acceleration.distributed import mesh as meshes
from tests.dist.harness import run_distributed
from tests.dist.parity import TOLERANCE, relative
from tests.dist.step_caches import (
    CACHES,
    FACTORED,
    FACTORED_CACHES,
    MODEL,
    Choices,
    Layout,
    gathered,
    option,
    sampled,
    with_references,
)

BLOCKS = ("first_block", "teacache", "dbcache")
ALL = tuple(name for name in CACHES if name != "none")
Found = dict[str, dict[int, tuple[Tensor, Choices]]]


@cache
def truth(factored: bool = False) -> Found:
    """Every cache on one process, for the clips of both groups."""
    names = tuple(FACTORED_CACHES) if factored else tuple(CACHES)
    found: Found = run_distributed(sampled, 1, Layout(), names, FACTORED if factored else MODEL, (0, 1))[0]
    return found


def check(world: int, layout: Layout, names: tuple[str, ...], *, factored: bool = False) -> None:
    degrees, model = dict(layout.degrees), FACTORED if factored else MODEL
    results = run_distributed(sampled, world, layout, names, model, timeout=100)
    whole = meshes.resolve(meshes.MeshConfig(**degrees), world)
    for rank, found in enumerate(results):
        cfg = meshes.coordinates(whole, rank)["cfg"]
        for name in names:
            for group, (latents, choices) in found[name].items():
                expected, decided = truth(factored)[name][group]
                assert relative(latents, expected) <= TOLERANCE, (layout, rank, name)
                # A process without a pass of its own repeats one, to gather along; what it makes of it is thrown away.
                own = {number for number, *_ in decided if number % whole["cfg"] == cfg}
                assert of(choices, own) == of(decided, own), (layout, rank, name)


def of(choices: Choices, passes: set[int]) -> Choices:
    return [choice for choice in choices if choice[0] in passes]


QUICK: dict[int, list[tuple[Layout, tuple[str, ...]]]] = {
    2: [
        (Layout((("shard", 2),)), (*BLOCKS, "pyramid_attention")),
        (Layout((("cfg", 2),)), BLOCKS),
        (Layout((("ulysses", 2),)), ("first_block", "pyramid_attention")),
        (Layout((("ring", 2),)), ("teacache",)),
        (Layout((("tensor", 2),)), ("teacache", "dbcache")),
    ],
    4: [(Layout((("shard", 2), ("cfg", 2))), BLOCKS), (Layout((("ring", 2), ("ulysses", 2))), ("first_block",))],
}
SLOW: dict[int, list[Layout]] = {
    2: [Layout(((axis, 2),), zero) for axis in ("shard", "ulysses", "ring", "tensor", "cfg") for zero in (0, 2, 3)]
    + [Layout((("shard", 2),), 3, prefetch=2), Layout((("replicate", 2), ("shard", 1)), 3)],
    3: [Layout((("ulysses", 3),)), Layout((("ring", 3),))],
    4: [
        Layout(((a, 2), (b, 2)))
        for a, b in (
            ("shard", "cfg"),
            ("shard", "ulysses"),
            ("shard", "ring"),
            ("shard", "tensor"),
            ("cfg", "ulysses"),
            ("cfg", "tensor"),
            ("ring", "ulysses"),
            ("ulysses", "tensor"),
        )
    ]
    + [Layout((("shard", 2), ("cfg", 2)), 3, prefetch=1), Layout((("replicate", 2), ("shard", 1), ("ulysses", 2)), 3)],
}


def name_of(world: int, layout: Layout) -> str:
    degrees = "-".join(f"{axis}{degree}" for axis, degree in layout.degrees)
    return f"{world}-{degrees}-zero{layout.zero}-prefetch{layout.prefetch}"


@pytest.mark.parametrize(
    ("world", "layout", "names"),
    [pytest.param(world, *case, id=name_of(world, case[0])) for world, cases in QUICK.items() for case in cases],
)
def test_layouts_decide_and_sample_as_one_process(world: int, layout: Layout, names: tuple[str, ...]) -> None:
    check(world, layout, names)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world", "layout"),
    [pytest.param(world, case, id=name_of(world, case)) for world, cases in SLOW.items() for case in cases],
)
def test_every_layout_decides_and_samples_as_one_process(world: int, layout: Layout) -> None:
    check(world, layout, ALL)


@cache
def three_passes() -> dict[str, tuple[Tensor, Choices]]:
    found: dict[str, tuple[Tensor, Choices]] = run_distributed(with_references, 1, Layout(), ALL)[0]
    return found


@pytest.mark.parametrize(
    ("world", "degrees"),
    [
        (3, (("cfg", 3),)),
        pytest.param(2, (("cfg", 2),), marks=pytest.mark.slow),
        pytest.param(4, (("shard", 1), ("cfg", 2), ("ulysses", 2)), marks=pytest.mark.slow),
    ],
)
def test_three_passes_over_two_or_three_processes(world: int, degrees: tuple[tuple[str, int], ...]) -> None:
    """Each process decides for its own pass; over two, one of them works on two and the other repeats one."""
    cfg = dict(degrees)["cfg"]
    whole = meshes.resolve(meshes.MeshConfig(**dict(degrees)), world)
    for rank, found in enumerate(run_distributed(with_references, world, Layout(degrees), ALL, timeout=100)):
        for name, (tokens, choices) in found.items():
            expected, decided = three_passes()[name]
            assert relative(tokens, expected) <= TOLERANCE, (rank, name)
            own = {number for number in range(3) if number % cfg == meshes.coordinates(whole, rank)["cfg"]}
            assert own and of(choices, own) == of(decided, own), (rank, name)


@pytest.mark.parametrize("degrees", [(("ulysses", 2),), (("shard", 2),)])
def test_a_model_that_keeps_time_and_space_apart(degrees: tuple[tuple[str, int], ...]) -> None:
    check(2, Layout(degrees), ("first_block", "pyramid_attention"), factored=True)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["shard", "ulysses", "ring", "tensor", "cfg"])
def test_every_layout_of_a_model_that_keeps_time_and_space_apart(axis: str) -> None:
    check(2, Layout(((axis, 2),)), tuple(FACTORED_CACHES), factored=True)


def test_weights_are_gathered_where_somebody_computes() -> None:
    """Over both groups of ZeRO 3: the bytes of every process are those of the evaluations that any of them computes."""
    ranks = run_distributed(gathered, 2, timeout=100)
    (_, first, middle, _), evaluations = ranks[0], len(ranks[0][3])
    computed = sum(any(both) for both in zip(ranks[0][3], ranks[1][3], strict=True))
    assert 0 < computed < evaluations and ranks[0][3] != ranks[1][3]
    for sent, *_ in ranks:
        assert sent == evaluations * first + computed * middle


@pytest.mark.parametrize("factored", [False, True])
def test_the_clips_decide_otherwise(factored: bool) -> None:
    """Else the layouts above would show nothing: groups, and passes, part ways, and each both computes and reuses."""
    part_ways = []
    for name in ("first_block", "dbcache") if factored else BLOCKS:
        by_group = [choices for _, choices in truth(factored)[name].values()]
        ways = [[computed for *_, computed in choices] for choices in by_group]
        assert ways[0] != ways[1] and {*ways[0]} == {*ways[1]} == {True, False}, name
        for choices in by_group:
            prompted, unprompted = ([by for number, *_, by in choices if number == one] for one in (0, 1))
            part_ways.append(prompted[: len(unprompted)] != unprompted)
    assert any(part_ways)


def test_without_a_cache_nothing_changes() -> None:
    plain = truth()["none"][0][0]
    assert truth()["none"][0][1] == [] and option("none", MODEL).cache.kind == "none"
    assert all(relative(truth()[name][0][0], plain) > 1e-3 for name in ALL)
