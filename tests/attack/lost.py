"""B: killed at any moment, a run ends bitwise where the uninterrupted one does; SIGTERM gives 143 and a checkpoint."""

import os
import re
import signal
import time

from astbench.runs.checkpoints import read_checkpoint
from astbench.runs.folder import CONFIG, DONE, LAST
from tests.astbench.processes import arm
from tests.attack.commands import begin, demand, run
from tests.attack.runs import FIT, QA, QUICK, differences

LM = ["fit", "--task=wikitext103", "--data.context=64", "--data.batch_size=2", "--data.windows=4",
      "--data.demo_train=40", "--data.demo_eval=4", *QUICK]  # fmt: skip
MT = ["fit", "--attention=ast", "--task=wmt14", "--data.demo_train=60", "--data.demo_eval=8", "--data.batch_size=8",
      "--task.average=3", "--task.average_every=3", "--task.beams=1", *QUICK]  # fmt: skip
RUNS = {
    "plain": [*FIT, "--trainer.max_steps=12", "--checkpoint_every=1"],
    "workers": [*FIT, "--trainer.max_steps=12", "--checkpoint_every=3", "--data.num_workers=2"],
    "accumulating": [*FIT, "--trainer.max_steps=8", "--checkpoint_every=2", "--trainer.accumulate_grad_batches=2",
                     "--trainer.val_check_interval=7"],
    "averaging": [*MT, "--trainer.max_steps=12", "--checkpoint_every=2"],
    "random": [*LM, "--attention=random_topk", "--trainer.max_steps=12", "--checkpoint_every=2"],
    "hashing": ["fit", "--attention=reformer", "--task=triviaqa", *QA, "--trainer.max_steps=8", "--checkpoint_every=2"],
}  # fmt: skip

EVENTS = [("rename", 14), ("fsync", 24), ("on_train_batch_start", 12), ("on_train_batch_end", 12), ("evaluate", 1),
          ("finish", 1)]  # fmt: skip
"""What happens in a run, and about how often."""


def trial(rng, folder, shared):
    name = rng.choice(["plain", "plain", *RUNS])
    whole, seconds = shared.whole(name, RUNS[name])
    place = folder / "run"
    first = [*RUNS[name], f"--run_dir={place}"]
    words, story = first, [name]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        story.append(interrupted(rng, words, folder, place, seconds))
        if (place / DONE).exists():
            break
        words = ["fit", f"--resume={place}"] if (place / CONFIG).exists() else first
    ended = run(words, folder)
    what = ", ".join(story)
    demand(ended.code == 0, f"{what}; then {words[1]} {ended.last}")
    found = differences(place, whole)
    demand(not found, f"{what}; it ends elsewhere: {', '.join(found)}")


def interrupted(rng, words, folder, place, seconds):
    """End a command by a signal, at a random time or event; says how."""
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    if number == signal.SIGKILL and rng.random() < 0.5:
        what, most = rng.choice(EVENTS)
        count = rng.randrange(most)
        ended = run(words, folder, before=lambda: at_event(what, count, number))
        demand(ended.code in (0, -number), f"{what} {count}: {ended.last}")
        return f"killed at {what} {count}"
    moment = rng.uniform(0.02, 1.0) * seconds
    child = begin(words, folder)
    time.sleep(moment)
    child.send(number, group=number == signal.SIGKILL or rng.random() < 0.5)
    ended = child.ended()
    story = f"{number.name} after {moment:.2f} s"
    if number == signal.SIGTERM and ended.code != 0:
        early = ended.code == -number and not place.exists()  # before the command could listen
        demand(early or ended.code == 143, f"{story}: {ended.last}")
        if not early:
            ended.must_be_clear(143)
        if step := re.search(r"terminated by SIGTERM at step (\d+)", ended.err):
            saved = read_checkpoint(place / LAST)["global_step"]
            demand(saved == int(step[1]), f"{story} at step {step[1]}, but the checkpoint is of step {saved}")
    return story


def at_event(what, count, number):
    if what != "fsync":
        arm(what, count, number)
        return
    fsync, seen = os.fsync, []

    def counted(file):
        if len(seen) == count:
            os.kill(os.getpid(), number)
        seen.append(file)
        fsync(file)

    os.fsync = counted
