"""Metrics of the serving engine in Prometheus's format, under the names that dashboards know."""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from lechat_jax.serve.engine import Engine, Ticket

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class Metrics:
    """Counters, gauges and histograms of one engine, with a registry of their own.

    The names are those of vLLM's metrics, with `lechat:` in place of `vllm:`.
    """

    def __init__(self, engine: "Engine") -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"lechat:{name}", what, labels, registry=self.registry)

        def seconds(name: str, what: str) -> Histogram:
            name = f"lechat:{name}_seconds"
            return Histogram(name, what, buckets=SECONDS, registry=self.registry)

        gauges = {
            "num_requests_running": ("Requests that have a row.", lambda: engine.n_running),
            "num_requests_waiting": ("Requests that wait.", lambda: engine.n_waiting),
            "kv_cache_usage_perc": ("Rows in use.", lambda: engine.n_running / engine.n_rows),
            "prefix_cache_bytes": ("Snapshots kept.", lambda: engine.prefixes.bytes_held),
        }
        for name, (what, value) in gauges.items():
            Gauge(f"lechat:{name}", what, registry=self.registry).set_function(value)
        self.refused = counter("requests_refused", "Requests refused since the queue was full.")
        self._finished = counter("request_success", "Requests that ended.", "finished_reason")
        self._prompt = counter("prompt_tokens", "Prompt tokens.")
        self._generated = counter("generation_tokens", "Generated tokens.")
        self._queries = counter("prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = counter("prefix_cache_hits", "Prompt tokens found.")
        self._queued = seconds("request_queue_time", "Time until a row was free.")
        self._first = seconds("time_to_first_token", "Time from request to first token.")
        self._between = seconds("inter_token_latency", "Time between two tokens.")
        self._whole = seconds("e2e_request_latency", "Time from request to last token.")

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def note_prefix(self, n_tokens: int, n_cached: int) -> None:
        """Notes a look into the prefix cache."""
        self._queries.inc(n_tokens)
        self._hits.inc(n_cached)

    def note_admitted(self, ticket: "Ticket", now: float) -> None:
        """Notes that a request has got a row."""
        self._prompt.inc(len(ticket.request.prompt))
        self._queued.observe(now - ticket.submitted)

    def note_tokens(self, ticket: "Ticket", n: int, now: float) -> None:
        """Notes new tokens of a request."""
        self._generated.inc(n)
        times = self._between if ticket.has_begun else self._first
        for _ in range(n):
            times.observe((now - ticket.latest) / n)
            times = self._between

    def note_finished(self, ticket: "Ticket", reason: str, now: float) -> None:
        """Notes the end of a request: a reason to stop, "abort" or "error"."""
        self._finished.labels(REASONS.get(reason, reason)).inc()
        self._whole.observe(now - ticket.submitted)
