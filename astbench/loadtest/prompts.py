"""What is asked for: texts of the tasks' own data."""

from __future__ import annotations

from typing import Any

from astbench.errors import ConfigError

PATHS = ("/translate", "/answer", "/v1/completions")


def bodies(path: str, count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Requests for a path, from the demo data of its task; the same ones every time.

    Args:
        path: One of `PATHS`.
        count: How many.
        max_tokens: For texts: tokens to write.

    Raises:
        ConfigError: another path.
    """
    if path == "/translate":
        from astbench.tasks.mt import demo as sentences

        return [{"text": pair.en} for pair in sentences.generate("test", count)]
    if path == "/answer":
        from astbench.tasks.qa import demo as questions

        asked = questions.generate("test", count)
        return [{"question": example.question, "document": example.context} for example in asked]
    if path == "/v1/completions":
        from astbench.tasks.lm.sources import articles, read_demo

        text = read_demo("test", count).text
        prompts = [text[a:b].strip() for a, b in articles(text)]
        options = {"max_tokens": max_tokens, "ignore_eos": True, "stream": True, "return_token_ids": True}
        return [{"prompt": p, **options} for p in prompts if p][:count]
    raise ConfigError(f"--path must be one of {', '.join(PATHS)}, got {path}")
