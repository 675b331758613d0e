"""Metrics of the serving engine in Prometheus's format, under the names that dashboards know."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class Metrics:
    """Counters, gauges and histograms of one engine, with a registry of their own.

    The names are those of vLLM's metrics, with `lechat:` in place of `vllm:`.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"lechat:{name}", what, labels, registry=self.registry)

        def seconds(name: str, what: str) -> Histogram:
            name = f"lechat:{name}_seconds"
            return Histogram(name, what, buckets=SECONDS, registry=self.registry)

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

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Adds a number that is looked up whenever somebody wants the metrics."""
        Gauge(f"lechat:{name}", what, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def note_prefix(self, n_tokens: int, n_cached: int) -> None:
        """Notes a look into the prefix cache."""
        self._queries.inc(n_tokens)
        self._hits.inc(n_cached)

    def note_admitted(self, n_tokens: int, seconds: float) -> None:
        """Notes that a request with a prompt of so many tokens has got a row, and after what."""
        self._prompt.inc(n_tokens)
        self._queued.observe(seconds)

    def note_tokens(self, n: int, seconds: float, is_first: bool) -> None:
        """Notes new tokens of a request, so long after its last or, at first, after it came."""
        self._generated.inc(n)
        times = self._first if is_first else self._between
        for _ in range(n):
            times.observe(seconds / n)
            times = self._between

    def note_finished(self, reason: str, seconds: float) -> None:
        """Notes the end of a request: a reason to stop, "abort" or "error"."""
        self._finished.labels(REASONS.get(reason, reason)).inc()
        self._whole.observe(seconds)
