"""`/translate` and `/answer`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from astbench.errors import AstbenchError
from astbench.files.text import plain
from astbench.serving.answering import Answer, Question
from astbench.serving.bodies import Ask, Translate, parse
from astbench.serving.refusals import Refused
from astbench.serving.service import Service
from astbench.serving.translating import Sentence
from astbench.tasks.qa.examples import QAExample
from astbench.tasks.qa.windows import Windower


class Translating:
    """The route of a model that translates.

    Args:
        service: Behind it.
        longest: Most tokens of a sentence.
    """

    def __init__(self, service: Service, longest: int) -> None:
        self._service, self._longest = service, longest

    async def translate(self, request: Request) -> Response:
        """Translates a sentence."""
        body = parse(Translate, request.scope["astbench.body"])
        text, deadline = _said(body.text, "text").strip(), self._service.deadline()
        tokenizer = self._service.served.tokenizer
        tokens = await self._service.text(lambda: list(tokenizer(text, verbose=False)["input_ids"]), deadline)
        if len(tokens) > self._longest:
            raise Refused(400, f"text: {len(tokens)} tokens are more than the {self._longest} of a sentence", "text")
        self._service.metrics.prompt.inc(len(tokens))
        found = await self._service.result(Sentence(tokens), request.receive, deadline)
        written = await self._service.text(lambda: tokenizer.decode(found, skip_special_tokens=True), deadline)
        return JSONResponse({"translation": str(written).strip(), "model": self._service.served.name})


class Answering:
    """The route of a model that reads answers off documents.

    Args:
        service: Behind it.
        windower: Cuts documents.
    """

    def __init__(self, service: Service, windower: Windower) -> None:
        self._service, self._windower = service, windower

    async def answer(self, request: Request) -> Response:
        """Answers a question about a document."""
        body = parse(Ask, request.scope["astbench.body"])
        question, document = _said(body.question, "question"), _said(body.document, "document")
        deadline = self._service.deadline()
        example = QAExample("asked", question, ("",), document, answer_starts=())
        windows = await self._service.text(lambda: self._windower.windows(example), deadline)
        if not windows:
            raise Refused(400, "document: it holds no token", "document")
        self._service.metrics.prompt.inc(sum(len(window.input_ids) for window in windows))
        found: Answer = await self._service.result(Question(example, windows), request.receive, deadline)
        return JSONResponse(
            {
                "answer": found.text,
                "start": found.start,
                "above_null": found.above_null,
                "windows": found.windows,
                "model": self._service.served.name,
            }
        )


def _said(text: str, field: str) -> str:
    """The text as commands read it.

    Raises:
        Refused: it holds nothing, or what no text may hold.
    """
    if not text.strip():
        raise Refused(400, f"{field}: it is empty", field)
    try:
        return plain(text, field)
    except AstbenchError as error:
        raise Refused(400, str(error), field) from error
