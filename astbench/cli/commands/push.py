"""`astbench push`: what a run trained, onto Hugging Face's hub, with a model card made from its record."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from pathlib import Path

from astbench import console
from astbench.cli.own_parser import OwnParser
from astbench.errors import ConfigError
from astbench.files.hub import is_repository
from astbench.files.paths import other_kind

_USAGE = """usage: astbench push RUN OWNER/NAME [options]

Writes the weights of a training run as safetensors, with configuration, tokenizer and a model card made from the run's
record, loads them back and compares them, and puts them on Hugging Face's hub. Optimizer states, data, paths of this
machine and tokens stay here.

  RUN               folder of a finished `astbench fit`
  OWNER/NAME        what it is called on the hub
  --adapter         the attention's own weights alone, of a run with --optim.train=attention
  --base OWNER/NAME what the backbone is called on the hub, of a run that took it from a folder
  --license ID      for the card, such as apache-2.0
  --dry-run         upload nothing: show the files and the card
  --out FOLDER      upload nothing: write what would be uploaded to a new folder
  --public          of a repository that is made: everybody can read it (default: private)
  --update          add a commit to a repository that is there already
  --recipes FOLDER  recipes that the command in the card may refer to (default: recipes)

The hub's own login is used (`hf auth login`, or HF_TOKEN). Loaded back: --backbone=OWNER/NAME, or of an adapter
--init_from=hf://OWNER/NAME; the card has the whole line."""


def run(words: list[str]) -> int:
    """Write, check, and upload."""
    if "-h" in words or "--help" in words:
        print(_USAGE)
        return 0
    given = _parse(words)
    from astbench.cli.quiet import quiet_libraries
    from astbench.files.hub import uploaded
    from astbench.files.writing import write_text
    from astbench.sharing import folder as shared
    from astbench.sharing.card import card
    from astbench.sharing.source import check_adapter, finished_run, read_source
    from astbench.tables.repeat import read_recipes

    quiet_libraries()
    finished_run(given.run)  # before anything large is read
    source = read_source(given.run, given.base)
    if given.adapter:
        check_adapter(source)
    recipes = read_recipes(given.recipes) if given.recipes.is_dir() else []
    place = nullcontext(given.out) if given.out else tempfile.TemporaryDirectory(prefix="astbench-")
    with place as name:
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        (shared.write_adapter if given.adapter else shared.write_model)(source, folder)
        text = card(source, given.name, recipes, adapter=given.adapter, license=given.license)
        write_text(folder / shared.CARD, text)
        shared.check_private(source, folder)
        shared.check_loads(source, folder, adapter=given.adapter)
        console.say(f"{given.name}: loaded back, every weight as it was trained")
        console.table({file.name: f"{file.stat().st_size:,} bytes" for file in sorted(folder.iterdir())})
        if given.dry_run:
            console.say(f"\n{text}")
        if given.dry_run or given.out:
            console.say(f"nothing was uploaded{f'; it lies in {folder}' if given.out else ''}")
            return 0
        message = f"{source.handle.name} from {given.run.resolve().name}, by astbench push"
        url = uploaded(folder, given.name, private=not given.public, update=given.update, message=message)
    console.say(f"done: {url}")
    return 0


def _parse(words: list[str]) -> argparse.Namespace:
    parser = OwnParser("push")
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("name", metavar="OWNER/NAME")
    for switch in ("adapter", "dry-run", "public", "update"):
        parser.add_argument(f"--{switch}", action="store_true")
    parser.add_argument("--base", default="")
    parser.add_argument("--license", default="")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipes", type=Path, default=Path("recipes"))
    given = parser.parse_args(words)
    for option, name in (("OWNER/NAME", given.name), ("--base", given.base)):
        if name and not is_repository(name):
            raise ConfigError(f"astbench push: {option} must be a name on the hub such as owner/name, got {name}")
    if not given.run.is_dir():
        raise ConfigError(f"astbench push: {given.run} is not the folder of a run{other_kind(given.run)}")
    if given.out and given.out.exists() and (not given.out.is_dir() or any(given.out.iterdir())):
        raise ConfigError(f"astbench push: --out={given.out} is there already; name a new folder")
    return given
