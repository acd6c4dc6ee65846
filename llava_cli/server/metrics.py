"""What a server has done, for Prometheus."""

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
    """Counts of one server's; `running` and `kept` tell what is so now."""

    def __init__(self, running: Callable[[], int], kept: Callable[[], int]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = its = CollectorRegistry()
        self._requests = Counter("llava_requests", "Chat completions by HTTP status", ["status"], registry=its)
        self._left = Counter("llava_requests_left", "Clients that left before their answer was complete", registry=its)
        self._tokens = Counter(
            "llava_tokens", "Tokens read, found as they were read before, and made", ["kind"], registry=its
        )
        buckets = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
        self._first = Histogram("llava_first_token_seconds", "Until the first token", buckets=buckets, registry=its)
        self._whole = Histogram("llava_answer_seconds", "Until an answer was complete", buckets=buckets, registry=its)
        Gauge("llava_requests_running", "Requests in hand", registry=its).set_function(running)
        Gauge("llava_kept_bytes", "Memory of prompts that were read", registry=its).set_function(kept)

    def answered(self, answer: Answer) -> None:
        self.replied(200)
        self._tokens.labels("read").inc(answer.prompt_tokens - answer.cached_tokens)
        self._tokens.labels("found").inc(answer.cached_tokens)
        self._tokens.labels("made").inc(answer.answer_tokens)
        self._first.observe(answer.first_token_seconds)
        self._whole.observe(answer.total_seconds)

    def replied(self, status: int) -> None:
        self._requests.labels(str(status)).inc()

    def left(self) -> None:
        self._left.inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
