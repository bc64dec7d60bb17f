"""Tables of adaptive depth: shares of operations, and scores against the full depth."""

import pytest

from astbench.errors import DataError
from astbench.tables.pages.depth import tables
from astbench.tables.records import Group
from tests.astbench.tables.test_sweeps import ITEMS, moved, run


def deep(folder, policy, seed, scores, spent, paths=1, **options):
    one = run(folder, "dense", f"{policy}{spent}{seed}", scores)
    one.record["seed"] = seed
    one.record["config"] |= {"seed_everything": seed, "depth": {"name": policy, **options}}
    one.record["depth"] = {"name": policy, "mean_layers": spent, "share": spent / 3, "paths": paths}
    return one


def of(*runs):
    return tables(Group("g", "depth", "Title", "", (), (), {}, tuple(runs), {}), {})[0]


def test_each_is_compared_with_the_full_depth(tmp_path):
    full = [deep(tmp_path, "static", seed, moved(seed), 3, layers=3) for seed in (0, 1)]
    two = [deep(tmp_path, "static", seed, moved(seed - 9), 2, layers=2) for seed in (0, 1)]
    learned = [deep(tmp_path, "transformer_inverse", seed, moved(seed - 4), 2 + seed / 10, 1 + seed) for seed in (0, 1)]
    found = of(*learned, *two, *full)
    cells = [row.cells for row in found.rows]
    assert [row[0] for row in cells] == ["`static`, layers 3", "`transformer_inverse`", "`static`, layers 2"]
    assert [row[1:3] for row in cells] == [("1.000", "1"), ("0.683", "1 to 2"), ("0.667", "1")]
    assert [row[3:5] for row in cells] == [("70.50", "± 6.35 (2)"), ("66.50", "± 6.35 (2)"), ("61.50", "± 6.35 (2)")]
    assert [row[5] for row in cells] == ["", "-4.0 (-4.0 to -4.0)", "-9.0 (-9.0 to -9.0)"]
    assert len(found.rows[1].runs) == 2


def test_what_it_cannot_show_is_said(tmp_path):
    learned = deep(tmp_path, "transformer_inverse", 0, ITEMS, 2)
    with pytest.raises(DataError, match="one setting of the full depth, static; there are 0"):
        of(learned)
    with pytest.raises(DataError, match="ran without --depth"):
        of(run(tmp_path, "dense", 0, ITEMS))
