"""What a sweep's file expands to, and what it refuses."""

from pathlib import Path

import pytest

from astbench.errors import ConfigError
from astbench.sweeps.spec import expand, read_sweep


@pytest.fixture
def sweep(tmp_path):
    def write(text, profile=None):
        (tmp_path / "s.yaml").write_text(text)
        return read_sweep(tmp_path / "s.yaml", profile)

    return write


def names(sweep):
    return [cell.name for cell in expand(sweep)[0]]


def test_cells_are_the_product_of_the_axes(sweep):
    found = sweep("options: {task: triviaqa}\naxes: {attention: [ast, dense], optim.lr: [0.1, 1e-3], seed: [0, 1]}\n")
    cells, notes = expand(found)
    assert len(cells) == 8 and notes == []
    assert cells[0].name == "ast-lr0.1-seed0" and cells[-1].name == "dense-lr1e-3-seed1"
    assert cells[0].words(["./a.py"]) == [
        "fit",
        "--task=triviaqa",
        "--attention=ast",
        "--optim.lr=0.1",
        "--seed=0",
        "--plugins=./a.py",
        "--run_dir=runs/s/ast-lr0.1-seed0",
    ]


def test_groups_and_dotted_options_say_the_same(sweep):
    one = sweep("options: {trainer: {max_steps: 3}, attention: {name: ast, top_k: 2}}\naxes: {seed: [0]}\n")
    other = sweep("options: {trainer.max_steps: 3, attention: ast, attention.top_k: 2}\naxes: {seed_everything: [0]}\n")
    assert one.options == other.options
    assert expand(one)[0][0].options == expand(other)[0][0].options


def test_an_option_goes_to_the_attentions_that_have_it(sweep):
    found = sweep("axes: {attention: [dense, ast], attention.density: [0.25, 0.5], seed: [0, 1]}\n")
    cells, notes = expand(found)
    assert [cell.name for cell in cells] == [
        "dense-seed0",
        "dense-seed1",
        "ast-density0.25-seed0",
        "ast-density0.25-seed1",
        "ast-density0.5-seed0",
        "ast-density0.5-seed1",
    ]
    assert notes == ["attention.density is not for dense"]
    assert "attention.density" not in cells[0].options
    with pytest.raises(ConfigError, match=r"no attention of the sweep takes attention.densty \(ast, dense\)"):
        expand(sweep("options: {attention.densty: 1}\naxes: {attention: [dense, ast]}\n"))


def test_a_value_may_set_several_options_and_have_a_name(sweep):
    text = """
axes:
  attention:
    - {attention: ast, attention.block_size: 64, as: blocks of 64}
    - {attention: ast, attention: dense, as: plain}
"""
    with pytest.raises(ConfigError, match="stands twice"):
        sweep(text)
    found = sweep(text.replace("attention: ast, attention: dense", "attention: dense"))
    assert names(found) == ["blocks-of-64", "plain"]
    twice = sweep("axes: {attention: [{attention: ast, as: x/1}, {attention: dense, as: x-1}]}\n")
    with pytest.raises(ConfigError, match="two cells are called x-1"):
        expand(twice)


def test_a_value_may_bring_a_config(sweep):
    text = "config: a.yaml\naxes: {task: [{config: b/c.yaml, data.length: 3}, {config: [d.yaml], as: short}]}\n"
    cells, _ = expand(sweep(text))
    assert [cell.name for cell in cells] == ["c-length3", "short"]
    assert cells[0].words()[:4] == ["fit", "--config=a.yaml", "--config=b/c.yaml", "--data.length=3"]
    assert cells[1].configs == ("a.yaml", "d.yaml")


def test_exclusions_take_lists(sweep):
    text = "axes: {attention: [ast, dense], seed: [0, 1, 2]}\nexclude: [{attention: dense, seed: [1, 2]}]\n"
    assert names(sweep(text)) == ["ast-seed0", "ast-seed1", "ast-seed2", "dense-seed0"]
    assert expand(sweep(text))[1] == ["2 of 6 combinations are excluded"]
    idle = expand(sweep("axes: {seed: [0, 1]}\nexclude: [{sede: 1}]\n"))[1]
    assert idle == ['exclude {"sede": 1} matches nothing']
    with pytest.raises(ConfigError, match="exclude leaves no cell"):
        expand(sweep("axes: {seed: [1]}\nexclude: [{seed: 1}]\n"))


def test_profiles_lie_over_the_file(sweep):
    text = """
folder: results/x
options: {trainer.max_steps: 100, task: mqar}
axes: {attention: [ast, dense], seed: [0, 1, 2]}
profiles:
  quick: {options: {trainer.max_steps: 3}, axes: {seed: [0]}}
  full: {}
"""
    quick = sweep(text, "quick")
    assert quick.folder == Path("results/x-quick") and quick.options == {"trainer.max_steps": 3, "task": "mqar"}
    assert names(quick) == ["ast-seed0", "dense-seed0"] and len(names(sweep(text, "full"))) == 6
    for profile, message in ((None, "choose one with --profile: quick, full"), ("fast", "it has: quick, full")):
        with pytest.raises(ConfigError, match=message):
            sweep(text, profile)


