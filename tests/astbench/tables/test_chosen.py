"""Tables of analyses."""

import json

import pytest

from astbench.errors import DataError
from astbench.tables.pages.chosen import tables
from astbench.tables.records import Entry, Group, Run
from astbench.tables.repeat import repeat


def analysed(folder, name, mass):
    place = folder / name
    place.mkdir()
    layers = {
        f"layers.{i}": {
            "kept": [0.2, 0.4],
            "mass": [mass, mass + 0.1 * i],
            "best": [0.9, 0.9],
            "overlap_of_neighbours": 0.5,
            "overlap_of_heads": 0.25 * i,
        }
        for i in (1, 2)
    }
    (place / "analysis.json").write_text(json.dumps({"layers": layers}))
    attention = {"name": "pooled_topk", "block_size": 16}
    return Run("g", name, place, {"config": {"attention": attention}}, Entry("0", said=name))


def test_means_over_layers_and_heads(tmp_path):
    runs = (analysed(tmp_path, "worse", 0.5), analysed(tmp_path, "better", 0.7))
    (table,) = tables(Group("g", "chosen", "Title", "", (), (), {}, runs, {}), {})
    assert [row.cells for row in table.rows] == [
        ("`pooled_topk`, better", "0.300", "0.775", "0.900", "0.125", "0.50", "0.38"),
        ("`pooled_topk`, worse", "0.300", "0.575", "0.900", "0.325", "0.50", "0.38"),
    ]
    (runs[0].folder / "analysis.json").unlink()
    with pytest.raises(DataError, match=r"analysis\.json"):
        tables(Group("g", "chosen", "Title", "", (), (), {}, runs, {}), {})


def test_the_command_that_repeats_one_is_analyze():
    config = {
        "attention": {"name": "local", "window": 8},
        "task": {"name": "triviaqa"},
        "data": {"source": "demo"},
        "optim": {},
        "backbone": {},
        "trainer": {},
        "seed_everything": 0,
    }
    record = {"command": "validate", "config": config, "analysis": {"batches": 2, "rows": 32}}
    again = repeat(Run("g", "a", None, record, Entry("0")), [])
    assert (
        again.line() == "astbench analyze --attention=local --task=triviaqa --attention.window=8 --batches=2 --rows=32"
    )
