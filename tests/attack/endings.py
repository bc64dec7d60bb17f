"""E: full disks, missing rights, folders that go away and odd surroundings end in one line and a documented code."""

import os
import resource
import shutil
import signal
import time
from contextlib import suppress

from astbench.runs.folder import CONFIG
from tests.attack.commands import begin, demand, run
from tests.attack.runs import FIT, STOPPED, differences

NOBODY = 65534
WORDS = [*FIT, "--trainer.max_steps=6", "--checkpoint_every=1", "--run_dir=run"]


def trial(rng, folder, shared):
    kinds = [full_disk, full_disk, full_output, no_rights, deleted, deleted, few_files, little_memory, surroundings,
             surroundings, typed, typed]  # fmt: skip
    rng.choice(kinds)(rng, folder, shared)


def full_disk(rng, folder, shared):
    """No file may get longer than so; with room again the run goes on to where it should end."""
    most = rng.randrange(4_000_000) if rng.random() < 0.7 else rng.randrange(20_000)
    ended = run(WORDS, folder, cwd=folder, limits=[(resource.RLIMIT_FSIZE, most)])
    ended.must_be_clear(0, 2, 6, 7, what=f"files of at most {most} bytes")
    if ended.code and (folder / "run" / CONFIG).exists():
        again = run(["fit", "--resume=run"], folder, cwd=folder)
        again.must_be_clear(0, what=f"files of at most {most} bytes, then resumed")
        found = differences(folder / "run", shared.whole("stopped", STOPPED)[0])
        demand(not found, f"files of at most {most} bytes, then resumed: it ends elsewhere: {', '.join(found)}")


COMMANDS = [["list"], ["describe", "ast"], ["doctor"], ["--help"], ["fit", "--help"], ["bench", "--help"],
            ["describe", "ast", "--explain", "N=4096"], ["check", "dense"], ["table"], [*FIT, "--print_config"],
            ["--version"]]  # fmt: skip


def full_output(rng, folder, shared):
    """Nothing can be printed: the disk is full, the stream is closed, or its reader has gone."""
    how = rng.choice(["full", "closed", "gone"])
    words = rng.choice([*COMMANDS, WORDS])
    streams = rng.choice([[1], [1], [2], [1, 2]])

    def redirect():
        for stream in streams:
            if how == "closed":
                os.close(stream)
            elif how == "full":
                os.dup2(os.open("/dev/full", os.O_WRONLY), stream)
            else:
                out, into = os.pipe()
                os.close(out)
                os.dup2(into, stream)

    ended = run(words, folder, cwd=folder, redirect=redirect)
    what = f"{' '.join(words[:3])} with {how} streams {streams}"
    demand(ended.code in (0, 7) and "Traceback" not in ended.err, f"{what}: {ended.last}")
    demand(2 in streams or ended.err.count("\n") <= 1, f"{what}: {ended.err.count(chr(10))} lines of errors")


def no_rights(rng, folder, shared):
    """Files and folders without rights, for a user who is not root."""
    place = shared.stopped(folder / "run")
    folder.parent.chmod(0o755)
    for file in (folder, *folder.rglob("*")):
        if os.getuid() == 0:
            os.chown(file, NOBODY, NOBODY)
    files = [place, *sorted(place.rglob("*"))]
    chosen = rng.sample(files, rng.choice([1, 1, 2, len(files)]))
    mode = rng.choice([0o000, 0o444, 0o555, 0o222])
    for file in reversed(chosen):
        file.chmod(mode)
    words = rng.choice([["fit", "--resume=run"], ["validate", "--ckpt_path=run", "--run_dir=out"],
                        [*FIT, "--trainer.max_steps=1", "--init_from=run", "--run_dir=out"],
                        [*FIT, "--trainer.max_steps=1", "--run_dir=run/new"],
                        [*FIT, "--trainer.max_steps=1", "--config=run/config.yaml", "--run_dir=out"]])  # fmt: skip

    def before():
        if os.getuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)

    what = f"{words} with mode {mode:o} of {', '.join(sorted(str(file.relative_to(folder)) for file in chosen)[:3])}"
    try:
        run(words, folder, cwd=folder, before=before, env={"HOME": str(folder)}).must_be_clear(what=what)
    finally:
        for file in chosen:
            file.chmod(0o755)


def deleted(rng, folder, shared):
    """A folder or file of the run goes away, or becomes something else, while it is used."""
    _, seconds = shared.whole("stopped", STOPPED)
    moment = rng.uniform(0.02, 1.0) * seconds
    child = begin(WORDS, folder, cwd=folder)
    time.sleep(moment)
    place = folder / "run"
    how = rng.choice(["folder", "folder", "renamed", "file", "file", "folder of file's name"])
    name = "the folder"
    with suppress(OSError):
        if how == "folder":
            shutil.rmtree(place, ignore_errors=True)
        elif how == "renamed":
            place.rename(folder / "elsewhere")
        else:
            file = rng.choice(sorted(f for f in place.rglob("*") if f.is_file()) or [place / "none"])
            name = file.name
            file.unlink()
            if how != "file":
                file.mkdir()
    child.ended().must_be_clear(what=f"{name} gone ({how}) after {moment:.2f} s")


