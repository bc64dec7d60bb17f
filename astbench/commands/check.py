"""`astbench check NAME`: the conformance suite, on any attention, ours or a plugin's."""

from __future__ import annotations

from astbench.errors import ConfigError
from astbench.selection import select


def run(words: list[str]) -> int:
    """Print a table of passes, failures and skips; 0 when nothing fails."""
    everything = "--all" in words
    words = [w for w in words if w != "--all"]
    found = select(words)
    names = [w for w in found.argv if not w.startswith("-")]
    if found.help:
        print(
            "usage: astbench check NAME... [--all] [--plugins=FILE.py|MODULE]\n\n"
            "Causality, padding and batch invariance, gradients, decoding, grouped heads, full density, empty rows,\n"
            "poisoned padding, low precision, determinism: pass, fail, or skip with the reason."
        )
        return 0
    if len(names) < len(found.argv):
        raise ConfigError(f"astbench check takes no {next(w for w in found.argv if w.startswith('-'))}")
    from astbench_registry.registry import config_class, load_plugin, registered

    for position, name in enumerate(names):
        if ":" in name:
            # ./mine.py:Mine checks all that the file registers under that class.
            names[position] = load_plugin(name.rpartition(":")[0])[0]
    names = names or (list(registered()) if everything else [])
    if not names:
        raise ConfigError("astbench check needs a name, or --all; `astbench list` shows the names")
    for name in names:
        config_class(name)  # unknown names end here, before any work

    from astbench_registry.conformance import check

    failed = 0
    for name in names:
        results = check(name)
        width = max(len(r.property) for r in results)
        print(name)
        for r in results:
            print(f"  {r.status:<4}  {r.property:<{width}}  {r.pattern:<20} {r.detail}")
        counts = {s: sum(r.status == s for r in results) for s in ("pass", "fail", "skip")}
        print(f"  {counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped\n")
        failed += counts["fail"]
    return 1 if failed else 0
