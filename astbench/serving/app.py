"""The application: which paths a model has."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from astbench.errors import ConfigError
from astbench.serving.answering import Answerer
from astbench.serving.engine import Engine, Runs, Worker
from astbench.serving.front import Front
from astbench.serving.generating import Generating
from astbench.serving.loading import Served
from astbench.serving.metrics import Metrics
from astbench.serving.options import ServeOptions
from astbench.serving.pool import Pool
from astbench.serving.service import Service
from astbench.serving.tasks import Answering, Translating
from astbench.serving.threads import one_thread
from astbench.serving.translating import Translator
from astbench.serving.writing import Writer, check_writes_together
from astbench.tasks.mt.task import Translation
from astbench.tasks.qa.data import TriviaQAData
from astbench.tasks.qa.task import SpanQA
from astbench.tasks.qa.windows import Windower

SENTENCE = 128
"""Most tokens of a sentence where a pretrained model's data says nothing: what `--data.max_length` is by default."""

Route_ = Callable[[Request], Awaitable[Response]]


def build_app(
    served: Served, options: ServeOptions, key: str = "", load: Callable[[int], Served] | None = None
) -> tuple[Front, Service]:
    """The ASGI application and what is behind it.

    Args:
        served: The model. With several processes its weights are dropped here, once they are checked.
        options: The limits.
        key: That requests must bring; empty for none.
        load: Loads the model in the process with this number, for `options.workers` above 1; pickled.

    Raises:
        ConfigError: a model that does not give in a batch what it gives alone.
    """
    metrics = Metrics(served.handle.name, served.name)
    with one_thread():
        worker, routes_of = _of_head(served, options)
    engine: Runs
    if options.workers == 1:
        engine = Engine(worker, options.queue, metrics.batch.observe)
        if served.model.device.type == "cuda":
            metrics.watch_gpu(partial(torch.cuda.max_memory_allocated, served.model.device))
    else:
        assert load is not None
        make = partial(_worker, load, options)
        engine = pool = Pool(make, options.workers, options.max_batch, options.queue, metrics.batch.observe)
        metrics.watch_processes(lambda: pool.pids)
        if served.model.device.type == "cuda":
            metrics.watch_gpu(lambda: pool.gpu_peak)
        served.module.to("meta")
    service = Service(served, engine, options, metrics)
    posts = routes_of(service)
    about = _About(service, list(posts))
    gets = {"/health": about.health, "/ready": about.ready, "/metrics": about.metrics, "/v1/models": about.models}
    routes = [Route(path, act, methods=["POST"]) for path, act in posts.items()]
    routes += [Route(path, act, methods=["GET"]) for path, act in gets.items()]

    @asynccontextmanager
    async def lifespan(_: ASGIApp) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    router = Router(routes, redirect_slashes=False, lifespan=lifespan)
    return Front(router, options, metrics, key, tuple(posts), tuple(gets), service.refuse_early), service


def _worker(load: Callable[[int], Served], options: ServeOptions, number: int) -> Worker:
    """What runs the model in a process of its own."""
    served = load(number)
    with one_thread():
        return _of_head(served, options)[0]


def _of_head(served: Served, options: ServeOptions) -> tuple[Worker, Callable[[Service], dict[str, Route_]]]:
    """What runs a model, and the paths that it has."""
    module = served.module
    if isinstance(module, SpanQA):
        cut = _windower(served, options)
        answerer = Answerer(module, _padding(served), options.max_batch)
        return answerer, lambda service: {"/answer": Answering(service, cut).answer}
    if isinstance(module, Translation):
        longest = min(int(served.data.get("max_length") or SENTENCE), options.max_length or served.limit, served.limit)
        translator = Translator(module, _padding(served), longest, options.max_batch)
        return translator, lambda service: {"/translate": Translating(service, longest).translate}
    check_writes_together(served.model)

    def generating(service: Service) -> dict[str, Route_]:
        routes = Generating(service)
        return {"/v1/completions": routes.completions, "/v1/chat/completions": routes.chat}

    return Writer(served.model, options.max_batch), generating


def _windower(served: Served, options: ServeOptions) -> Windower:
    """Cuts documents as the model's own data were; a pretrained model's as the options of data are by default."""
    default = TriviaQAData()
    length, stride, question = (
        int(served.data.get(name) or getattr(default, name)) for name in ("max_length", "stride", "max_question")
    )
    length = min(length, options.max_length or served.limit, served.limit)
    return Windower(served.tokenizer, length, min(stride, max(0, length - question - 4)), question)


def _padding(served: Served) -> int:
    token = served.tokenizer.pad_token_id
    if token is None:
        raise ConfigError(f"{served.name} has a tokenizer without a padding token")
    return int(token)


class _About:
    """What is told of the server itself."""

    def __init__(self, service: Service, paths: list[str]) -> None:
        self._service, self._paths = service, paths

    async def health(self, request: Request) -> Response:
        """Whether the process is worth keeping: 200, or 503."""
        alive = self._service.engine.alive
        served = self._service.served
        return JSONResponse(
            {
                "status": "ok" if alive else "the model has stopped",
                "model": served.name,
                "attention": served.module.attention,
                "max_length": self._service.limit,
                "paths": self._paths,
            },
            200 if alive else 503,
        )

    async def ready(self, request: Request) -> Response:
        """Whether new requests are taken: 200, or 503."""
        ready = self._service.ready
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return Response(self._service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """OpenAI's list, of one."""
        name = self._service.served.name
        return JSONResponse(
            {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "astbench"}]}
        )
