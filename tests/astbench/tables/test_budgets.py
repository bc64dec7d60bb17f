"""What settings took: columns that are there where a record holds them, and benches of the very same attention."""

import copy

import pytest

from astbench.tables.pages import benches
from astbench.tables.pages.budgets import benched
from astbench.tables.pages.sweeps import tables
from astbench.tables.records import Entry, Group, Run
from tests.astbench.tables.test_sweeps import ITEMS, group, run

FLOPS = {
    "training": {"model": 8e12, "attention": 2e12, "choosing": 5e11, "tokens": 4096, "counted": 8, "of": 64},
    "evaluation": {"model": 3e9, "attention": 1e9, "choosing": 0, "tokens": 512, "counted": 8, "of": 64},
}


def took(*runs, groups=None):
    """Rows of all tables but the first by column."""
    found = {}
    for table in tables(group(*runs), groups or {})[1:]:
        for row in table.rows:
            found.setdefault(row.cells[0], {}).update(zip(table.head[1:], row.cells[1:], strict=True))
    return found


def with_flops(one, flops):
    one.record["flops"] = copy.deepcopy(flops)
    return one


def test_records_from_before_have_no_such_columns(tmp_path):
    found = took(run(tmp_path, "dense", 0, ITEMS), run(tmp_path, "ast", 0, ITEMS))
    assert list(found["`dense`"]) == [
        "parameters", "the attention's own", "steps", "training, s", "peak memory, MiB"
    ]  # fmt: skip


def test_operations_and_tokens_are_means_over_the_seeds(tmp_path):
    twice = copy.deepcopy(FLOPS)
    twice["training"] = {**FLOPS["training"], "model": 12e12, "tokens": 8192, "choosing": None}
    old = run(tmp_path, "dense", 0, ITEMS)
    found = took(old, *(with_flops(run(tmp_path, "ast", seed, ITEMS), f) for seed, f in ((0, FLOPS), (1, twice))))
    ast = found["`ast`"]
    assert ast["tokens trained on"] == "6,144" and ast["training"] == "12"
    assert ast["training: the attention's"] == "2" and ast["evaluation"] == "0.004"
    assert "training: choosing" not in ast, "of one seed nobody knows it"
    assert {found["`dense`"][head] for head in list(ast)[5:]} == {""}


def bench(times, **more):
    """Cells of dense and of `ast` at these lengths: `{length: (seconds of dense, of ast)}`."""
    cells = [
        {"attention": name, "length": length, "training": {"seconds": [seconds], "peak_bytes": 1}}
        for length, pair in times.items()
        for name, seconds in zip(("dense", "ast"), pair, strict=True)
    ]
    config = {"pattern": "causal_self", "options": {"ast": {"block_size": 16}}, "densities": [], **more}
    record = {"command": "bench", "config": config, "cells": cells}
    found = Run("b", "one", None, record, Entry("0"))
    return {"b": Group("b", "speed", "Benches", "", (), tuple(times), {}, (found,), {})}


TIMES = {1024: (1.0, 2.0), 4096: (16.0, 8.0), 16384: (256.0, 64.0)}


def test_a_bench_of_the_same_attention_stands_beside_it(tmp_path):
    runs = [run(tmp_path, "dense", 0, ITEMS), run(tmp_path, "ast", 0, ITEMS, block_size=16)]
    ast = took(*runs, groups=bench(TIMES))["`ast`"]
    assert ast["layer's training step: times as fast as dense"] == "4.00 at 16,384"
    assert ast["faster from, tokens"] == "2,048" and ast["slower at, tokens"] == "1,024"


@pytest.mark.parametrize(
    "groups",
    [
        bench(TIMES, options={"ast": {"block_size": 32}}),
        bench(TIMES, pattern="bidirectional_self"),
        bench(TIMES, options={"ast": {"gone": 1}}),
    ],
    ids=["other options", "another mask", "options of another version"],
)
def test_of_another_attention_there_is_none(tmp_path, groups):
    assert benched(run(tmp_path, "ast", 0, ITEMS, block_size=16), groups) is None


@pytest.mark.parametrize(
    ("times", "faster", "slower"),
    [
        (TIMES, "2,048", "1,024"),
        ({1024: (1.0, 2.0), 4096: (1.0, 2.0)}, "never", "1,024, 4,096"),
        ({1024: (2.0, 1.0), 4096: (2.0, 1.0)}, "every length", "none"),
        ({1024: (2.0, 1.0), 4096: (1.0, 2.0)}, "now and then", "4,096"),
    ],
)
def test_a_page_of_speeds(times, faster, slower):
    groups = bench(times)
    (table,) = benches.speed(groups["b"], groups)
    assert table.head[-2:] == ("faster from, tokens", "slower at, tokens")
    assert [row.cells[-2:] for row in table.rows] == [(faster, slower)]
