"""Tasks by name: plugins, installed packages, and what the one-line errors say."""

import sys
from textwrap import dedent

import pytest

from astbench.errors import NameOrPluginError
from astbench.tasks import TASKS, find_task, load_plugin, registered_tasks
from astbench.tasks.recall.config import RecallConfig
from astbench.tasks.recall.mqar import MQARData
from astbench.tasks.recall.task import Recall
from astbench.tasks.registry import task_clashes, task_of_class
from astbench_registry import PluginError, registered

TASK = """
from astbench.tasks import register_task
from astbench.tasks.recall.config import RecallConfig
from astbench.tasks.recall.mqar import MQARData
from astbench.tasks.recall.task import Recall


@register_task(
    "NAME", data=MQARData, config=RecallConfig, summary="Recall of mine", sources=("generated",), metric="accuracy"
)
class Mine(Recall):
    pass
"""


@pytest.fixture(autouse=True)
def fresh(fresh_registry):
    """Plugins of one test are unknown to the next."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("astbench_plugin_", "fake_")):
            del sys.modules[name]


@pytest.fixture
def plugin(tmp_path):
    def write(name="mine", file="mine.py", **replacements):
        code = TASK.replace("NAME", name)
        for old, new in replacements.items():
            assert old in code
            code = code.replace(old, new)
        path = tmp_path / file
        path.write_text(code)
        return str(path)

    return write


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A fake installed package that declares tasks."""

    def add(distribution, entries, modules):
        site = tmp_path / distribution
        info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[astbench.tasks]", *lines, ""]))
        for name, code in modules.items():
            (site / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(site))

    return add


def message(error):
    text = str(error.value)
    assert "\n" not in text, "an error is one line"
    return text


def test_a_plugin_registers_a_task(plugin):
    path = plugin()
    assert load_plugin(path) == ["mine"]
    assert load_plugin(path) == ["mine"], "naming a plugin twice is no clash"
    row = find_task("mine")
    module, data, config = row.load()
    assert issubclass(module, Recall) and module.__name__ == "Mine" and (data, config) == (MQARData, RecallConfig)
    assert (row.metric, row.real, row.commands) == ("accuracy", "", ("fit", "validate", "test", "predict"))
    assert registered_tasks()["mine"].source == path
    assert list(registered_tasks()) == [*TASKS, "mine"]
    assert task_of_class(f"{path}:Mine") == "mine"


def test_unknown_names(plugin):
    load_plugin(plugin())
    with pytest.raises(NameOrPluginError) as error:
        find_task("mime")
    assert message(error).startswith("unknown task 'mime'; did you mean 'mine'? registered: squad, ")
    with pytest.raises(PluginError, match="no class 'Recal' with @register_task in"):
        task_of_class(f"{plugin(file='other.py', name='other')}:Recal")


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('"mine"', '"Mine"', "task name 'Mine' from .*: use lower-case letters, digits, _ and -"),
        ('"mine"', '"mqar"', "task 'mqar' is registered twice: by astbench and by .*; rename one"),
        ("class Mine(Recall)", "class Mine", "must be a subclass of astbench.training.module.TaskModule"),
        ("data=MQARData", "data=Recall", "its data must be a subclass of astbench.tasks.base.TaskData"),
        ("config=RecallConfig", "config=dict", "its config must be a dataclass"),
        (', metric="accuracy"', "", "register_task.* missing 1 required positional argument: 'metric'"),
        ("metric=", "metrics=", "register_task.* unexpected keyword argument 'metrics'"),
        ("data=MQARData", "data=__import__('astbench.tasks.base').tasks.base.TaskData", "does not define TaskData.le"),
    ],
)
def test_what_cannot_be_a_task(plugin, old, new, expected):
    with pytest.raises(PluginError, match=expected) as error:
        load_plugin(plugin(**{old: new}))
    message(error)
    assert list(registered_tasks()) == list(TASKS)


def test_a_class_inside_a_function_cannot_be_found_again(plugin):
    body = TASK.replace("NAME", "mine").partition("\n\n\n")
    code = f"{body[0]}\ndef make():\n" + "".join(f"    {line}\n" for line in body[2].splitlines()) + "make()\n"
    with pytest.raises(PluginError, match="must stand at the top of its file"):
        load_plugin(plugin(**{TASK.replace("NAME", "mine"): code}))


