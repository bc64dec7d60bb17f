"""What jsonargparse says of a wrong value, in one line that names the flag. Imports nothing heavy."""

from __future__ import annotations

import difflib
import re


def explain(message: str) -> str:
    """The message about a wrong value; others as they are, cut to a line of reasonable length."""
    message = " ".join(message.split())
    if wrong := re.match(r'Parser key "([^"]+)": Expected a <class \'(\w+)\'>\. Got value: ?(.*)', message):
        example = f" (--{wrong[1]}=[one,two], or --{wrong[1]}+=one to add)" if wrong[2] == "list" else ""
        return f"--{wrong[1]} must be of type {wrong[2]}{example}, got {wrong[3][:100] or 'nothing'}"
    if wrong := re.match(r'Parser key "([^"]+)": Expected a typing.Literal\[(.*?)\]\. Got value: (.*)', message):
        return f"--{wrong[1]} must be one of {wrong[2]}, got {wrong[3][:100]}"
    union = r'Parser key "([^"]+)": Does not validate .*?Subtypes: \[(.*)\] Errors: .* Given value: (.*)'
    if wrong := re.match(union, message):
        flag = "seed" if wrong[1] == "seed_everything" else wrong[1]
        return f"--{flag} must be {_alternatives(wrong[2])}, got {wrong[3][:100]}"
    return message if len(message) < 400 else f"{message[:400]} ..."


def _alternatives(subtypes: str) -> str:
    """A union's members as jsonargparse prints them, in words: literal values first, then types."""
    values = [value for group in re.findall(r"Literal\[(.*?)\]", subtypes) for value in re.findall(r"'([^']+)'", group)]
    types = [name.rpartition(".")[2] for name in re.findall(r"<class '([^']+)'>", subtypes)]
    types = [name for name in types if name not in ("NoneType", "bool")]
    parts = [f"one of {', '.join(dict.fromkeys(values))}"] if values else []
    return " or ".join(parts + [f"of type {name}" for name in types]) or "of another type"


def nearest(word: str, known: list[str]) -> str:
    """` (did you mean ...?)` or nothing."""
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
