"""One process of the benchmark of a card: one model, measured part after part.

It reads a job on stdin and writes a line of JSON for each part as soon as that is over, so that
what was measured is kept when the rest fails or there is no time left for it.
"""

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

from lechat_jax.config import preset
from parity.bench.decoders.contestants import SEED, Contestant, Models, tail, torch_decoders
from parity.bench.decoders.lechat import Decoder, random_prompts
from parity.measure import read_speed

REPETITIONS = 3
COMPILING_S = 60.0  # torch.compile is tried only if there is so much time


class Part(NamedTuple):
    """One thing to measure.

    Attributes:
        work: tokens one after the other, or a prompt.
        batch: rows at once.
        context: tokens read before, or those of the prompt.
    """

    work: Literal["decode", "prefill"]
    batch: int
    context: int


class Worker:
    """A model on the card, and how fast memory is read beside it.

    Attributes:
        until: when there is no more time, in seconds since the epoch.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self.who = Contestant(job["impl"], job["dtype"])
        self.tokens: int = job["tokens"]
        self.until: float = job["until"]
        self.read = read_speed(job["read_gb"])
        self.models = Models(preset(job["preset"]))
        if self.who.dtype == "int8":
            self.models.weights("bfloat16")  # what it is made of, and computed in
        self.decoder = self.models.decoder(self.who)
        self._is_settled = False

    def measure(self, part: Part) -> dict[str, Any]:
        """What the report has of it."""
        config = self.models.config
        prompts = random_prompts(config, part.batch, part.context, SEED)
        tasks: dict[str, Callable[..., dict[str, Any]]] = {
            "decode": self._decode,
            "prefill": self._prefill,
        }
        found = tasks[part.work](part, prompts)
        return found | {
            "peak_bytes": self._peak_bytes(),
            "read_gb_s": self.read.gb_s,
        }

    def _peak_bytes(self) -> int | None:
        """Of the device so far, weights included; not of int8, which is made of the others."""
        peak = self.decoder.device_bytes()
        if peak is None or self.who.dtype == "int8":
            return None
        if self.who.impl == "lechat_jax":
            return peak
        # PyTorch computes with JAX's memory, and does not count it.
        return peak + sum(leaf.nbytes for leaf in self.models.weights(self.who.dtype).values())

    def _decode(self, part: Part, prompts: list[list[int]]) -> dict[str, Any]:
        config, decoder = self.models.config, self.decoder
        if self.who.impl == "transformers" and not self._is_settled:
            may_compile = self.until - time.time() > COMPILING_S
            torch_decoders().settle(decoder, prompts, may_compile)
            self._is_settled = True  # the other parts are decoded in the same way
        skip = part.context - tail(config, part.context)
        decoder.start(prompts, self.tokens * (1 + REPETITIONS), skip)
        decoder.advance(self.tokens)  # compiles
        rates = [self._rate(decoder) for _ in range(REPETITIONS)]
        n_bytes = self.models.bytes_a_step(self.who.dtype, part.batch, part.context)
        steps = statistics.median(rates)
        return {
            "note": decoder.note,
            "tokens_per_s": part.batch * steps,
            "bytes_per_step": n_bytes,
            "share_of_read": steps * n_bytes / 1e9 / self.read.gb_s,
            "limit_tokens_per_s": part.batch * self.read.gb_s * 1e9 / n_bytes,
        }

    def _rate(self, decoder: Decoder) -> float:
        began = time.perf_counter()
        n = decoder.advance(self.tokens)
        return n / (time.perf_counter() - began)

    def _prefill(self, part: Part, prompts: list[list[int]]) -> dict[str, Any]:
        is_peer = self.who.impl == "transformers"
        settled = torch_decoders().reading(self.decoder, prompts) if is_peer else nullcontext()
        times = []
        with settled:
            for _ in range(1 + REPETITIONS):
                began = time.perf_counter()
                self.decoder.start(prompts, 1)
                times.append(time.perf_counter() - began)
            note = self.decoder.note
        seconds = statistics.median(times[1:])  # the first compiles
        speed = part.batch * part.context / seconds
        return {"tokens_per_s": speed, "seconds": seconds, "note": note}


def main() -> None:
    """Measures what the job on stdin asks for, as long as there is time."""
    job = json.load(sys.stdin)
    worker = Worker(job)
    for fields in job["parts"]:
        part = Part(*fields)
        if time.time() > worker.until:
            found: dict[str, Any] = {"note": "not measured: there was no time left"}
        else:
            try:
                found = worker.measure(part)
            except Exception as error:  # such as too little memory: the next part may fit
                traceback.print_exc()
                reason = str(error).strip().splitlines() or [type(error).__name__]
                found = {"note": f"not measured: {reason[0][:200]}"}
        print(json.dumps({"part": part} | found), flush=True)


if __name__ == "__main__":
    main()
