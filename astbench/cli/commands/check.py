"""`astbench check NAME`: the conformance suite, on any attention, transform or depth policy, ours or a plugin's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from astbench.cli.bounds import check_attention_sizes
from astbench.cli.names import current_options, kind_of, name_of_class, read_names
from astbench.console import say
from astbench.errors import ConfigError
from astbench_registry.depth.registry import depth_of_class, make_depth_config
from astbench_registry.transforms.registry import make_transform_config, transform_of_class

if TYPE_CHECKING:
    from astbench_registry.conformance import Result
    from astbench_registry.findings import Finding


def run(words: list[str]) -> int:
    """Print a table of passes, failures and skips, of several attentions a matrix; 0 when nothing fails."""
    line = read_names(words)
    if line.help:
        print(
            "usage: astbench check NAME... [--attention.OPTION=VALUE...] [--all] [--plugins=FILE.py|MODULE]\n"
            "       astbench check TRANSFORM [--transform.OPTION=VALUE...] [--plugins=FILE.py|MODULE]\n"
            "       astbench check POLICY|--depth=POLICY [--depth.OPTION=VALUE...] [--plugins=FILE.py|MODULE]\n\n"
            "Causality, padding and batch invariance, gradients, decoding, grouped heads, full density, empty rows,\n"
            "poisoned padding, low precision, determinism: pass, fail, or skip with the reason. Of a transform of\n"
            "attention weights: hidden pairs, rows, heads and sequences apart, declared values, dense attention. Of a\n"
            "depth policy: full depth, layers that do not run, batches, padding, causality, gradients, decoding."
        )
        return 0
    words = [*line.words, *([line.depth] if line.depth else [])]
    kinds = {name: kind_of(name) for name in words}
    if others := [name for name in words if kinds[name] != "attention"]:
        kind = kinds[others[0]]
        if len(words) > 1:
            what = {"transform": "transform", "depth": "depth policy"}[kind]
            raise ConfigError(f"astbench check takes one {what} at a time, got {' '.join(words)}")
        check_one = {"transform": _check_transform, "depth": _check_depth}[kind]
        return check_one(others[0], line.attention_options("check", "--depth", "--depth.name", group=kind))
    typed = line.attention_options("check", "--all")
    from astbench_registry import PluginError
    from astbench_registry.registry import config_class, make_config, registered

    names = [name_of_class(name) if ":" in name else name for name in line.words]
    names = names or (list(registered()) if line.has("--all") else [])
    if not names:
        raise ConfigError("astbench check needs a name, or --all; `astbench list` shows the names")
    if typed and len(names) > 1:
        raise ConfigError("options are of one attention: name just one, or leave --attention.OPTION out")
    options = current_options(names[0], typed) if typed else {}
    check_attention_sizes(options)
    from astbench_registry.conformance import buildable, check

    broken: dict[str, str] = {}
    for name in names:
        try:
            make_config(name, {**config_class(name).conformance_options, **options})  # mistakes end before any work
            buildable(name, options)  # a backend that cannot run here is one line, not a page of failures
        except PluginError as error:
            if line.words:
                raise
            broken[name] = str(error)  # somebody's package, which is in nobody else's way
    for name, why in broken.items():
        say(f"{name} left out: {why}")
    names = [name for name in names if name not in broken]
    failed = 0
    matrix: dict[str, list[Result]] = {}
    for name in names:
        matrix[name] = results = check(name, options)
        failed += sum(r.status == "fail" for r in results)
        if len(names) == 1:
            _details(name, results)
        else:
            say(_summary(name, results))
    if len(names) > 1:
        say(_matrix(matrix))
    return 1 if failed else 0


def _check_transform(name: str, options: dict[str, Any]) -> int:
    name = transform_of_class(name) if ":" in name else name
    make_transform_config(name, options)  # mistakes end before torch is loaded
    from astbench_registry.transforms.conformance import check_transform

    return _said(name, check_transform(name, options))


def _check_depth(name: str, options: dict[str, Any]) -> int:
    name = depth_of_class(name) if ":" in name else name
    make_depth_config(name, options)  # mistakes end before torch is loaded
    from astbench.backbones.depth.conformance import check_depth

    return _said(name, check_depth(name, options))


def _said(name: str, results: Sequence[Finding]) -> int:
    width = max(len(r.property) for r in results)
    say(name)
    for r in results:
        say(f"  {r.status:<4}  {r.property:<{width}}  {r.detail}".rstrip())
    counts = {status: sum(r.status == status for r in results) for status in ("pass", "fail", "skip")}
    say(f"  {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped")
    return 1 if counts["fail"] else 0


def _summary(name: str, results: list[Result]) -> str:
    counts = {s: sum(r.status == s for r in results) for s in ("pass", "fail", "skip")}
    lines = [f"{name}: {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped"]
    lines += [f"  fail  {r.property}  {r.pattern}  {r.detail}" for r in results if r.status == "fail"]
    return "\n".join(lines)


def _details(name: str, results: list[Result]) -> None:
    width = max(len(r.property) for r in results)
    say(name)
    for r in results:
        say(f"  {r.status:<4}  {r.property:<{width}}  {r.pattern:<20} {r.detail}")
    say("  " + _summary(name, results).splitlines()[0].partition(": ")[2])


def _matrix(found: dict[str, list[Result]]) -> str:
    """Variant x property: every pattern that the variant has, in one sign; below, why something was skipped."""
    properties = list(dict.fromkeys(r.property for results in found.values() for r in results))
    width = max(map(len, found))
    lines = ["", f"{'':<{width}} {''.join(f'{n:>3}' for n in range(1, len(properties) + 1))}"]
    reasons: dict[str, list[str]] = {}
    for name, results in found.items():
        row = ""
        for wanted in properties:
            mine = [r for r in results if r.property == wanted]
            sign = _sign({r.status for r in mine})
            row += f"{sign:>3}"
            for r in mine:
                who = reasons.setdefault(f"{r.property}: {r.detail}", []) if r.status == "skip" else []
                entry = name if sign == "-" else f"{name} ({r.pattern})"
                if entry not in who:
                    who.append(entry)
        lines.append(f"{name:<{width}} {row}")
    lines += [
        "",
        "+ passes  x fails  - skipped, as its record says  / skipped for some patterns  . no such pattern",
        "",
    ]
    lines += [f"{n:>3} {wanted}" for n, wanted in enumerate(properties, 1)]
    lines += ["", *(f"skipped, {why}: {', '.join(who)}" for why, who in reasons.items())]
    return "\n".join(lines)


def _sign(statuses: set[str]) -> str:
    if "fail" in statuses:
        return "x"
    if len(statuses) == 2:
        return "/"
    return {"pass": "+", "skip": "-"}[statuses.pop()] if statuses else "."
