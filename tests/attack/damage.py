"""C: files with flipped bits, and files cut, emptied, exchanged or missing, are refused or said, or not read."""

import shutil
import sys
from copy import deepcopy
from hashlib import sha256

from astbench.backbones.adapters import load_adapter, save_adapter
from astbench.backbones.swap import swap_attention
from astbench.errors import AstbenchError
from astbench.runs.folder import LOCK
from tests.astbench.conftest import tiny_model
from tests.attack.commands import Child, demand, run
from tests.attack.runs import FIT, differences

USES = {
    "resume": ["fit", "--resume={run}"],
    "validate": ["validate", "--ckpt_path={run}", "--run_dir={out}"],
    "validate a file": ["validate", "--ckpt_path={run}/last.ckpt", "--run_dir={out}"],
    "init_from": [*FIT, "--trainer.max_steps=1", "--init_from={run}", "--run_dir={out}"],
    "predict": ["predict", "--ckpt_path={run}", "--data.question=Who wrote it?", "--data.document={document}"],
}


def trial(rng, folder, shared):
    (of_an_adapter if rng.random() < 0.4 else of_a_run)(rng, folder, shared)


def harm(rng, folder):
    """Damage one file of a folder; says what was done."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in (LOCK,))
    file = rng.choice([file for file in files if "tensorboard" not in file.parts])
    data, name = bytearray(file.read_bytes()), file.relative_to(folder)
    how = rng.choice(["bits", "bits", "bits", "bits", "cut", "zeros", "empty", "gone", "longer", "other"])
    if how == "gone" or not data:
        file.unlink()
        return f"{name} gone"
    if how == "bits":
        places = [rng.randrange(8 * len(data)) for _ in range(rng.choice([1, 1, 1, 2, 8]))]
        for place in places:
            data[place // 8] ^= 1 << place % 8
        how = f"bits {places}"
    elif how == "cut":
        del data[rng.randrange(len(data)) :]
        how = f"cut to {len(data)} bytes"
    elif how == "zeros":
        begin = rng.randrange(len(data))
        data[begin : begin + 4096] = bytes(len(data[begin : begin + 4096]))
        how = f"zeros from {begin}"
    elif how == "longer":
        data += rng.randbytes(rng.randrange(1, 200))
    elif how == "other":
        other = rng.choice(files)
        data, how = other.read_bytes(), f"the content of {other.relative_to(folder)}"
    else:
        data = b""
    file.write_bytes(data)
    return f"{name}: {how}"


def used(use, run_folder, folder):
    """Use a run's folder; how that ended, the folder in which it did, and the notes and answers that it printed."""
    out = folder / "out"
    (folder / "document.txt").write_text("Miriam Ashworth wrote The Glass Orchard in the town of Ashbridge. " * 3)
    places = {"run": run_folder, "out": out, "document": folder / "document.txt"}
    words = [word.format(**places) for word in USES[use]]
    ended = run([*words, f"--run_dir={out}"] if use == "predict" else words, folder, cwd=folder)
    lines = [line.replace(str(folder), "") for line in ended.out.splitlines()]
    return ended, run_folder if use == "resume" else out, lines


def of_a_run(rng, folder, shared):
    use = rng.choice(list(USES))

    def undamaged(place):
        ended, end, lines = used(use, shared.stopped(place / "run"), place)
        ended.must_be_clear(0)
        return end, lines

    expected, lines = shared.once(f"undamaged-{use}", undamaged)
    run_folder = shared.stopped(folder / "run")
    what = f"{use} with {harm(rng, run_folder)}"
    ended, end, said = used(use, run_folder, folder)
    ended.must_be_clear()
    if ended.code or any(line.startswith("note: ") and line not in lines for line in said):
        return
    found = ["what it prints"] * (use == "predict" and answers(said) != answers(lines))
    if use != "predict":
        found += differences(end, expected)
    demand(not found, f"{what}: taken in silence, and other than without: {', '.join(found)}")


def answers(lines):
    """What `predict` printed, without its progress and times."""
    return [line for line in lines if "s, " not in line and "/s" not in line]


def adapter(folder):
    """An adapter of a tiny model; the model, the folder, and what loading it says."""
    model = tiny_model("llama")
    handle = swap_attention(model, "ast", {"block_size": 8})
    save_adapter(handle, folder / "adapter")
    handle.undo()
    return model, folder / "adapter", Child(lambda: loaded(model, folder / "adapter"), folder).ended()


def loaded(model, folder):
    """Print the digest of an adapter's weights and options, or the error; its exit code."""
    try:
        handle = load_adapter(deepcopy(model), folder)
    except (AstbenchError, ValueError) as error:
        print(f"astbench: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 2)
    found = sha256(repr((handle.options, handle.where, handle.layers)).encode())
    for name, weight in sorted(handle.state_dict().items()):
        found.update(name.encode() + weight.detach().numpy().tobytes())
    print(*(f"note: {note}" for note in handle.notes), found.hexdigest(), sep="\n")
    return 0


def of_an_adapter(rng, folder, shared):
    model, whole, expected = shared.once("adapter", adapter)
    expected.must_be_clear(0)
    shutil.copytree(whole, folder / "adapter")
    what = harm(rng, folder / "adapter")
    ended = Child(lambda: loaded(model, folder / "adapter"), folder).ended()
    ended.must_be_clear(0, 2, 6)
    if ended.code == 0 and "unverified" not in ended.out:
        demand(ended.out == expected.out, f"an adapter with {what} is taken in silence")
