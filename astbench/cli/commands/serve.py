"""`astbench serve`: a model behind HTTP."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from astbench import console
from astbench.cli.messages import nearest
from astbench.cli.names import check_names, current_options, read_names
from astbench.cli.own_parser import OwnParser
from astbench.cli.processes import check_interpreter
from astbench.errors import CheckpointError, ConfigError, MissingPackageError
from astbench.serving.options import DEFAULTS, KEY, ServeOptions

if TYPE_CHECKING:
    import torch

    from astbench.serving.loading import Served

_USAGE = f"""usage: astbench serve MODEL [--attention=NAME --attention.OPTION=VALUE ...] [options]

Serves a model over HTTP. Models that write: /v1/completions and /v1/chat/completions, as OpenAI's clients call them.
Models that translate: /translate. Models that answer questions about documents: /answer. All of them: /health, /ready,
/metrics.

  MODEL                   a run of `astbench fit` or its checkpoint; the folder of an adapter; a pretrained folder
  --attention=NAME        for a pretrained folder: what is swapped in (default: what it was saved with, else dense)
  --backbone=FOLDER       for an adapter: the model that it belongs to, if it is elsewhere than it says
  --host ADDRESS          where to listen (default: 127.0.0.1, this machine alone)
  --port N                (default: 8000; 0 takes a free one)
  --workers N             processes that have the model; one that dies is replaced (default: {DEFAULTS["workers"]})
  --max_batch N           requests that run together, in each process (default: {DEFAULTS["max_batch"]})
  --queue N               requests that wait; more are refused with 429 (default: {DEFAULTS["queue"]})
  --max_length N          most tokens of a prompt and what is written to it (default: the model's positions)
  --max_body N            most bytes of a request (default: {DEFAULTS["max_body"]:,})
  --timeout SECONDS       for a request, waiting included (default: {DEFAULTS["timeout"]:g})
  --read_timeout SECONDS  for a client to send a request, and to take the answer (default: {DEFAULTS["read_timeout"]:g})
  --drain SECONDS         for running requests after SIGTERM (default: {DEFAULTS["drain"]:g})
  --device NAME           cpu, cuda, cuda:1 (default: cuda where there is one)
  --dtype NAME            of weights and activations: float32, bfloat16 or float16 (default: float32)
  --threads N             torch threads of a process (default with --workers: their share of the cores)
  --chat_template FILE    how a conversation becomes a prompt, where the tokenizer does not say (Jinja)
  --plugins=FILE.py       attentions and tasks of your own

With {KEY}=KEY in the environment, requests must bring `Authorization: Bearer KEY`. See docs/serve.md."""

_PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client")
_DTYPES = ("float32", "bfloat16", "float16")
_OWN = ("device", "dtype", "threads", "chat_template")


def run(words: list[str]) -> int:
    """Load and serve, until a signal comes."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    given, _ = _parse(words)
    options = ServeOptions(**{name: getattr(given, name) for name in DEFAULTS})
    key = os.environ.get(KEY, "")
    if missing := [package for package in _PACKAGES if find_spec(package) is None]:
        raise MissingPackageError(f"astbench serve needs {' and '.join(missing)}: pip install 'astbench[serve]'")
    check_interpreter()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    import torch

    served = load(words, 0)
    device = served.model.device
    if given.chat_template is not None:
        served.tokenizer.chat_template = _template(given.chat_template)
    from astbench.serving.app import build_app
    from astbench.serving.server import run as serve

    app, service = build_app(served, options, key, partial(load, words))
    console.say(f"astbench serve {given.model}")
    console.table(
        {
            "attention": " ".join(f"{name}={value}" for name, value in served.module.attention.items())[:200],
            "device": f"{device}, {given.dtype}, {torch.get_num_threads()} threads",
            **({"workers": f"{options.workers} processes"} if options.workers > 1 else {}),
            "limits": f"{service.limit} tokens, {options.together} at a time, {options.queue} waiting",
            "key": "asked for" if key else f"none; set {KEY} to ask for one",
            **{f"note {number}": note for number, note in enumerate(served.notes, 1)},
        }
    )
    if not key and options.host not in ("127.0.0.1", "::1", "localhost"):
        console.say(f"note: whoever reaches {options.host} may use this model; set {KEY} to ask for a key")
    serve(app, service, options)
    return 0


def load(words: list[str], number: int) -> Served:
    """The model that `astbench serve WORDS` serves, as the process with this number has it.

    Raises:
        AstbenchError: as `serve` does.
    """
    given, rest = _parse(words)
    import torch

    from astbench.serving.threads import one_thread

    if given.threads is not None or given.workers > 1:
        torch.set_num_threads(given.threads or max(1, torch.get_num_threads() // given.workers))
    with one_thread():
        served = _load(given, rest)
        device = _device(given.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", number % torch.cuda.device_count())
        served.place(device, getattr(torch, given.dtype))
    return served


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = OwnParser("serve")
    for name, default in DEFAULTS.items():
        kind = type(default) if default is not None else int
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", choices=_DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--chat_template", type=Path, default=None)
    parser.add_argument("--backbone", default=None)
    given, rest = parser.parse_known_args(words)
    if given.threads is not None and given.threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {given.threads}")
    models = [word for word in rest if not word.startswith("-")]
    if len(models) != 1 or (rest.index(models[0]) and "=" not in rest[rest.index(models[0]) - 1]):
        raise ConfigError(
            f"astbench serve takes one MODEL, got {' '.join(models) or 'none'}; write other options as --NAME=VALUE"
        )
    given.model = models[0]
    rest.remove(given.model)
    return given, rest


def _load(given: argparse.Namespace, rest: list[str]) -> Served:
    """The model that was named, of whichever kind."""
    from astbench.cli.quiet import quiet_libraries
    from astbench.serving import loading

    quiet_libraries()
    path = Path(given.model).expanduser()
    if not path.exists():
        raise CheckpointError(f"{given.model} does not exist")
    if loading.is_adapter(str(path)):
        read_names(rest).attention_options("serve", "--attention")
        return loading.load_adapted(str(path), given.backbone)
    if given.backbone is not None:
        raise ConfigError("--backbone is of an adapter; a run and a pretrained folder bring their own")
    if loading.is_run(str(path)):
        line = read_names([f"--ckpt_path={path}", *rest])
        if others := [option for option in line.others("--ckpt_path")[1:] if option.name != "--config"]:
            hint = nearest(others[0].name, [f"--{name}" for name in (*DEFAULTS, *_OWN)])
            raise ConfigError(f"a run is served as it was trained, and takes no {others[0]}{hint}")
        check_names(line)
        return loading.load_run(str(path), line.configs[0].data)
    line = read_names(rest)
    options = line.attention_options("serve", "--attention")
    if options and line.attention is None:
        raise ConfigError("--attention.OPTION needs --attention=NAME")
    return loading.load_pretrained(
        str(path), line.attention, current_options(line.attention, options) if line.attention else {}
    )


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ConfigError(f"--device={name} is none: {str(error).splitlines()[0][:200]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MissingPackageError(f"--device={name}: there is no CUDA device here")
    return device


def _template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat_template={file} cannot be read: {' '.join(str(error).split())[:200]}") from error
