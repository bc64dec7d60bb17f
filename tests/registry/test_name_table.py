"""What the registries of attentions, transforms and tasks share."""

from dataclasses import dataclass, make_dataclass
from importlib import metadata

import pytest

from astbench_registry import PluginError, plugins
from astbench_registry.errors import RegistryError
from astbench_registry.name_table import NameTable, did_you_mean, require_defaults


@dataclass(frozen=True)
class Row:
    name: str
    source: str
    target: str


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(plugins, "_tables", [])
    builtin = {"zulu": lambda: Row("zulu", "astbench", "m:Z"), "alfa": lambda: Row("alfa", "astbench", "m:A")}
    return NameTable("pet", "astbench.pets", builtin, Row, RegistryError)


def test_rows_are_listed_in_order(table):
    table.add("mike", Row("mike", "mine.py", "mine:M"))
    assert list(table.rows()) == ["alfa", "mike", "zulu"]
    by_table = NameTable("pet", "astbench.pets", table.builtin, Row, RegistryError, alphabetical=False)
    assert list(by_table.rows()) == ["zulu", "alfa"]


def test_a_name_has_one_source(table):
    with pytest.raises(PluginError, match=r"pet 'alfa' is registered twice: by astbench and by mine.py; rename one"):
        table.add("alfa", Row("alfa", "mine.py", "mine:A"))
    table.add("mike", Row("mike", "mine.py", "mine:M"))
    table.add("mike", Row("mike", "mine.py", "mine:M2"))
    assert table.load("mike").target == "mine:M2", "the same file may register it anew"
    with pytest.raises(PluginError, match=r"by mine.py and by other.py"):
        table.add("mike", Row("mike", "other.py", "other:M"))


def test_unknown_names_name_the_nearest(table):
    with pytest.raises(RegistryError, match=r"unknown pet 'zulo'; did you mean 'zulu'\? registered: alfa, zulu"):
        table.load("zulo")
    assert did_you_mean("x", ["alfa"]) == ";"


def test_an_entry_point_must_register_its_name(table, monkeypatch):
    entry = metadata.EntryPoint("mike", "json:JSONDecoder", "astbench.pets")
    monkeypatch.setattr(plugins, "_entry_points", lambda group, path: {"mike": [entry]})
    assert table.rows()["mike"].target == "json:JSONDecoder"
    with pytest.raises(PluginError, match=r"json:JSONDecoder must carry @register_pet\('mike', ...\)"):
        table.load("mike")


def test_what_a_plugin_raises_is_told_under_its_name(table):
    table.add("mike", Row("mike", "mine.py", "mine:M"))

    def broken():
        raise KeyError("lost")

    with pytest.raises(PluginError, match=r"pet 'mike' from mine.py cannot be built: KeyError: 'lost'"):
        table.build("mike", broken)
    with pytest.raises(KeyError):
        table.build("alfa", broken)  # ours: a defect, with its traceback


def test_options_need_defaults():
    with pytest.raises(PluginError, match=r"pet: config fields without a default: \['size'\]"):
        require_defaults("pet", make_dataclass("Config", [("size", int), ("name", str, "x")]))
