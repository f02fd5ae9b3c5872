"""Which steps of a diffusion chain are used: the grammar of ``timestep_respacing``. Standard library only.

As in improved-diffusion (arXiv:2102.09672): "" all; "100"; "10,20,30" of equal sections; "ddim50".
"""

from itertools import accumulate, repeat

DIFFUSION_STEPS = 1000  # of a chain, unless it says another number
DDIM = "ddim"  # before a number: steps that are equally far apart
GRAMMAR = "must be a number of steps as 100, numbers for equal sections as 10,20,30, ddimN as ddim50, or '' for all"


def spaced_count(spec: str) -> int | None:
    """How many steps ``spec`` chooses; None: all that there are.

    Raises:
        ValueError: it cannot be read.
    """
    if spec == "":
        return None
    counts = spec[len(DDIM) :].split(",", 1) if spec.startswith(DDIM) else spec.split(",")
    if spec.startswith(DDIM) and len(counts) > 1:
        raise ValueError(GRAMMAR)
    if not all(count.isascii() and count.strip().isdigit() and len(count.strip()) < 7 for count in counts):
        raise ValueError(GRAMMAR)
    if not all(int(count) for count in counts):
        raise ValueError(f"{GRAMMAR}; every number must be 1 or more")
    return sum(int(count) for count in counts)


def spaced_steps(spec: str, steps: int) -> tuple[int, ...]:
    """The numbers of the steps, rising, that ``spec`` chooses of a chain of ``steps``.

    "" all; "100" a hundred, from the first to the last; "10,20,30" the same of each of three equal sections; "ddim50"
    fifty that are equally far apart, by the least whole distance that gives so many.

    Raises:
        ValueError: it cannot be read, or there are not so many steps.
    """
    count = spaced_count(spec)
    if count is None:
        return tuple(range(steps))
    if spec.startswith(DDIM):
        strides = (range(0, steps, stride) for stride in range(1, steps + 1))
        for equal in strides:
            if len(equal) == count:
                return tuple(equal)
        raise ValueError(f"no whole distance between steps gives {count} of {steps}")
    sections = [int(part) for part in spec.split(",")]
    size, longer = divmod(steps, len(sections))
    chosen: list[int] = []
    start = 0
    for index, wanted in enumerate(sections):
        length = size + (index < longer)
        if wanted > length:
            raise ValueError(f"a section of {length} of the {steps} steps has no {wanted}")
        # Distances are added up one by one, as the published code does: halves may round differently otherwise.
        distance = (length - 1) / (wanted - 1) if wanted > 1 else 1.0
        offsets = accumulate(repeat(distance, wanted - 1), initial=0.0)
        chosen += [start + round(offset) for offset in offsets]
        start += length
    return tuple(chosen)
