"""Peak memory and time to first token, which only a process of its own can tell.

Each is given a folder of weights, as a user would have it.
"""

import contextlib
import dataclasses
import functools
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.errors import BadInput
from lechat_jax.formats.names import Format
from parity.bench import isolated
from parity.bench.decoders.contestants import (
    SEED,
    Contestant,
    Models,
    contestant_of,
    torch_decoders,
)
from parity.bench.decoders.lechat import (
    QUANTIZED,
    Decoder,
    DtypeName,
    Impl,
    Lechat,
    Prompts,
    random_prompts,
)
from parity.convert import command as convert
from parity.measure import PeakMemory
from parity.report import Row

FORMATS: dict[Impl, Format] = {
    "lechat_jax": "lechat",
    "lechat_torch": "torch",
    "transformers": "hf",
}
WARM = 3  # starts with compiled programs; the median counts


class Folders:
    """The weights of a run as folders, in every format that is asked for, made when it is."""

    def __init__(self, folder: Path, models: Models) -> None:
        self.models = models
        self._folder = folder

    def of(self, who: Contestant) -> Path:
        """The folder of weights in that type, in the format that this one reads."""
        ours = self._folder / f"lechat-{who.dtype}"
        if not ours.exists():
            save_weights(ours, self.models.config, self.models.weights(who.dtype), None)
        if who.impl == "lechat_jax":
            return ours
        theirs = self._folder / f"{FORMATS[who.impl]}-{who.dtype}"
        if not theirs.exists():
            with contextlib.redirect_stdout(io.StringIO()):
                convert.main([str(ours), str(theirs), "--to", FORMATS[who.impl]])
        return theirs

    def weight_bytes(self, dtype: DtypeName) -> int:
        """What all weights of that type take, the embedding table included."""
        return sum(leaf.nbytes for leaf in self.models.weights(dtype).values())


def with_memory(folders: Folders, row: Row, tokens: int, skip: int = 0) -> Row:
    """The row with the peak memory of an isolated process, and its ratio to the weights' bytes.

    llama.cpp has no Python process that could tell.
    """
    who = contestant_of(row)
    if who.impl == "llama.cpp":
        return row
    peak = peak_bytes(folders, who, row.batch, row.context, tokens, skip)
    own = folders.weight_bytes(who.dtype)
    details = {"weight_bytes": own, "peak_over_weights": peak / own if peak else None}
    return dataclasses.replace(row, peak_bytes=peak, details=row.details | details)


def peak_bytes(
    folders: Folders, who: Contestant, batch: int, context: int, tokens: int, skip: int = 0
) -> int | None:
    """Most memory of an isolated process that loads the weights, reads prompts and decodes.

    Above what it takes once its framework is imported and has computed something; on a GPU
    the device's. What of a file is mapped counts while it is. The first `skip` tokens of a
    prompt are not read; see `Decoder.start`.

    Raises:
        BadInput: the process failed.
    """
    prompts = random_prompts(folders.models.config, batch, context, SEED)
    wide = folders.models.wide if who.dtype in QUANTIZED else who.dtype
    failure = f"{who.impl} in {who.dtype} did not run"
    (peak,) = isolated.run(failure, decoded, who.impl, folders.of(who), wide, prompts, skip, tokens)
    return peak


def decoded(
    impl: Impl, folder: Path, dtype: str, prompts: Prompts, skip: int, tokens: int
) -> Iterator[int | None]:
    """The job of that process, which yields its peak memory in bytes."""
    load: Callable[[], Decoder]
    if impl == "lechat_jax":
        jax.block_until_ready(jnp.ones(8) @ jnp.ones(8))
        load = functools.partial(Lechat.load, folder, dtype, len(prompts))
    else:
        torch_decoders().start()
        load = functools.partial(torch_decoders().DECODERS[impl].load, folder, dtype)
    with PeakMemory() as memory:
        decoder = load()
        decoder.start(prompts, tokens, skip)
        decoder.advance(tokens)
    yield decoder.device_bytes() or memory.bytes


def first_tokens(folders: Folders, dtype: DtypeName, context: int) -> dict[str, float | None]:
    """Seconds until the first token of `python -m lechat_jax.generate`, by key.

    `cold` is a start without any compiled program, `warm` one that finds those of the last.
    All begins with the process; `after_load` begins when the weights are there.
    """
    folder = folders.of(Contestant("lechat_jax", dtype))
    prompt = random_prompts(folders.models.config, 1, context, SEED)[0]
    with tempfile.TemporaryDirectory(prefix="parity-", ignore_cleanup_errors=True) as cache:
        wide = folders.models.wide if dtype in QUANTIZED else dtype
        cold, *warm = [_first_token(folder, wide, prompt, cache) for _ in range(1 + WARM)]
    loads = [after for _, after in warm if after is not None]
    return {
        "first_token_prompt": context,
        "first_token_cold_s": cold[0],
        "first_token_warm_s": statistics.median(total for total, _ in warm),
        "first_token_cold_after_load_s": cold[1],
        "first_token_warm_after_load_s": statistics.median(loads) if loads else None,
    }


def _first_token(
    folder: Path, dtype: DtypeName, prompt: list[int], cache: str
) -> tuple[float, float | None]:
    """Seconds from the start to the first token, and from when the weights were loaded."""
    command = [sys.executable, "-m", "lechat_jax.generate", str(folder), "--max-tokens", "1"]
    command += ["--temperature", "0", "--dtype", dtype]
    command += ["--prompt-ids", ",".join(map(str, prompt))]
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"LECHAT_CACHE": cache, "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    with subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen, total = "", 0.0
        while piece := process.stdout.read(1):  # the ids of the prompt, then the first new one
            seen += piece
            if piece.isspace() and len(seen.split()) > len(prompt) and not total:
                total = time.perf_counter() - began
        told = process.stderr.read()
    if process.returncode or not total:
        why = isolated.reason(process.returncode, told)
        raise BadInput(f"lechat_jax.generate gave no token: {why}")
    after = re.search(r"the first after ([\d.]+) s", told)
    return total, float(after[1]) if after else None
