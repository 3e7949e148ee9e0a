"""The smallest size at which each sized fault is named wherever it is planted: halved until it is not.

python benchmarks/detection_floor.py HALVINGS [FAULT ...]
"""

import sys

from stages.progress import Progress
from stages.selftest.faults import FAULTS
from stages.selftest.options import SelftestOptions
from stages.selftest.run import selftest


def main(halvings: int, names: list[str]) -> None:
    alive = tuple(fault for fault in FAULTS.values() if fault.size is not None and fault.name in (names or FAULTS))
    print(f"{'fault':34} {'size':>10} {'named':>10} {'least ratio':>12}")
    with Progress() as progress:
        for step in range(halvings + 1):
            options = SelftestOptions(alive, clean=0, scale=2.0**-step)
            document = selftest(options, progress)
            for kind in document["kinds"]:
                ratio = kind["least_ratio"] or 0.0
                share = f"{kind['named']} of {kind['planted']}"
                print(f"{kind['kind']:34} {kind['size']:10.3g} {share:>10} {ratio:12.3g}", flush=True)
            named = {kind["kind"] for kind in document["kinds"] if kind["named"] == kind["planted"]}
            alive = tuple(fault for fault in alive if fault.name in named)
            if not alive:
                return


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
