"""D: bombs, endless lines, deep configs and huge numbers are refused soon, in little memory, with exit code 2 or 3."""

import gzip
from dataclasses import fields

from astbench.runs.folder import CONFIG, MANIFEST, RECORD
from astbench_registry import registered
from astbench_registry.registry import config_class
from tests.attack.commands import Child, demand, run
from tests.attack.runs import FIT, QA

MEMORY = 1 << 30
"""Bytes that a refusal may take beside what any child takes; a line of 50 MB is some hundred as Python's strings."""

MINUTE = 60


def trial(rng, folder, shared):
    idle = shared.once("idle", lambda place: Child(lambda: 0, place).ended()).peak
    words, codes = rng.choice([data, data, config, config, config, number, number, number, kept])(rng, folder, shared)
    words = [*words, "--trainer.max_steps=1"] if words[0] == "fit" and "--resume=run" not in words else words
    ended = run(words, folder, seconds=MINUTE, cwd=folder)
    what = " ".join(words)
    demand(ended.seconds < MINUTE, f"{what}: no end within {MINUTE} s")
    demand(ended.peak < idle + MEMORY, f"{what}: {ended.peak - idle >> 20} MiB more than nothing takes")
    ended.must_be_clear(*codes, what=what)


SOURCES = {
    "wikitext103": ["wiki.train.raw", "wiki.valid.raw"],
    "triviaqa": ["train.jsonl", "validation.jsonl"],
    "squad": ["train-v1.1.json", "dev-v1.1.json"],
    "wmt14": ["train.en", "train.de", "newstest2013.en", "newstest2013.de"],
    "lra_listops": ["basic_train.tsv", "basic_val.tsv"],
    "lra_retrieval": ["new_aan_pairs.train.tsv", "new_aan_pairs.eval.tsv"],
}
"""The files of a task's `--data.source=local`; each may be packed too where readers take that."""


