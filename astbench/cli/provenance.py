"""Which code that is not astbench's own takes part in a run: files by their sha256, packages by their version."""

from __future__ import annotations

from collections.abc import Sequence

from astbench.tasks import registered_tasks
from astbench_registry.depth.registry import registered_depths
from astbench_registry.plugins import code_facts, import_plugin
from astbench_registry.registry import registered
from astbench_registry.transforms.registry import registered_transforms


def foreign_code(
    attention: str, task: str, plugins: Sequence[str], transform: str | None = None, depth: str | None = None
) -> list[dict[str, str]]:
    """One entry a plugin that was loaded, or an installed package that brings what runs.

    Args:
        attention: Registered name.
        task: Registered name.
        plugins: Files and modules, as they were named.
        transform: Registered name; None for none.
        depth: Registered name; None for none.
    """
    modules = {plugin: import_plugin(plugin).__name__ for plugin in plugins}
    cls, row = registered()[attention].cls, registered_tasks()[task].row
    sources = [
        (registered()[attention].source, cls.__module__ if cls else ""),
        (registered_tasks()[task].source, row.module.partition(":")[0] if row else ""),
    ]
    if transform is not None:
        made = registered_transforms()[transform]
        sources.append((made.source, made.cls.__module__ if made.cls else ""))
    if depth is not None:
        policy = registered_depths()[depth]
        sources.append((policy.source, policy.cls.__module__ if policy.cls else ""))
    for source, module in sources:
        if source != "astbench" and module not in modules.values():
            modules[source] = module
    return [code_facts(source, module) for source, module in modules.items()]
