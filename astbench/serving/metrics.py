"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.registry import Collector, Metric

from astbench.serving.engine import Runs

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, attention: str, model: str) -> None:
        self.registry = CollectorRegistry()
        self._processes = _Processes()
        self.registry.register(self._processes)
        about = Gauge("astbench_model", "What is served", ["model", "attention"], registry=self.registry)
        about.labels(model, attention).set(1)
        self.requests = Counter(
            "astbench_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.seconds = self._histogram("astbench_request_seconds", "From a request's arrival to its end")
        self.first = self._histogram(
            "astbench_time_to_first_token_seconds", "From a request's arrival to its first token"
        )
        self.between = self._histogram("astbench_inter_token_seconds", "From one token of a text to its next")
        self.prompt = Counter("astbench_prompt_tokens", "Tokens read", registry=self.registry)
        self.written = Counter("astbench_generated_tokens", "Tokens written", registry=self.registry)
        self.batch = Histogram(
            "astbench_batch_size",
            "Requests in a step of the model",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.inside = Gauge(
            "astbench_requests_in_progress", "Requests that are not answered yet", registry=self.registry
        )

    def watch(self, engine: Runs) -> None:
        """Show an engine's queue."""
        waiting = Gauge("astbench_waiting", "Requests in the queue", registry=self.registry)
        waiting.set_function(lambda: engine.waiting)
        running = Gauge("astbench_running", "Requests in the model", registry=self.registry)
        running.set_function(lambda: engine.running)

    def watch_gpu(self, peak_bytes: Callable[[], int]) -> None:
        """Show the memory of the GPU that the model is on."""
        peak = Gauge("astbench_gpu_peak_bytes", "Most bytes of the GPU so far", registry=self.registry)
        peak.set_function(peak_bytes)

    def watch_processes(self, pids: Callable[[], Sequence[int]]) -> None:
        """Count memory, CPU seconds and open files of these processes, too."""
        self._processes.pids = pids
        count = Gauge("astbench_workers", "Processes that have the model", registry=self.registry)
        count.set_function(lambda: len(pids()))

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(name, what, buckets=_SECONDS, registry=self.registry)


class _Processes(Collector):
    """Memory, CPU seconds and open files of this process and of others, in sum: `process_*` as Prometheus names them.

    Attributes:
        pids: Of the others.
    """

    _SUMMED = frozenset(
        ("process_virtual_memory_bytes", "process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds")
    )

    def __init__(self) -> None:
        self.pids: Callable[[], Sequence[int]] = tuple

    def collect(self) -> Iterable[Metric]:
        """See :class:`prometheus_client.registry.Collector`."""
        found = list(ProcessCollector(registry=None).collect())
        for pid in self.pids():
            others = {m.name: m for m in ProcessCollector(pid=partial(int, pid), registry=None).collect()}
            for metric in found:
                if metric.name in self._SUMMED and metric.name in others:
                    more = others[metric.name].samples[0].value
                    metric.samples = [s._replace(value=s.value + more) for s in metric.samples]
        return found