def test_two_plugins_of_one_name(plugin):
    first, second = plugin(file="one.py"), plugin(file="two.py")
    load_plugin(first)
    with pytest.raises(PluginError, match=r"task 'mine' is registered twice: by .*one.py and by .*two.py; rename one"):
        load_plugin(second)
    assert registered_tasks()["mine"].source == first


def test_of_a_plugin_that_fails_nothing_stays(plugin, plugin_file):
    attention = plugin_file().read_text()
    path = plugin(file="both.py", **{"    pass\n": f"    pass\n\n\n{dedent(attention)}\n\n1 / 0\n"})
    with pytest.raises(PluginError, match="does not load: ZeroDivisionError"):
        load_plugin(path)
    assert list(registered_tasks()) == list(TASKS)
    assert "mine" not in registered()


def test_a_file_may_register_both(plugin, plugin_file):
    attention = plugin_file("own_attention", file="attention.py").read_text()
    path = plugin("own_task", file="both.py", **{"    pass\n": f"    pass\n\n\n{dedent(attention)}\n"})
    assert load_plugin(path) == ["own_attention", "own_task"]


def test_nothing_registered(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(PluginError, match="registers no attention, task, transform or depth policy; decorate"):
        load_plugin(str(tmp_path / "empty.py"))


def test_installed_packages_load_when_their_name_is_used(install):
    install("good-tasks", {"mine": "fake_good:Mine"}, {"fake_good": TASK.replace("NAME", "mine")})
    install("bad-tasks", {"broken": "fake_bad:Mine"}, {"fake_bad": "1 / 0\n"})
    install("lax-tasks", {"unnamed": "fake_lax:Mine"}, {"fake_lax": TASK.replace("NAME", "another")})
    rows = registered_tasks()
    assert (rows["mine"].source, rows["mine"].row, rows["mine"].summary) == ("good-tasks", None, "(not loaded)")
    assert rows["broken"].source == "bad-tasks", "listing loads nothing"
    assert "fake_good" not in sys.modules
    assert find_task("mine").summary == "Recall of mine"
    with pytest.raises(
        PluginError, match=r"task 'broken' from bad-tasks \(fake_bad:Mine\) does not load: ZeroDivision"
    ):
        find_task("broken")
    with pytest.raises(PluginError, match=r"fake_lax:Mine must carry @register_task\('unnamed', ...\)"):
        find_task("unnamed")


def test_installed_packages_that_clash(install, plugin):
    for distribution in ("one", "two"):
        install(distribution, {"mine": f"fake_{distribution}:Mine", "mqar": f"fake_{distribution}:Mine"}, {})
    assert task_clashes() == {"mine": ["one", "two"], "mqar": ["astbench", "one", "two"]}
    assert "mine" not in registered_tasks()
    assert find_task("mqar") is TASKS["mqar"]
    with pytest.raises(PluginError, match="task 'mine' is registered twice: by one and by two; uninstall one"):
        find_task("mine")


def test_on_the_command_line(astbench, plugin, install, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install("some-tasks", {"theirs": "fake_theirs:Mine", "mqar": "fake_theirs:Mine"}, {})
    listed = astbench("list", f"--plugins={plugin()}").out
    assert f"  mine          Recall of mine [sources: generated] [{tmp_path / 'mine.py'}]\n" in listed
    assert "  theirs        (from some-tasks; not loaded until --task=theirs)\n" in listed
    assert "claimed by astbench and by some-tasks; --task=mqar is astbench's own, not some-tasks's" in listed
    refused = astbench("fit", "--attention=dense", "--task=mqra")
    assert refused.code == 4 and "unknown task 'mqra'; did you mean 'mqar'?" in refused.err
    assert astbench("fit", "--attention=dense", "--task=theirs").code == 4
    for line in ("attention: ./mine.py:Mine", "task: {name: ./mine.py:Mine}"):
        (tmp_path / "c.yaml").write_text(f"{line}\n")
        refused = astbench("fit", "--config=c.yaml")
        assert refused.code == 2 and "names the plugin ./mine.py, and plugins are code" in refused.err
