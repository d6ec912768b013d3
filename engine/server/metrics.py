"""GET /metrics: what is counted while the server works, in Prometheus' form; nothing is decided here.

Counts are plain numbers, each written by one thread alone; prometheus_client is imported by the first
scrape, and turns them into its text. Names that begin with `vllm:` mean what they mean there, so that
dashboards made for vLLM show them; what only halo has begins with `halo_`.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from engine.observer import Gauges, Observer, Reason

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
# Seconds: from a millisecond to the better part of an hour.
FIRST_TOKEN_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
REQUEST_BUCKETS: Final = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
SUCCESS: Final[dict[str, str]] = {
    "stop": "stop",
    "length": "length",
    "cancelled": "abort",
    "deadline": "abort",
}


class Histogram:
    """Counts of values by bucket; a value that is a bound belongs to its bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, how many were not above it), the last of them +Inf."""
        names = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        total, pairs = 0, []
        for name, count in zip(names, list(self.counts), strict=True):
            total += count
            pairs.append((name, float(total)))
        return pairs


@dataclass
class Metrics(Observer):
    """The counts. `submitted`, `refused` and `request` are the event loop's, the rest the scheduler's."""

    submitted_count: int = 0
    refused_count: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    native_seconds: float = 0.0
    other_seconds: float = 0.0
    decode_entries: int = 0
    prefill_entries: int = 0
    began: float = 0.0  # when the last step ended, by time.monotonic()
    ended: Counter[str] = field(default_factory=Counter)  # requests by reason
    http: Counter[tuple[str, str]] = field(default_factory=Counter)  # (method, status)
    first: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BUCKETS))
    between: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))
    whole: Histogram = field(default_factory=lambda: Histogram(REQUEST_BUCKETS))
    queued: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BUCKETS))
    step_time: Histogram = field(default_factory=lambda: Histogram(TOKEN_BUCKETS))

    def submitted(self) -> None:
        self.submitted_count += 1

    def refused(self) -> None:
        self.refused_count += 1

    def admitted(self, waited_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        self.queued.observe(waited_s)
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens

    def first_token(self, since_submit_s: float) -> None:
        self.first.observe(since_submit_s)
        self.generation_tokens += 1

    def token(self, since_last_s: float, n: int) -> None:
        if n > 0:
            self.between.observe(since_last_s / n, n)
            self.generation_tokens += n

    def finished(self, reason: Reason, prompt_tokens: int, completion_tokens: int, e2e_s: float) -> None:
        self.ended[reason] += 1
        self.whole.observe(e2e_s)

    def step(self, native_s: float, wall_s: float, decode_entries: int, prefill_entries: int) -> None:
        self.steps += 1
        self.native_seconds += native_s
        self.other_seconds += max(0.0, wall_s - native_s)
        self.decode_entries += decode_entries
        self.prefill_entries += prefill_entries
        self.step_time.observe(native_s)
        self.began = time.monotonic()

    def request(self, method: str, status: int) -> None:
        """An HTTP request was answered; 0 where its client left before."""
        known = method if method in ("GET", "POST", "OPTIONS", "HEAD") else "other"
        self.http[known, str(status)] += 1


@dataclass(frozen=True)
class Labels:
    """What the series say of the server: `model` as model_name, the rest in halo_build_info."""

    model: str
    build: dict[str, str]


def render(metrics: Metrics, gauges: Gauges, labels: Labels) -> bytes:
    """The exposition; takes milliseconds and, once, the import of prometheus_client: not for the loop."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.process_collector import ProcessCollector
    from prometheus_client.registry import Collector

    class Ours(Collector):
        def collect(self) -> Iterable[Metric]:
            yield from _of_vllm(metrics, gauges, labels.model)
            yield from _of_halo(metrics, gauges, labels)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Ours())
    ProcessCollector(registry=registry)
    text: bytes = generate_latest(registry)
    return text


