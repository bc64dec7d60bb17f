"""Stands in for `astbench fit` where only the sweep is tested: leaves a run folder as a fit does, in no time.

`stand_in.py PARENT fit --option=value ... --run_dir=FOLDER`; what it does is said by the cell's learning rate:
0.1 ends well, 0.2 fails, 0.3 is refused, 0.4 waits until it is asked to stop and leaves a checkpoint, 0.5 is killed.
"""

import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

words = sys.argv[2:]
given = dict(word[2:].partition("=")[::2] for word in words[1:])
resumed = given.get("resume")
folder = Path(resumed or given["run_dir"])
if resumed:
    record = json.loads((folder / "record.json").read_text())
    record["resumed"] = [*record.get("resumed", []), {"argv": words}]
else:
    if given["optim.lr"] == "0.3":
        print("astbench: error: --optim.lr is refused", file=sys.stderr)
        sys.exit(2)
    folder.mkdir(parents=True)
    names = {group: {"name": given[group]} for group in ("attention", "task")}
    config = {**names, "optim": {"lr": float(given["optim.lr"])}, "seed_everything": int(given.get("seed", 0))}
    record = {"schema": 1, "command": "fit", "config": config, "started": "2026-01-01T00:00:00Z"}
lock = open(folder / ".lock", "w")  # noqa: SIM115 (held as long as this lives)
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def leave(state, **more):
    text = json.dumps({**record, "state": state, "wall_seconds": 7.0, "peak_memory": {"cpu_bytes": 10**9}, **more})
    (folder / "record.json").write_text(text)


(folder / "config.yaml").write_text("{}")
kind = str(record["config"]["optim"]["lr"])
leave("running")
with open(folder.parent / "begun.txt", "a") as file:
    file.write(f"{folder.name} {os.environ.get('OMP_NUM_THREADS')}\n")
if kind == "0.2":
    leave("failed", error="ValueError: it cannot be")
    print("astbench: error: it cannot be", file=sys.stderr)
    sys.exit(1)
if kind == "0.5":
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "0.4" and not resumed:

    def stop(*_):
        (folder / "last.ckpt").write_text("weights")
        leave("terminated")
        sys.exit(143)

    signal.signal(signal.SIGTERM, stop)
    (folder / "ready").touch()
    while True:
        time.sleep(0.02)
leave("done", metrics={"f1": 0.5}, train={"steps": 3, "wall_seconds": 6.0})
(folder / "done.json").write_text("{}")
