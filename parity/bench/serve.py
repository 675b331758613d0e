"""Serving, `lechat serve` beside `transformers serve`: tokens/s, TTFT and ITL for several users."""

import asyncio
import dataclasses
import os
import tempfile
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from rich.console import Console

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import PRESETS
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer, preferred
from parity import make_checkpoint
from parity.bench.convert import quiet
from parity.bench.servers import processes
from parity.bench.servers.client import AFTER, Measured, Request, complete, measure
from parity.bench.servers.processes import Server
from parity.bench.servers.prompts import Prompts
from parity.bench.servers.rows import NOTES, compare, row_of, table
from parity.bench.servers.times import Stream
from parity.bench.work import Work
from parity.convert import command as convert
from parity.report import Report, Row

Impl = Literal["lechat", "transformers"]
TRIAL_USERS = 8  # with which the fastest of a server's modes is chosen


@dataclasses.dataclass(frozen=True)
class Serve(Work):
    """Tokens a second, time to first token (TTFT) and inter-token latency (ITL) of servers.

    Each server streams the completions of users who send the next request as soon as the last one
    is answered. Then a long prompt arrives among them. All servers have the same weights and the
    same requests; they run one after the other, never at the same time.
    """

    model: tuple[str, ...] = ("bench-284m",)
    """Models: presets, of which random weights are made, or folders of checkpoints."""
    impl: tuple[Impl, ...] = ("lechat", "transformers")
    """Servers to measure."""
    mode: Literal["fastest", "sequential", "continuous-batching"] = "fastest"
    """How transformers serves: one request at a time, several, or as is faster with 8 users."""
    users: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of users, measured one after the other."""
    rows: int = 8
    """Requests that lechat decodes together; others wait."""
    prompt_tokens: int = 64
    """Mean tokens of a prompt; they have from half to one and a half times as many."""
    new_tokens: int = 64
    """Mean tokens of an answer, likewise."""
    long_prompt: int = 4000
    """Tokens of the long prompt; 0 leaves it out."""
    seconds: float = 30.0
    """Seconds of usual traffic that are measured for each number of users."""
    warm_up: float = 5.0
    """Seconds of traffic before them, which are not measured."""
    rounds: int = 1
    """Times that each server is started and measured, in turn."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and of the arithmetic."""
    seed: int = 0
    """Seed of weights and prompts."""

    COUNTS = ("users", "rows", "prompt_tokens", "new_tokens", "rounds")
    AMOUNTS = (*Work.AMOUNTS, "seconds", "warm_up")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.long_prompt < 0:
            raise BadInput("--long-prompt must be at least 1, or 0 to leave it out")
        for name in self.model:
            if name not in PRESETS and not Path(name).is_dir():
                raise BadInput(f"--model: {name} is neither a preset nor a folder")

    @property
    def context(self) -> int:
        """Tokens of the longest request, prompt and answer."""
        return max(2 * (self.prompt_tokens + self.new_tokens), self.long_prompt + AFTER)

    def run(self, console: Console) -> Report:
        """See `Work.run`."""
        load = os.getloadavg()[0]
        report = self.report()
        for name in self.model:
            with tempfile.TemporaryDirectory(prefix="parity-") as folder:
                report.rows += self.measure(name, Path(folder), console)
        compare(report.rows)
        report.details["load_average"] = load
        report.notes += [*NOTES, f"load average of the minute before: {load:.2f}"]
        report.show(console, table(report.rows))
        return report

    def measure(self, name: str, folder: Path, console: Console) -> list[Row]:
        """Rows of all servers of a model: for each number of users, without and with long prompt.

        A server that cannot be measured has a row whose note is why.
        """
        console.print(f"making a checkpoint of {name}", markup=False)
        source = self.random(name, folder) if name in PRESETS else name
        folders = {impl: self.converted(source, folder, impl) for impl in self.impl}
        prompts = Prompts(
            tokenizer_in(folders[self.impl[0]]), self.prompt_tokens, self.new_tokens, self.seed
        )
        servers: dict[str, Server] = {}
        results: dict[tuple[str, int], list[Measured]] = {}
        details: dict[str, dict[str, Any]] = {impl: {"model": name} for impl in self.impl}
        notes: dict[str, str] = dict.fromkeys(self.impl, "")
        for number in range(self.rounds):
            for impl in (impl for impl in self.impl if not notes[impl]):
                try:
                    if number == 0:
                        modes = self.modes(impl, folders[impl])
                        tried = self.try_modes(modes, prompts, console)
                        servers[impl] = max(modes, key=lambda mode: tried.get(mode.mode, 0.0))
                        details[impl]["mode"] = servers[impl].mode
                        details[impl]["tried_tokens_per_s"] = tried
                    for users, result in self.traffic(servers[impl], prompts, number, console):
                        results.setdefault((impl, users), []).append(result)
                except BadInput as error:
                    notes[impl] = str(error)
                    console.print(f"{impl}: {error}", markup=False)
        rows = [
            row_of(impl, users, measured, length, self.shared(impl) | details[impl])
            for (impl, users), measured in results.items()
            for length in dict.fromkeys((0, self.long_prompt))
        ]
        failed = [(impl, why) for impl, why in notes.items() if why]
        return rows + [
            row_of(impl, 0, [], 0, self.shared(impl) | details[impl], why) for impl, why in failed
        ]

    def shared(self, impl: str) -> dict[str, Any]:
        """What is the same in all rows of a server."""
        rows = self.rows if impl == "lechat" else None
        return {"dtype": self.dtype, "context": self.context, "rows": rows}

    def random(self, preset: str, folder: Path) -> str:
        """A checkpoint of random weights, in a folder below this one."""
        random = folder / "random"
        flags = ["--preset", preset, "--format", "lechat", "--seed", str(self.seed)]
        with quiet():
            make_checkpoint.main([str(random), *flags, "--dtype", self.dtype])
        return str(without_byte_tokens(random, folder / "without byte tokens"))

    def converted(self, source: str, folder: Path, impl: str) -> Path:
        """The model's weights in the format of a server, in a folder below this one."""
        out = folder / impl
        to = "lechat" if impl == "lechat" else "hf"
        with quiet():
            convert.main([source, str(out), "--to", to, "--dtype", self.dtype])
        return out

    def modes(self, impl: str, folder: Path) -> list[Server]:
        """The ways to run a server."""
        if impl == "lechat":
            return [processes.lechat(folder, self.rows, self.context, self.dtype)]
        modes = processes.transformers(folder, self.dtype)
        return modes if self.mode == "fastest" else [one for one in modes if one.mode == self.mode]

    def try_modes(
        self, modes: Sequence[Server], prompts: Prompts, console: Console
    ) -> dict[str, float]:
        """Tokens a second of each mode that can be run, if there are several."""
        short = dataclasses.replace(
            self, users=(TRIAL_USERS,), long_prompt=0, seconds=self.seconds / 2
        )
        rates: dict[str, float] = {}
        failure: BadInput | None = None
        for server in modes if len(modes) > 1 else ():
            console.print(f"trying {server.impl} {server.mode}", markup=False)
            try:
                for _, result in short.traffic(server, prompts, self.rounds, console):
                    rates[server.mode] = result.usual.tokens_per_s
            except BadInput as error:
                failure = error
        if failure and not rates:
            raise failure
        return rates

    def traffic(
        self, server: Server, prompts: Prompts, number: int, console: Console
    ) -> Iterator[tuple[int, Measured]]:
        """Each number of users and what was measured with them, of one start of a server.

        Raises:
            BadInput: the server cannot be started, has ended or answered with an error.
        """
        with server.running() as port:

            def send(request: Request) -> Coroutine[Any, Any, Stream]:
                return complete(port, server.fields, request)

            # Some allocate or compile at the first request.
            asyncio.run(send(next(prompts.user(self.rounds))))
            for users in self.users:
                seeds = (number, users)
                of_users = [prompts.user(*seeds, user) for user in range(users)]
                long = prompts.long(self.long_prompt, *seeds) if self.long_prompt else None
                result = asyncio.run(measure(send, of_users, self.warm_up, self.seconds, long))
                rate = f"{result.usual.tokens_per_s:.1f} tokens/s"
                console.print(f"{server.impl}, {users} users: {rate}", markup=False)
                yield users, result


def without_byte_tokens(folder: Path, out: Path) -> Path:
    """A copy of random weights that never chooses a byte of a letter: their logits are 0.

    Bytes in no order are no text, at which another server's streaming decoder ends the request.
    """
    saved, tokenizer = SavedModel.open(folder), tokenizer_in(folder)
    weights = saved.load().weights
    name, bytes_ = saved.config.head, jnp.asarray([*tokenizer.byte_of])
    changed = {name: weights[name].at[bytes_].set(0)}
    save_weights(out, saved.config, weights | changed, tokenizer.path)
    return out


def tokenizer_in(folder: Path) -> Tokenizer:
    """The tokenizer among a model's files.

    Raises:
        BadInput: there is none.
    """
    path = preferred(folder.iterdir())
    if path is None:
        raise BadInput(f"there is no tokenizer in {folder.name}, so it cannot be served")
    return Tokenizer.from_file(path)