def few_files(rng, folder, shared):
    """Few open files; without loader processes, in which torch itself prints what fails."""
    most = rng.randrange(4, 60)
    ended = run(WORDS, folder, cwd=folder, limits=[(resource.RLIMIT_NOFILE, most)])
    ended.must_be_clear(what=f"at most {most} open files")


def little_memory(rng, folder, shared):
    """Little memory."""
    room = rng.randrange(1 << 20, 400 << 20)
    size = rng.choice([4, 512])
    words = [*WORDS, f"--data.batch_size={size}", "--data.demo_train=600", "--trainer.max_steps=2"]
    what = f"{room >> 20} MiB of memory, {size} examples a batch"
    ended = run(words, folder, cwd=folder, room=room)
    if ended.code != -signal.SIGABRT:  # native code that is refused memory ends the process; Python is not asked
        ended.must_be_clear(what=what)


ODD = ["", "0", "-1", "x", "1", "2", "4", "a\nb", "/nonexistent", "\udcff", "é", "9" * 30, "," * 5, "C", "xx_YY"]
NAMES_OF = """
    LOCAL_RANK RANK WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT SLURM_NTASKS SLURM_JOB_NAME SLURM_PROCID HOME TMPDIR
    LANG LC_ALL COLUMNS LINES TERM PATH USER OMP_NUM_THREADS CUDA_VISIBLE_DEVICES HF_HOME HF_HUB_OFFLINE
    TRANSFORMERS_CACHE NO_COLOR MPLBACKEND MPLCONFIGDIR TOKENIZERS_PARALLELISM PYTHONWARNINGS PYTHONHASHSEED TZ
    PL_GLOBAL_SEED XDG_CACHE_HOME ASTBENCH_RUN_DIR JSONARGPARSE_DEBUG GROUP_RANK LOCAL_WORLD_SIZE TORCH_LOGS
    TORCHELASTIC_RUN_ID KUBERNETES_PORT LSB_JOBID OMPI_COMM_WORLD_SIZE PMI_RANK
""".split()


def surroundings(rng, folder, shared):
    """Variables of the environment that are odd or missing; a current folder that is gone."""
    env = {name: rng.choice([None, *ODD]) for name in rng.sample(NAMES_OF, rng.choice([1, 1, 2, 4, 12]))}
    words = rng.choice([*COMMANDS, WORDS, WORDS])
    here = folder / "here"
    here.mkdir()
    gone = rng.random() < 0.2
    words = [word.replace("=run", f"={folder / 'run'}") if word == "--run_dir=run" else word for word in words]
    ended = run(words, folder, cwd=here, env=env, before=here.rmdir if gone else None)
    ended.must_be_clear(what=f"{' '.join(words[:3])} with {env}{', current folder gone' * gone}")


TYPED = [
    "", "-", "--", "--=", "=", "--a", "\0", "\udcff", "é" * 300, "a" * 5000, "../" * 2000, "{", "[", "}: [", "*a",
    "&a", "!!python/name:os.system", "%", "@", "`", "null", "~", ".nan", "1e400", "-h=", "--help=x", "\n",
    "--config=.", "--config=", "--run_dir=", "--run_dir=.", "--run_dir=/", "--run_dir=/proc/x",
    "--run_dir=/dev/null/x", "--task=", "--attention=", "--attention=[a]", "--attention={}", "--task=null",
    "--data.x=1", "--data=1", "--trainer={}", "--trainer=[]", "--optim.lr=", "--optim.lr=[]", "--optim.lr={}",
    "--plugins=", "--plugins=/", "--plugins=[", "--loggers=x", "--loggers=", "--loggers=[]", "--seed=", "--seed=x",
    "--backbone=", "--backbone=/", "--init_from=", "--ckpt_path=", "--resume=", "--resume=.", "--ckpt_path=/dev/zero",
    "--config=/dev/null", "--trainer.max_steps=0", "--trainer.max_steps=-2", "--print_config=x",
    "--data.path=/dev/zero",
]  # fmt: skip


def typed(rng, folder, shared):
    """A command line with words that nobody means."""
    words = list(rng.choice([*COMMANDS, WORDS, WORDS, ["validate", "--ckpt_path=run"], ["fit", "--resume=run"],
                             ["predict", "--ckpt_path=run"], ["bench", "--lengths=[32]", "--run_dir=run"],
                             ["table", "--check"]]))  # fmt: skip
    for _ in range(rng.choice([1, 1, 2, 3])):
        how = rng.choice(["put", "put", "instead", "value", "less"])
        place = rng.randrange(len(words))
        if how == "put":
            words.insert(place + 1, rng.choice(TYPED))
        elif how == "instead":
            words[place] = rng.choice(TYPED)
        elif how == "value":
            words[place] = words[place].partition("=")[0] + "=" + rng.choice(TYPED)
        elif len(words) > 1:
            del words[place]
    ended = run(words, folder, cwd=folder)
    if words[:1] != ["table"]:  # whose --check ends with 1 where it finds something
        ended.must_be_clear(what=" ".join(ascii(word)[1:-1][:60] for word in words))
