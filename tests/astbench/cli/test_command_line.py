"""One way in: however an option is written, every command reads the same, and every file is read once."""

import builtins
import io
from pathlib import Path

import pytest
import yaml

from astbench.cli import main
from astbench.cli.command_line import read_command_line
from astbench.cli.names import read_names
from astbench.errors import ConfigError
from tests.astbench.cli.test_cli import assert_refused


@pytest.fixture
def resolved(capsys, monkeypatch, fresh_registry):
    """`resolved(*words)` -> what `--print_config` prints, as data."""
    monkeypatch.setattr("sys.argv", ["astbench"])

    def run(command, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            code = main([command, *words, "--print_config"])
            pytest.fail(f"exit code {code}: {capsys.readouterr().err}")
        assert not end.value.code
        lines = capsys.readouterr().out.splitlines()
        return yaml.safe_load("\n".join(line for line in lines if " replaces " not in line))  # the note on files

    return run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a writer of YAML files."""
    monkeypatch.chdir(tmp_path)

    def write(name, **options):
        Path(name).write_text(yaml.safe_dump(options))
        return name

    return write


# -- a space is as good as an equals sign -----------------------------------------------------------------------------


def test_describe_takes_values_behind_a_space(astbench):
    for words in (
        ["ast", "--attention.density", "0.125"],
        ["--attention.density", "0.125", "ast"],
        ["ast", "--attention", "{density: 0.125}"],
        ["ast", "--attention.density=125e-3"],
    ):
        done = astbench("describe", *words)
        assert done.code == 0, done.err
        assert "default 0.25, here 0.125" in done.out


def test_describe_explains_with_values_behind_a_space(astbench):
    with_equals = astbench("describe", "ast", "--explain", "N=4096", "--attention.block_size=64")
    with_space = astbench("describe", "--attention.block_size", "64", "--explain", "ast", "N=4096")
    assert with_space.code == 0, with_space.err
    assert with_space.out == with_equals.out


def test_check_takes_values_behind_a_space(astbench):
    done = astbench("check", "dense", "--attention.backend", "sdpa_math")
    assert done.code == 0, done.err
    assert_refused(astbench("check", "ast", "--attention.density", "0.25", "moba"), 2, "name just one")
    assert_refused(astbench("check", "local", "--attention.window", "0"), 2, "at least 1 key, got 0")


def test_list_takes_plugins_behind_a_space_and_again(astbench, plugin_file):
    one, two = plugin_file("one", "one.py"), plugin_file("two", "two.py")
    for words in ([f"--plugins={one},{two}"], ["--plugins", one, "--plugins", two], [f"--plugins=[{one}, {two}]"]):
        done = astbench("list", *words)
        assert done.code == 0, done.err
        assert "\n  one " in done.out and "\n  two " in done.out
    assert_refused(astbench("list", "--attention.density", "3"), 2, "takes no --attention.density=3")
    assert_refused(astbench("list", "--trust_config", "three"), 2, "astbench list takes no three")


def test_bench_takes_a_plugin_behind_a_space(resolved, folder):
    file = folder("c.yaml", lengths=[64], seed=4)
    spellings = [
        ["--plugins", "one.py", "--plugins", "two.py"],
        ["--plugins=one.py,two.py"],
        ["--plugins=[one.py,two.py]"],
        ["--plugins", "[one.py]", "--plugins+=two.py"],
    ]
    for words in spellings:
        found = resolved("bench", "--config", file, "--seed", "5", "--attention", "ast,moba", *words)
        assert found["plugins"] == ["one.py", "two.py"]
        assert (found["lengths"], found["seed"], found["attention"]) == ([64], 5, "ast,moba")


def test_switches_take_no_value(astbench):
    assert astbench("describe", "--trust_config", "ast").code == 0
    assert_refused(astbench("list", "--trust_config=false"), 2, "--trust_config takes no value, got false")
    assert_refused(astbench("describe", "ast", "--explain=N=9"), 2, "--explain takes no value, got N=9")


def test_values_may_begin_with_a_dash():
    line = read_command_line(["--trainer.devices", "-1", "--optim.lr", "-1e-3", "--data.question", "-why so?", "-x"])
    assert line.arguments() == ["--trainer.devices=-1", "--optim.lr=-1e-3", "--data.question=-why so?", "-x"]


@pytest.mark.parametrize("option", ["--attention", "--task", "--seed", "--plugins", "--ckpt_path", "--plugins="])
def test_an_option_without_its_value_is_not_passed_over(astbench, option):
    name = option.rstrip("=")
    assert_refused(astbench("fit", "--attention=ast", "--task=triviaqa", option), 2, f"{name} needs a value")


# -- one configuration, many spellings --------------------------------------------------------------------------------

SPELLINGS = {
    "equals signs": ["--attention=ast", "--task=triviaqa", "--data.source=local", "--optim.lr=0.5", "--seed=3"],
    "spaces": ["--attention", "ast", "--task", "triviaqa", "--data.source", "local", "--optim.lr", "0.5",
               "--seed", "3"],
    "names": ["--attention.name=ast", "--task.name", "triviaqa", "--data.source=local", "--optim.lr=0.5", "--seed=3"],
    "groups": ["--attention={name: ast}", "--task", "{name: triviaqa}", "--data={source: local}", "--optim",
               "{lr: 0.5}", "--seed_everything=3"],
    "group file": ["--attention=ast", "--task=triviaqa", "--data", "local.yaml", "--optim.lr=5e-1", "--seed=3"],
    "file": ["--config=names.yaml"],
    "file of groups": ["--config", "groups.yaml"],
    "two files": ["-c", "dense.yaml", "-c", "names.yaml"],
    "typed over a file": ["--config=dense.yaml", "--attention=ast", "--task=triviaqa", "--optim.lr=0.5", "--seed=3"],
    "typed before a file": ["--attention=ast", "--task=triviaqa", "--optim.lr=0.5", "--seed=3", "--config=dense.yaml"],
    "said twice": ["--seed=1", "--attention=dense", "--attention=ast", "--optim.lr=9", "--config=names.yaml",
                   "--seed=3", "--optim.lr=0.5"],
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_equivalent_spellings_resolve_to_one_configuration(resolved, folder, spelling):
    options = {"data": {"source": "local"}, "optim": {"lr": 0.5}, "seed": 3}
    folder("names.yaml", attention="ast", task="triviaqa", **options)
    folder("groups.yaml", attention={"name": "ast"}, task={"name": "triviaqa"}, **options)
    folder("dense.yaml", attention={"name": "dense", "backend": "sdpa_math"}, task="triviaqa",
           data={"source": "local"}, optim={"lr": 7.0}, seed=8)  # fmt: skip
    folder("local.yaml", source="local")
    found, wanted = (
        {key: value for key, value in resolved("fit", *SPELLINGS[name]).items() if key != "config"}
        for name in (spelling, "equals signs")
    )
    assert found == wanted
    assert found["attention"]["name"] == "ast" and found["optim"]["lr"] == 0.5 and found["seed_everything"] == 3
    assert found["data"]["source"] == "local" and found["trainer"]["max_steps"] == 1000  # not the demo's


def test_the_later_of_two_files_wins_also_for_names(resolved, folder, capsys):
    one = folder("one.yaml", attention={"name": "dense"}, task="triviaqa", optim={"lr": 0.5})
    two = folder("two.yaml", attention={"name": "local", "window": 5})
    line = read_names(["--config", one, "--config", two])
    assert (line.attention, line.task) == ("local", "triviaqa")
    assert line.value("attention.window") == "5" and line.value("optim.lr") == "0.5"
    assert line.value("attention.density") is None
    assert read_names(["--config", two, "--config", one]).attention == "dense"


def test_resume_and_checkpoints_bring_their_config(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    folder("run/config.yaml", attention={"name": "ast"}, task={"name": "mqar"})
    folder("other.yaml", attention="dense")
    for words in (["--resume", "run"], ["--resume=run"], ["--ckpt_path", "run"], ["--ckpt_path=run"]):
        line = read_names(words)
        assert (line.attention, line.task) == ("ast", "mqar")
    assert read_names(["--config=other.yaml", "--ckpt_path", "run"]).attention == "dense"
    with pytest.raises(ConfigError, match="takes no --config"):
        read_names(["--config", "other.yaml", "--resume", "run"])


def test_a_class_of_a_file_that_a_config_names_needs_trust(resolved, folder, plugin_file):
    file = folder("c.yaml", attention={"name": f"{plugin_file()}:Mine", "power": 2.0}, task="triviaqa")
    with pytest.raises(ConfigError, match="plugins are code: add --plugins="):
        read_names(["--config", file])
    found = resolved("fit", "--config", file, "--trust_config")
    assert found["attention"] == {"name": "mine", "power": 2.0}


# -- every file once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "files"),
    [
        (["fit", "--config=one.yaml", "--config", "two.yaml", "--data=three.yaml"], ["one", "two", "three"]),
        (["validate", "--ckpt_path=run", "--config=one.yaml"], ["run/config", "one"]),
        (["bench", "--config=four.yaml"], ["four"]),
    ],
    ids=["fit", "validate", "bench"],
)
def test_every_file_is_opened_once(resolved, folder, tmp_path, monkeypatch, words, files):
    (tmp_path / "run").mkdir()
    folder("one.yaml", attention="ast", task="triviaqa")
    folder("two.yaml", attention={"name": "ast", "density": 0.5})
    folder("three.yaml", source="local")
    folder("four.yaml", attention="ast", lengths=[64])
    folder("run/config.yaml", attention={"name": "ast"}, task={"name": "triviaqa"})
    opened = []

    def note(file, *arguments, **options):
        opened.append(str(file))
        return original(file, *arguments, **options)

    original = io.open
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", note)
        patch.setattr(builtins, "open", note)
        resolved(*words)
    assert sorted(name for name in opened if name.endswith(".yaml") and "astbench-" not in name) == sorted(
        f"{file}.yaml" for file in files
    )


def test_a_former_name_of_an_option_is_taken_with_a_note(astbench, tmp_path, capsys):
    file = tmp_path / "old.yaml"
    file.write_text("attention: {name: ast, first_block: false}\ntask: triviaqa\n")
    nameless = tmp_path / "nameless.yaml"
    nameless.write_text("attention: {first_block: true}\n")
    for words, sink in ((["--attention.first_block", "true"], True), ([f"--config={nameless}"], True), ([], False)):
        with pytest.raises(SystemExit) as end:  # jsonargparse's own end of --print_config
            astbench("fit", f"--config={file}", *words, "--print_config")
        out, err = capsys.readouterr()
        assert not end.value.code and yaml.safe_load(out)["attention"]["sink_block"] is sink
        assert ("--attention.first_block is called --attention.sink_block now" in err) is (
            words[:1] == ["--attention.first_block"]
        )
    described = astbench("describe", "ast", "--attention.first_block=false")
    assert "(formerly first_block)" in described.out and "here False" in described.out
    assert "--attention.first_block is called --attention.sink_block now" in described.err


def test_check_tells_a_former_name_too(astbench):
    refused = astbench("check", "ast", "--attention.first_block", "3")
    assert refused.code == 2 and "--attention.first_block is called --attention.sink_block now" in refused.err


def test_plugins_added_by_a_config_need_trust_as_well(astbench, tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("plugins+: [./evil.py]\nattention: ast\ntask: triviaqa\n")
    assert_refused(astbench("fit", f"--config={file}"), 2, "names the plugin ./evil.py")
    file.write_text("plugins+: ./evil.py\n")
    assert_refused(astbench("fit", f"--config={file}"), 2, "plugins+ must be a list")


@pytest.mark.parametrize(
    "words, said",
    [
        (["fit", "--config={folder}"], "is not a file, it is a folder; name the file in it"),
        (["fit", "--resume={file}"], "is not a run folder, it is a file"),
        (["table", "--results={file}"], "is not a folder, it is a file"),
        (["fit", "--attention=dense", "--task=lra_text", "--data.path={file}"], "is not a folder, it is a file"),
    ],
)
def test_a_file_for_a_folder_and_a_folder_for_a_file_are_told(astbench, tmp_path, words, said):
    (tmp_path / "file").touch()
    done = astbench(*(word.format(file=tmp_path / "file", folder=tmp_path) for word in words))
    assert done.code and said in done.err