def data(rng, folder, shared):
    """Files of a data set that unpack to a lot, hold one endless line, or brackets within brackets."""
    task = rng.choice(list(SOURCES))
    place = folder / "data"
    place.mkdir()
    plain = task in ("wikitext103", "wmt14")  # to which brackets are text like any other
    how = rng.choice(["bomb", "line", "deep", "lines"])
    letter = rng.choice([b" ", b"a", b"\n", b"0", b"[", b"\t"])
    size = rng.choice([50 << 20, 100 << 20]) if how == "line" else rng.choice([256 << 20, 1 << 30])
    for number, name in enumerate(SOURCES[task]):
        if how == "bomb" and number == 0:
            with gzip.open(place / f"{name}.gz", "wb", compresslevel=9) as out:
                for _ in range(size >> 20):
                    out.write(letter * (1 << 20))
        elif how == "deep":
            depth = rng.choice([10_000] if plain else [10_000, 1_000_000])  # a language model has to read it all
            (place / name).write_text(rng.choice(["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth]))
        elif how == "lines":
            (place / name).write_bytes(rng.choice([b"\n", b"{}\n", b"\0\n", b"\xff\n", b"a\tb\tc\n"]) * 100_000)
        else:
            (place / name).write_bytes((letter if letter != b"\n" else b"a b ") * min(size, 50 << 20))
    words = ["fit", "--attention=ast", f"--task={task}", "--data.source=local", "--data.path=data", "--run_dir=out"]
    return words, (0, 2, 3) if how == "lines" or (how == "deep" and plain) else (2, 3)


def config(rng, folder, shared):
    """A YAML file that explodes, nests or never ends, for a command that takes one."""
    depth, width = rng.choice([8, 9, 12]), rng.choice([5, 10, 20])
    laughs = f"a0: &a0 [{','.join(['lol'] * width)}]\n"
    laughs += "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * width)}]\n" for i in range(1, depth))
    merges = "a0: &a0 {x: 1, y: 2}\n"
    merges += "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * width)}]}}\n" for i in range(1, depth))
    deep = rng.choice([1_000, 10_000, 100_000])
    group = rng.choice(["optim", "data", "attention", "trainer", "seed", "plugins", "task", "lengths"])
    text = rng.choice([
        laughs,
        merges,
        f"{group}: {'[' * deep}{']' * deep}",
        f"{group}: {'{a: ' * deep}",
        f"{group}: {'[' * deep}",
        "- " * deep,
        "? " * deep,
        f"{group}: &a [*a]",
        f"{group}: &a {{<<: *a}}",
        f"{group}: {{{', '.join(f'a{i}: 1' for i in range(deep))}}}",
        f"{group}: {'9' * deep}",
        f"{group}: 0x{'f' * deep}",
        f"{group}: '{'a' * deep * 100}",
        f"{group}: {'a' * 50_000_000}",
        f"{group}: 1e{'9' * 50}",
        f"{group}: {':'.join(['59'] * deep)}",
        f"{group}: !!binary {'A' * deep}",
        f"{group}: {{{'? ' * deep}}}",
        "".join(f"{' ' * i}a:\n" for i in range(2_000)),
        "&a " * deep,
        "!" * deep,
        "\t" * deep,
        "---\n" * deep,
        "\0",
    ])  # fmt: skip
    (folder / "c.yaml").write_text(text)
    words = rng.choice([[*FIT, "--config=c.yaml"], ["bench", "--config=c.yaml"], ["validate", "--config=c.yaml"],
                        [*FIT, "--data=c.yaml"], [*FIT, "--optim=c.yaml"], [*FIT, "--config=/dev/zero"],
                        [*FIT, "--trainer=c.yaml"], ["bench", "--config=/dev/zero"]])  # fmt: skip
    return [*words, "--run_dir=out"], (2, 3)


HUGE = ["1000000000000", "1" + "0" * 30, str(2**63), str(2**64), "-1000000000000", "1e308", "-1e308", "1e999", ".inf",
        "-.inf", ".nan", "9" * 5_000, "0x7fffffffffffffff", "[1000000000000]", "{a: 1000000000000}"]  # fmt: skip
OPTIONS = [*(word.partition("=")[0] for word in QA), "--data.vocab_size", "--data.num_workers",
           "--data.eval_batch_size", "--data.max_train", "--data.max_eval", "--checkpoint_every",
           "--trainer.accumulate_grad_batches",
           "--trainer.gradient_clip_val", "--trainer.devices", "--trainer.threads", "--trainer.precision",
           "--trainer.val_check_interval", "--optim.lr", "--optim.warmup_steps", "--optim.weight_decay",
           "--optim.beta1", "--optim.beta2", "--optim.eps",
           "--backbone.max_positions", "--seed", "--task.max_answer"]  # fmt: skip


def number(rng, folder, shared):
    """An option of a number that nobody can mean. One that is taken all the same must do no harm."""
    value = rng.choice(HUGE)
    known = {name: sorted(option.name for option in fields(config_class(name))) for name in sorted(registered())}
    name = rng.choice([name for name in known if known[name]])
    use = rng.choice(["fit", "attention", "attention", "check", "bench", "describe"])
    if use == "fit":
        return [*FIT, f"{rng.choice(OPTIONS)}={value}", "--run_dir=out"], (0, 2, 3, 4, 5, 7)
    option = rng.choice(known[name])
    if use == "attention":
        words = ["fit", f"--attention={name}", "--task=triviaqa", *QA, f"--attention.{option}={value}", "--run_dir=out"]
    elif use == "bench":
        if rng.random() < 0.5:
            given = f"--options={{{name}: {{{option}: {value}}}}}"
            words = ["bench", f"--attention={name}", given, "--max_seconds=1", "--run_dir=out"]
        else:
            option = rng.choice(["heads", "head_dim", "batch", "rounds", "densities", "lengths", "max_seconds"])
            words = ["bench", f"--attention={name}", f"--{option}={value}", "--run_dir=out"]
        words += ["--lengths=[32]"] * (option != "lengths")
        return words, (0, 2, 3) if option == "seed" else (2, 3)  # an attention's seed may be any number
    elif use == "describe":
        words = ["describe", name, f"--attention.{option}={value}"]
        if rng.random() < 0.5:
            words = ["describe", name, "--explain", f"{rng.choice(['N', 'M', 'heads', 'batch', 'density'])}={value}"]
    else:
        words = ["check", name, f"--attention.{option}={value}"]
    return words, (0, 1, 2, 3, 5) if use == "check" else (0, 2, 3, 5)


def kept(rng, folder, shared):
    """Files of a run that nest without end, or are huge."""
    place = shared.stopped(folder / "run")
    name = rng.choice([CONFIG, MANIFEST, RECORD, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"])
    deep = rng.choice([10_000, 1_000_000])
    text = rng.choice(["[" * deep, "[" * deep + "]" * deep, '{"a":' * deep, "9" * deep, '"' + "a" * (50 << 20) + '"'])
    (place / name).write_text(text)
    words = rng.choice([["fit", "--resume=run"], ["validate", "--ckpt_path=run", "--run_dir=out"]])
    return words, (0,) if name == RECORD else (2, 3, 6)  # which is not read, or said to hold no digest
