"""Times of streams: time to first token, inter-token latency, tokens a second, percentiles."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Stream(NamedTuple):
    """An answer as it came: when the request was sent, when each event with text was there.

    `new_tokens` and `prompt_tokens` are the server's own count, which it sends at the end.
    """

    sent: float
    events: Sequence[float]
    new_tokens: int
    prompt_tokens: int

    @property
    def ttft(self) -> float:
        """Time to first token, in seconds."""
        return self.events[0] - self.sent


class Span(NamedTuple):
    """A time during which it is measured, and the streams that it may be a part of."""

    began: float
    ended: float
    streams: Sequence[Stream]

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all streams a second; an event counts as the mean of its stream's."""
        n = sum(
            sum(self.began <= at < self.ended for at in stream.events)
            * (stream.new_tokens / len(stream.events))
            for stream in self.streams
            if stream.events
        )
        return n / (self.ended - self.began)

    @property
    def firsts(self) -> list[float]:
        """Time to first token of each request that was sent within, in seconds."""
        within = (s for s in self.streams if self.began <= s.sent < self.ended and s.events)
        return [stream.ttft for stream in within]

    @property
    def gaps(self) -> list[float]:
        """Seconds between two events of a stream, of which the later one came within."""
        pairs = (pair for stream in self.streams for pair in itertools.pairwise(stream.events))
        return [later - one for one, later in pairs if self.began <= later < self.ended]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least of the values that this share of them does not exceed; `None` of no values.

    >>> percentile([3.0, 1.0, 2.0, 4.0], 0.5), percentile([1.0, 2.0], 0.99), percentile([], 0.5)
    (2.0, 2.0, None)
    """
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None
