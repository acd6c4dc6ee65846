"""Counters of a server, in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from llava_cli.engine import Answer

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One server's metrics; `running` and `cached_bytes` are called for their current values."""

    def __init__(self, running: Callable[[], int], cached_bytes: Callable[[], int]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        self._requests = Counter("llava_requests", "Chat completions by HTTP status", ["status"], registry=registry)
        self._disconnects = Counter(
            "llava_requests_left", "Clients that left before their answer was complete", registry=registry
        )
        self._tokens = Counter(
            "llava_tokens", "Tokens read, found as they were read before, and made", ["kind"], registry=registry
        )
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self._first_token = Histogram(
            "llava_first_token_seconds", "Until the first token", buckets=buckets, registry=registry
        )
        self._total = Histogram(
            "llava_answer_seconds", "Until an answer was complete", buckets=buckets, registry=registry
        )
        Gauge("llava_requests_running", "Requests in hand", registry=registry).set_function(running)
        Gauge("llava_kept_bytes", "Memory of prompts that were read", registry=registry).set_function(cached_bytes)

    def count_answer(self, answer: Answer) -> None:
        self.count_response(200)
        self._tokens.labels("read").inc(answer.prompt_tokens - answer.cached_tokens)
        self._tokens.labels("found").inc(answer.cached_tokens)
        self._tokens.labels("made").inc(answer.answer_tokens)
        self._first_token.observe(answer.first_token_seconds)
        self._total.observe(answer.total_seconds)

    def count_response(self, status: int) -> None:
        self._requests.labels(str(status)).inc()

    def count_disconnect(self) -> None:
        self._disconnects.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
