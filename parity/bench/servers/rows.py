"""Rows and table of a serving benchmark, from the times of streams."""

import statistics
from collections.abc import Sequence
from typing import Any

from parity.bench.servers.client import Measured
from parity.bench.servers.times import percentile
from parity.bench.work import cell
from parity.report import Row, TableText

NOTES = [
    "TTFT: from sending a request to its first event with text; ITL: between two such events of a "
    "stream. An event may have several tokens; tokens/s are those that the server counts.",
    "long prompt: from its arrival to its first tokens. Its own TTFT has a column, and the other "
    "figures are of the other streams; max / p50 and max / p99: their largest ITL to their usual.",
    "ratio: tokens/s to those of transformers; x 1 user: to those of the same server with 1 user.",
]
SHARES = {"p50": 0.5, "p99": 0.99, "max": 1.0}


def row_of(
    impl: str,
    users: int,
    measured: Sequence[Measured],
    long_prompt: int,
    shared: dict[str, Any],
    note: str = "",
) -> Row:
    """The row of one number of users.

    Args:
        impl: whose server it is.
        users: how many there were; 0 if it could not be measured, which the note explains.
        measured: what was, in each round; the times of all are taken together.
        long_prompt: tokens of the long prompt that was read meanwhile; 0 is none.
        shared: dtype and context, and what else all rows of the server have in common.
        note: for the reader.
    """
    shared = dict(shared)
    dtype, context = shared.pop("dtype"), shared.pop("context")
    spans = [one.loaded if long_prompt else one.usual for one in measured]
    spans = [span for span in spans if span]
    rates = [span.tokens_per_s for span in spans]
    firsts = [seconds for span in spans for seconds in span.firsts]
    gaps = [seconds for span in spans for seconds in span.gaps]
    long = [one.long.ttft for one in measured if one.long and long_prompt]
    details = {
        "users": users,
        **{f"ttft_{name}_s": percentile(firsts, share) for name, share in SHARES.items()},
        **{f"itl_{name}_s": percentile(gaps, share) for name, share in SHARES.items()},
        "long_prompt": long_prompt,
        "long_ttft_s": statistics.median(long) if long else None,
        "rates": rates,
    }
    rate = statistics.median(rates) if rates else None
    return Row("serve", impl, dtype, 0, context, rate, None, note=note, details=details | shared)


def compare(rows: Sequence[Row]) -> None:
    """Adds how rows compare with those of one user, of transformers and of usual traffic."""
    known = {key_of(row): row for row in rows}
    for row in rows:
        model, impl, users, length = key_of(row)
        alone, peer, usual = (
            known.get(key)
            for key in (
                (model, impl, 1, length),
                (model, "transformers", users, length),
                (model, impl, users, 0),
            )
        )
        details = row.details
        details["speedup"] = quotient(row.tokens_per_s, alone and alone.tokens_per_s)
        details["ratio"] = quotient(row.tokens_per_s, peer and peer.tokens_per_s)
        for name in ("p50", "p99"):
            least = usual.details[f"itl_{name}_s"] if usual and length else None
            details[f"itl_max_to_{name}"] = quotient(details["itl_max_s"], least)


def key_of(row: Row) -> tuple[str, str, int, int]:
    """Model, server, users and length of the long prompt."""
    return row.details["model"], row.impl, row.details["users"], row.details["long_prompt"]


def quotient(one: float | None, other: float | None) -> float | None:
    """The one as a multiple of the other, if both are known."""
    return None if one is None or not other else one / other


def table(rows: Sequence[Row]) -> TableText:
    """The table of the report."""
    seconds = [f"{of}_{name}_s" for of in ("ttft", "itl") for name in SHARES]
    ratios = ("speedup", "ratio", "itl_max_to_p50", "itl_max_to_p99")
    lines = [
        [
            row.impl,
            row.details["model"],
            str(row.details["users"]),
            str(row.details["long_prompt"] or ""),
            cell("{:,.1f}", row.tokens_per_s),
            *(cell("{:,.3f}", row.details[key]) for key in seconds),
            cell("{:,.1f}", row.details["long_ttft_s"]),
            *(cell("{:.2f}", row.details[key]) for key in ratios),
            " ".join(filter(None, (row.details.get("mode"), row.note))),
        ]
        for row in rows
    ]
    header = "serving,model,users,long prompt,tokens/s,TTFT p50,p99,max,ITL p50,p99,max".split(",")
    header += "its TTFT,x 1 user,ratio,max / p50,max / p99,note".split(",")
    return TableText(header, lines)
