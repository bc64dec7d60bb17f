"""A finished run needs nothing of what it began with, and its record says what it was."""

import json
import shutil

from astbench.files.writing import sha256
from astbench.runs.folder import DONE, RECORD
from tests.astbench.cli.commands import FIT
from tests.astbench.cli.test_cli import assert_refused


def test_a_finished_run_needs_no_run_that_it_began_with(astbench, tmp_path, base):
    first = shutil.copytree(base, tmp_path / "first")
    words = [*FIT, "--trainer.max_steps=2", f"--init_from={first}", f"--run_dir={tmp_path / 'second'}"]
    assert astbench(*words, "--attention=pooled_topk").code == 0
    shutil.rmtree(first)
    for command_ in ("validate", "test"):
        outcome = astbench(command_, f"--ckpt_path={tmp_path / 'second'}", f"--run_dir={tmp_path / command_}")
        assert outcome.code == 0, outcome.err
        assert "start anew" not in outcome.out
    (tmp_path / "second" / DONE).unlink()
    assert astbench("fit", f"--resume={tmp_path / 'second'}").code == 0


def test_a_resumed_record_is_that_of_the_run(astbench, stopped):
    before = json.loads((stopped / RECORD).read_text())
    before["hardware"]["threads"] += 1
    (stopped / RECORD).write_text(json.dumps(before))
    outcome = astbench("fit", f"--resume={stopped}")
    assert outcome.code == 0 and "began with" in outcome.out, outcome.err
    record = json.loads((stopped / RECORD).read_text())
    assert (record["argv"], record["started"]) == (before["argv"], before["started"])
    assert record["hardware"]["threads"] == before["hardware"]["threads"]
    (resumed,) = record["resumed"]
    assert resumed["argv"] == ["astbench", "fit", f"--resume={stopped}"] and resumed["threads"] >= 1


def test_a_record_tells_a_plugins_versions_apart(astbench, tmp_path, plugin_file):
    plugin = plugin_file()
    words = [*FIT, "--trainer.max_steps=1", f"--attention={plugin}:Mine", f"--run_dir={tmp_path / 'run'}"]
    assert astbench(*words).code == 0
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert record["plugins"] == [{"plugin": str(plugin), "sha256": sha256(plugin)}]
    (tmp_path / "run" / DONE).unlink()
    assert_refused(astbench("fit", f"--resume={tmp_path / 'run'}"), 2, f"--plugins={plugin}")
    plugin.write_text(plugin.read_text() + "# another\n")
    outcome = astbench("fit", f"--resume={tmp_path / 'run'}", f"--plugins={plugin}")
    assert outcome.code == 0 and "is another than when this run began" in outcome.out, outcome.err
