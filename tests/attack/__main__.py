"""Try, for a while, what must hold whatever somebody does to it: `python -m tests.attack --seconds=600 --only=A,C`.

Each kind of trial gets an equal share of the time. A trial draws what it does from its seed alone, so the command that
is printed for one that does not hold repeats it, unless the moment of a signal decided.
"""

import argparse
import os
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.attack import damage, endings, limits, lost, numerics, trust
from tests.attack.commands import Broken, preload
from tests.attack.runs import Shared

KINDS = {
    "A": ("other people's files run no code", trust.trial),
    "B": ("no run is lost", lost.trial),
    "C": ("damage is refused or said", damage.trial),
    "D": ("time and memory are bounded", limits.trial),
    "E": ("one line and a documented code", endings.trial),
    "F": ("finite wherever dense is", numerics.trial),
}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="for all kinds together")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, such as A,C")
    parser.add_argument("--seed", type=int, default=1, help="of what is drawn")
    parser.add_argument("--trial", type=int, help="this one of each kind alone")
    asked = parser.parse_args()
    kinds = asked.only.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--only={asked.only}: no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    preload()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        counts, broken = attack(kinds, asked, Path(folder))
    print(f"{'kind':<36} {'trials':>6} {'held':>6}")
    for kind, (tried, held) in counts.items():
        print(f"{kind} {KINDS[kind][0]:<34} {tried:>6} {held:>6}")
    for kind, number, what in broken:
        print(f"{what}\n    python -m tests.attack --only={kind} --seed={asked.seed} --trial={number}")
    return int(bool(broken))


def attack(kinds, asked, folder):
    """Trials of each kind and how many held, and (kind, number, what was found) of those that did not."""
    counts, broken = {}, []
    (folder / "shared").mkdir()
    shared = Shared(folder / "shared")
    for place, kind in enumerate(kinds):
        ends = time.monotonic() + (asked.seconds - _spent()) / (len(kinds) - place)
        number, tried, held = asked.trial or 0, 0, 0
        while not tried or (asked.trial is None and time.monotonic() < ends):
            what = one(kind, asked.seed, number, folder, shared)
            tried, held = tried + 1, held + (what is None)
            if what is not None:
                broken.append((kind, number, f"{kind} {number}: {what}"))
                print(broken[-1][-1], file=sys.stderr, flush=True)
            number += 1
        counts[kind] = (tried, held)
    return counts, broken


def one(kind, seed, number, folder, shared):
    """What does not hold in a trial, in one line; None if all does."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{kind}{number}-", ignore_cleanup_errors=True) as own:
        try:
            KINDS[kind][1](random.Random(f"{seed} {kind} {number}"), Path(own), shared)
        except Broken as error:
            return " ".join(str(error).split())
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({where.filename}:{where.lineno})"
    return None


BEGAN = time.monotonic()


def _spent():
    return time.monotonic() - BEGAN


if __name__ == "__main__":
    sys.exit(main())
