"""The page: one HTML file that holds its style, its script and its data, and asks nothing of a network."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import Any


def page(contents: dict[str, Any], title: str) -> str:
    """The file's text.

    Args:
        contents: From :func:`astbench.report.contents.contents`.
        title: Of the page.
    """
    assets = files("astbench.report") / "assets"
    parts = {name: (assets / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")}
    # Inside of a script element only `<` could end it or begin a comment.
    data = json.dumps(contents, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    filled = {"title": html.escape(title), "style": parts["page.css"], "data": data, "script": parts["page.js"]}
    # In one go: what a record holds is never taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], parts["page.html"])