def test_a_bench_has_no_groups(sweep):
    found = sweep("command: bench\naxes: {attention: [ast], options: [{options: {ast: {top_k: 3}}, as: k3}]}\n")
    (cell,), _ = expand(found)
    assert cell.name == "ast-k3" and '--options={"ast": {"top_k": 3}}' in cell.words()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "must be a mapping with some of command, config"),
        ("axes: {seed: [2020-01-01]}", "axes.seed.seed must be text, a number, a list or a mapping, got 2020-01-01"),
        ("axes: {optim.lr: [.nan]}", "axes.optim.lr.optim.lr must be text, a number"),
        ("axes: {seed: [{seed: 1, as: logs}]}", "no cell may be called logs"),
        ("axes: {seed: [{seed: 1, as: ' ..'}]}", "leaves no name for a folder"),
        ("axes: {seed: [{seed: 1, as: null}]}", "`as` must be a name, got 'None'"),
        ("axes: {a: [{seed: 1, as: x}], b: [{seed: 2, as: y}]}", "axes.a and axes.b both set seed; leave it to one"),
        ("axes: {a: [{seed: 1, as: x}, {seed: 1, as: y}]}", "x and y are the same run; leave one out"),
        ("options: {seed: 1, seed_everything: 2}\naxes: {optim.lr: [1]}", "options sets seed twice"),
        ("axes: {a: [{seed: 1, as: x}, {seed: 2, as: X}]}", "two cells are called X"),
        ("profiles: {../x: {}}\naxes: {seed: [0]}", "profiles must be a mapping of simple names"),
        ("axes: {}", "has no axes"),
        ("axes: {seed: 3}", "axes.seed must be a list of values, got '3'"),
        ("axes: {seed: []}", "axes.seed must be a list of values"),
        ("axes: {seed: [1, 1]}", "two values called seed1"),
        ("axes: [1]", "axes must be a mapping"),
        ("command: predict\naxes: {seed: [0]}", "command must be one of fit, validate, test, bench, got 'predict'"),
        ("cells: {}", "takes no 'cells'; it takes command"),
        ("folder: 3\naxes: {seed: [0]}", "folder must be the name of a folder, got '3'"),
        ("options: {run_dir: x}\naxes: {seed: [0]}", "options takes no run_dir: the sweep gives it"),
        ("options: {plugins: [x]}\naxes: {seed: [0]}", "astbench run --plugins=FILE"),
        ("options: {'a b': x}\naxes: {seed: [0]}", "holds 'a b', which is no option"),
        ("options: {'--seed x': 1}\naxes: {seed: [0]}", "which is no option"),
        ("config: {a: 1}\naxes: {seed: [0]}", "config must be a file or a list of files"),
        ("exclude: {a: 1}\naxes: {seed: [0]}", "exclude must be a list"),
        ("profiles: [a]\naxes: {seed: [0]}", "profiles must be a mapping"),
        ("axes: {seed: [0]}\naxes: {seed: [0]}", "stands twice"),
        ("axes: {seed: [0", "cannot be read"),
        (f"axes: {{seed: {list(range(101))}, a: {list(range(100))}}}", "10,100 cells, more than 10,000"),
    ],
)
def test_refusals_name_the_key(sweep, text, message):
    with pytest.raises(ConfigError) as refused:
        expand(sweep(text))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_sweep(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_sweep(tmp_path)


def test_names_are_safe_as_folders(sweep):
    found = sweep("axes: {data.path: ['../../etc', /tmp/x y], seed: [0]}\n")
    assert names(found) == ["path..-..-etc-seed0", "path-tmp-x-y-seed0"]
    assert all(cell.folder.parent == found.folder for cell in expand(found)[0])
    assert names(sweep("axes: {seed: [{seed: 1, as: ä}, {seed: 2, as: ö}]}\n")) == ["ä", "ö"]
    long = names(sweep(f"axes: {{data.path: [{'a' * 300}, {'a' * 301}]}}\n"))
    assert len({*long}) == 2 and all(len(name) < 100 for name in long)


def test_fields_that_are_no_options_are_dropped(sweep):
    """`moba` has the fields of its base class, and a `density` that nobody can set."""
    cells, notes = expand(sweep("axes: {attention: [ast, moba], attention.density: [0.25, 0.5]}\n"))
    assert [cell.name for cell in cells] == ["ast-density0.25", "ast-density0.5", "moba"]
    assert notes == ["attention.density is not for moba"]


def test_a_profile_may_be_a_number(sweep):
    assert sweep("axes: {seed: [0]}\nprofiles: {1: {}}\n", "1").folder == Path("runs/s-1")