def _of_vllm(metrics: Metrics, gauges: Gauges, model: str) -> Iterator[Metric]:
    """What dashboards made for vLLM know, in its sense: prefix queries and hits are tokens."""
    share = gauges.kv_used_tokens / gauges.kv_total_tokens if gauges.kv_total_tokens else 0.0
    make = _Maker(["model_name"], [model])
    yield make.gauge("vllm:num_requests_running", "Requests that run.", gauges.running)
    yield make.gauge("vllm:num_requests_waiting", "Requests that wait for a slot.", gauges.waiting)
    yield make.gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use; 1 is all.", share)
    yield make.counter("vllm:prompt_tokens", "Prompt tokens of admitted requests.", metrics.prompt_tokens)
    yield make.counter("vllm:generation_tokens", "Generated tokens.", metrics.generation_tokens)
    yield make.counter(
        "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", metrics.prompt_tokens
    )
    yield make.counter(
        "vllm:prefix_cache_hits", "Prompt tokens taken from the prefix cache.", metrics.cached_tokens
    )
    ended: Counter[str] = Counter(dict.fromkeys(("stop", "length", "abort"), 0))
    for reason, count in list(metrics.ended.items()):
        if reason in SUCCESS:
            ended[SUCCESS[reason]] += count
    yield make.counters(
        "vllm:request_success", "Requests that ended without an error.", "finished_reason", ended
    )
    for name, what, histogram in (
        ("vllm:time_to_first_token_seconds", "From submission to the first token.", metrics.first),
        ("vllm:inter_token_latency_seconds", "Between two tokens of a sequence.", metrics.between),
        ("vllm:e2e_request_latency_seconds", "From submission to the end.", metrics.whole),
        ("vllm:request_queue_time_seconds", "From submission to a slot.", metrics.queued),
    ):
        yield make.histogram(name, what, histogram)


def _of_halo(metrics: Metrics, gauges: Gauges, labels: Labels) -> Iterator[Metric]:
    build = labels.build
    yield _Maker(list(build), list(build.values())).gauge("halo_build_info", "What runs here.", 1)
    make = _Maker(["model_name"], [labels.model])
    yield make.gauge("halo_slots", "KV slots: sequences that can run at once.", gauges.slots)
    yield make.gauge("halo_kv_used_tokens", "Tokens held in KV slots.", gauges.kv_used_tokens)
    yield make.gauge(
        "halo_kv_total_tokens", "Tokens for which the KV slots have room.", gauges.kv_total_tokens
    )
    yield make.counter("halo_requests_submitted", "Requests taken into the queue.", metrics.submitted_count)
    yield make.counter(
        "halo_requests_refused", "Requests refused: the queue was full.", metrics.refused_count
    )
    ended = Counter(dict.fromkeys(("stop", "length", "cancelled", "deadline", "error"), 0))
    ended.update(dict(metrics.ended))
    yield make.counters("halo_requests_ended", "Requests that ended.", "reason", ended)
    yield make.counter("halo_steps", "Steps of the model.", metrics.steps)
    yield make.counter("halo_step_native_seconds", "Time in the native steps.", metrics.native_seconds)
    yield make.counter(
        "halo_step_other_seconds", "Time of the scheduler around the native steps.", metrics.other_seconds
    )
    entries = Counter(decode=metrics.decode_entries, prefill=metrics.prefill_entries)
    yield make.counters("halo_step_entries", "Tokens run through the model.", "phase", entries)
    yield make.histogram("halo_step_seconds", "Of one native step.", metrics.step_time)
    yield _http(metrics)


def _http(metrics: Metrics) -> Metric:
    from prometheus_client.core import CounterMetricFamily

    family = CounterMetricFamily(
        "halo_http_requests",
        "HTTP requests answered; status 0: the client left before.",
        labels=["method", "status"],
    )
    for (method, status), count in sorted(metrics.http.items()):
        family.add_metric([method, status], count)
    return family


class _Maker:
    """Metric families with the same first labels."""

    def __init__(self, names: list[str], values: list[str]) -> None:
        from prometheus_client import core

        self._core: Any = core
        self._names, self._values = names, values

    def gauge(self, name: str, what: str, value: float) -> Metric:
        return self._with(self._core.GaugeMetricFamily(name, what, labels=self._names), value)

    def counter(self, name: str, what: str, value: float) -> Metric:
        return self._with(self._core.CounterMetricFamily(name, what, labels=self._names), value)

    def _with(self, family: Any, value: float) -> Metric:  # noqa: ANN401
        family.add_metric(self._values, value)
        metric: Metric = family
        return metric

    def counters(self, name: str, what: str, label: str, values: Counter[str]) -> Metric:
        family = self._core.CounterMetricFamily(name, what, labels=[*self._names, label])
        for key, value in values.items():
            family.add_metric([*self._values, key], value)
        metric: Metric = family
        return metric

    def histogram(self, name: str, what: str, histogram: Histogram) -> Metric:
        family = self._core.HistogramMetricFamily(name, what, labels=self._names)
        family.add_metric(self._values, histogram.cumulative(), histogram.sum)
        metric: Metric = family
        return metric
