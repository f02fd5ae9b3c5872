"""Print how far every layout is from one process: ``python -m tests.layout_table [part of a layout's name ...]``.

Largest relative differences, in fp64, over all processes and three SGD steps: of the loss, of any parameter's gradient,
of the norm that clipping uses, of the weights afterwards. ``SUM`` says how many layouts are within 1e-10.
"""

import json
import sys
import time

from tests.dist.harness import DistributedFailure, run_distributed
from tests.dist.layouts import Layout, every_layout
from tests.dist.test_parity import TOLERANCE, errors, on_one_process, on_this_layout

COLUMNS = ("loss", "gradients", "norm", "weights")


def main(names: list[str]) -> int:
    """Returns 1 if any layout is further away than the tolerance, or failed."""
    layouts = [layout for layout in every_layout() if not names or any(name in str(layout) for name in names)]
    truth = on_one_process()
    print(f"{'layout':<44}" + "".join(f"{column:>11}" for column in COLUMNS) + f"{'s':>7}", flush=True)
    worst = {column: 0.0 for column in COLUMNS}
    bad = []
    for layout in layouts:
        started = time.monotonic()
        try:
            row = compare(layout, truth)
        except DistributedFailure as error:
            bad.append(layout)
            print(f"{layout!s:<44} failed: {str(error).splitlines()[-1]}", flush=True)
            continue
        if max(row.values()) > TOLERANCE:
            bad.append(layout)
        worst = {column: max(worst[column], row[column]) for column in COLUMNS}
        figures = "".join(f"{row[column]:>11.1e}" for column in COLUMNS)
        print(f"{layout!s:<44}{figures}{time.monotonic() - started:>7.1f}", flush=True)
    print(f"SUM {len(layouts) - len(bad)} of {len(layouts)} layouts within {TOLERANCE:.0e}")
    print(json.dumps({"benchmark": "layout_table", "layouts": len(layouts), "bad": list(map(str, bad)), **worst}))
    return int(bool(bad))


def compare(layout: Layout, truth: object) -> dict[str, float]:
    """The largest differences by kind, over all processes."""
    results = run_distributed(on_this_layout, layout.world, layout.config, timeout=180)
    found = [errors(result, truth) for result in results]  # type: ignore[arg-type]
    return {column: max(one[column] for one in found) for column in COLUMNS}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
