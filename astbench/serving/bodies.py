"""What requests may say. An unknown field, or one with a value that is not honoured, is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from astbench.serving.refusals import Refused

Body = TypeVar("Body", bound=BaseModel)

Stop = Annotated[str, Field(min_length=1, max_length=200)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Of a stream: what its chunks say beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class _Generated(_Strict):
    """What both kinds of text generation take; fields with one value only are OpenAI's that change nothing."""

    model: str | None = None
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Stop], Field(max_length=4)] | Stop | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    user: str | None = None
    n: Literal[1] | None = 1
    presence_penalty: Literal[0] | None = 0
    frequency_penalty: Literal[0] | None = 0
    logit_bias: None = None

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(_Generated):
    """`/v1/completions`."""

    prompt: str | Annotated[list[int], Field(min_length=1)]
    max_tokens: int = Field(16, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    best_of: Literal[1] | None = 1
    echo: Literal[False] | None = False
    logprobs: None = None
    suffix: None = None


class Message(_Strict):
    """One turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=50)]
    content: str
    name: str | None = None


class Chat(_Generated):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: Literal[False] | None = False
    top_logprobs: None = None


class Translate(_Strict):
    """`/translate`."""

    text: str


class Ask(_Strict):
    """`/answer`."""

    question: str
    document: str


_FORMS = {
    "prompt": "a text, or a list of at least one token id",
    "stop": "a text of 1 to 200 characters, or a list of at most 4 of them",
    "content": "a text; parts of one (images among them) are not taken",
}
"""What fields may be, where a type of its own is refused and others would not be named."""

_INNER = {*Message.model_fields, *StreamOptions.model_fields}


def parse(kind: type[Body], body: bytes) -> Body:
    """A request's body.

    Raises:
        Refused: no UTF-8, no JSON, or not what is asked for; one line that names the field.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first: Any = error.errors(include_url=False, include_context=False)[0]
    except RecursionError:
        first = {"type": "json_invalid", "loc": (), "msg": "nested too deeply"}
    if first["type"] == "json_invalid":
        raise Refused(400, f"the body is no JSON in UTF-8: {first['msg'].removeprefix('Invalid JSON: ')}")
    names = {*kind.model_fields, *_INNER}
    path = [part for part in first["loc"] if str(part) in names or isinstance(part, int)]
    where = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        name = ".".join(map(str, first["loc"]))[:100]
        raise Refused(400, f"unknown field {name!a}; known are {', '.join(kind.model_fields)}", name)
    field = where or "the body"
    given = f", got {ascii(first['input'])[:60]}" if first["type"] != "missing" else ""
    form = next((_FORMS[str(part)] for part in reversed(path) if str(part) in _FORMS), None)
    said = f"must be {form}" if form and first["type"] != "missing" else first["msg"]
    raise Refused(400, f"{field}: {said}{given}", where or None)
