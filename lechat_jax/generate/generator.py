"""A model ready to continue prompts: what the command line, training and servers hold."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lechat_jax.checkpoint.load import free_bytes, load_to_compute
from lechat_jax.checkpoint.saved_model import Trained
from lechat_jax.config import MistralConfig
from lechat_jax.devices.memory import check_fits
from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import Continuation, Sample, join
from lechat_jax.generate.decode import (
    MOST,
    DecodeState,
    Request,
    break_even,
    compile_for,
    decode,
    prefill,
)
from lechat_jax.generate.prefill import CacheSize, best_chunk, cache_size, cached_bytes, left_padded
from lechat_jax.generate.prompt_lookup import SEEN, Repeats, newest
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.cache import Cache, empty_cache
from lechat_jax.model.mistral import Mistral, Weights, bind, weights_of
from lechat_jax.ops.matmul import as_bits
from lechat_jax.quantize.scheme import Format
from lechat_jax.tokenizer.tokenizer import Tokenizer

MOST_DRAFT = 32  # tokens that may be guessed ahead
CONTEXT = 4096  # positions of a layer without a window, unless told otherwise
SHORTER = "ask for a shorter context or fewer samples"
PATIENCE = 0.1  # seconds of decoding until a stream shows something

# What can be continued: a text, or the ids of one, BOS included.
Prompt = str | Sequence[int]
# Is told how many tokens of the longest prompt are read, and of how many; at first of none.
OnRead = Callable[[int, int], None]


class Generator:
    """A model, and how to feed it.

    Two functions are compiled for each number of prompts; nothing else that can be asked
    for, neither lengths nor sampling, compiles anything.

    Attributes:
        config: the model's.
        weights: the model's, by name; the dtype of the norms is what is computed in.
        tokenizer: makes text of ids; without one there are only ids.
        eos_ids: tokens that end a text, unless told otherwise: those given and the tokenizer's.
        chunk: tokens of a prompt that are read at once.
        context: positions that a layer without a window can hold, prompt included.
        on_read: is told how far prompts are read, after each chunk, for which it waits.

    Raises:
        BadInput: chunk or context is below 1, or the tokenizer is another model's.
    """

    def __init__(
        self,
        model: Mistral,
        tokenizer: Tokenizer | None = None,
        *,
        chunk: int | None = None,
        context: int = CONTEXT,
        on_read: OnRead | None = None,
        eos_ids: Collection[int] = (),
    ) -> None:
        self.config: MistralConfig = model.config
        self.weights = weights_of(model)
        self._for_one, self._for_more = (as_bits(self.weights, positions) for positions in (1, 2))
        self.tokenizer = tokenizer
        self.eos_ids = {*eos_ids, *([tokenizer.eos_id] if tokenizer else [])}
        self.chunk = best_chunk() if chunk is None else chunk
        self.context = context
        self.on_read = on_read
        if self.chunk < 1 or context < 1:
            raise BadInput(f"chunk ({self.chunk}) and context ({context}) must be at least 1")
        if tokenizer and tokenizer.vocab_size != self.config.vocab_size:
            raise BadInput(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens and the model "
                f"{self.config.vocab_size}; use the tokenizer that the model was trained with"
            )

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path | str,
        *,
        context: int = CONTEXT,
        dtype: DTypeLike | None = None,
        quantize: Format | None = None,
        batch: int | None = None,
        draft: int = 0,
        on_read: OnRead | None = None,
    ) -> "Generator":
        """The model of a training run's last good checkpoint, or of lechat's weight format.

        Damaged checkpoints that had to be passed over are named on stderr.

        Args:
            folder: of either kind; another format is refused with the command to convert it.
            context: as for the class.
            dtype: to compute in. By default as stored, but float32 on a CPU where that fits into
                memory: several rows at once, and prompts, are faster in it.
            quantize: "int8" to keep the kernels in int8, a quarter of float32, with a scale for
                each output channel; what is stored like that stays so.
            batch: prompts to compile for while the weights are read, so that the first token
                comes sooner; by default nothing is compiled before it is needed.
            draft: as for `stream`, for what is compiled.
            on_read: as for the class.

        Raises:
            BadInput: the folder is neither, is damaged, or has no good checkpoint yet; the
                weights do not fit into memory; or they are stored in several types and none
                was chosen.
        """
        trained = Trained.open(Path(folder))
        tokenizer = trained.tokenizer

        def compile_ahead(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
            if batch is not None:
                compile_for(trained.config, shapes, batch, best_chunk(), context, draft)

        def cached(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
            size = cache_size(trained.config, shapes, batch or 1, best_chunk(), context, draft)
            return cached_bytes(size)

        weights = load_to_compute(trained, dtype, quantize, compile_ahead, cached, SHORTER)
        return cls(
            bind(trained.config, weights),
            tokenizer,
            context=context,
            on_read=on_read,
            eos_ids=trained.eos_ids,
        )

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt: BOS, and those of the text.

        Raises:
            BadInput: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise BadInput("there is no tokenizer beside the weights; give the prompt as ids")
        return [self.tokenizer.bos_id, *self.tokenizer.encode(text)]

    def ids_of(self, prompts: Prompt | Sequence[Prompt]) -> list[Sequence[int]]:
        """The ids of each prompt; one alone is a list of one.

        Raises:
            BadInput: there is no tokenizer for a text.
        """
        is_one = isinstance(prompts, str) or any(isinstance(p, int | np.integer) for p in prompts)
        all_prompts = cast(Sequence[Prompt], [prompts] if is_one else prompts)
        return [
            self.encode(prompt) if isinstance(prompt, str) else prompt for prompt in all_prompts
        ]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] | None = None,
        draft: int = 0,
        first_row: int = 0,
        stop: str | Sequence[str] = (),
    ) -> list[Sample]:
        """What follows each prompt, all made in one batch; the arguments are `stream`'s."""
        rounds = self.stream(prompts, max_tokens, sampling, eos_ids, draft, first_row, stop)
        return [join(pieces) for pieces in zip(*rounds, strict=True)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] | None = None,
        draft: int = 0,
        first_row: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Iterator[list[Sample]]:
        """The next piece for each prompt, again and again until all have stopped.

        The first pieces are of one token, for an early start, and the following ones grow
        as long as they come quickly. No token depends on that, or on the other rows: only
        on the model, the row's prompt and number, and `sampling`.

        Args:
            prompts: texts, or the ids of each, BOS included; at least one, or one alone.
            max_tokens: new tokens for each prompt, or fewer.
            sampling: how tokens are chosen; by default as `Sampling()`.
            eos_ids: tokens that end a text; by default those of the model. Empty: none.
            draft: tokens to guess ahead from the text itself, as `decode` does it: the same
                text sooner, if it repeats itself.
            first_row: number of the first prompt, for draws that differ from batch to batch.
            stop: texts that end a continuation, over all borders of tokens; it is cut before the
                one that is complete first. A text alone is one.

        Raises:
            BadInput: a prompt is empty, longer than the context or not of this vocabulary,
                `max_tokens` or `draft` is out of range, a stop text is empty or there is no
                tokenizer for it, or the cache does not fit into memory.
        """
        prompts = self.ids_of(prompts)
        self.check(prompts, max_tokens, draft)
        eos_ids = self.eos_ids if eos_ids is None else eos_ids
        self.check_memory(len(prompts), draft)
        stop, tokenizer = stop_texts(stop), self.tokenizer
        rows = [
            Continuation(prompt, max_tokens, self.room(len(prompt)), eos_ids, tokenizer, stop)
            for prompt in prompts
        ]
        request = self.request(sampling, eos_ids, len(rows), first_row)
        return self._rounds(prompts, rows, request, draft)

    def empty_cache(self, batch: int, draft: int) -> Cache:
        """A cache for so many rows and for guesses of up to `draft` tokens."""
        return empty_cache(*self._cache_size(batch, draft))

    def read(self, prompts: Sequence[Sequence[int]], cache: Cache, start: int = 0) -> Cache:
        """The cache with all but the last token of each prompt in it, from position `start` on.

        The cache passed in is used up.
        """
        tokens, positions = left_padded(prompts, self.chunk, start)
        weights = self._for(len(prompts) * self.chunk)
        longest = max(map(len, prompts)) - 1
        padding = tokens.shape[1] - longest
        if self.on_read:
            self.on_read(0, longest)
        for begin in range(0, tokens.shape[1], self.chunk):
            part = slice(begin, begin + self.chunk)
            cache = prefill(self.config, weights, cache, tokens[:, part], positions[:, part])
            if self.on_read:
                jax.block_until_ready(cache)
                self.on_read(part.stop - padding, longest)
        return cache

    def request(
        self,
        sampling: Sampling | None,
        eos_ids: Collection[int],
        batch: int,
        first_row: int = 0,
    ) -> Request:
        """What is asked of `decode` for so many rows."""
        sampling = sampling or Sampling()
        ends = np.isin(np.arange(self.config.vocab_size), list(eos_ids))
        streams = sampling.streams(batch, first_row)
        return Request(sampling.controls(batch), streams, jnp.asarray(ends))

    def rounds(
        self,
        state: DecodeState,
        rows: list[Continuation],
        request: Request,
        draft: int,
        prompts: Sequence[Sequence[int]],
    ) -> Iterator[tuple[DecodeState, list[Sample]]]:
        """The state and the pieces after each call of `decode`, until all rows have stopped.

        A state is used up when the next one is asked for. Guesses are made where they would have
        been right of late.
        """
        n, guessing = 1, 0
        repeats = [Repeats(prompt, draft) for prompt in prompts] if draft else []
        is_drawn = bool(np.any(np.asarray(request.controls.temperature) > 0))
        enough = break_even(draft, len(rows), is_drawn)
        while not all(row.stopped for row in rows):
            if draft:
                rates = [r.rate for r, row in zip(repeats, rows, strict=True) if not row.stopped]
                guessing = draft if sum(rates) / len(rates) >= enough else 0
                if state.seen.shape[1] != (SEEN if guessing else 0):
                    seen = newest([r.text for r in repeats], SEEN if guessing else 0)
                    state = state._replace(seen=jnp.asarray(seen))
            began = time.perf_counter()
            weights = self._for(len(rows) * (1 + guessing))
            state, out = decode(self.config, weights, state, request, np.int32(n), guessing)
            ids, logprobs, lengths = jax.device_get((out.ids, out.logprobs, out.length))
            quick = time.perf_counter() - began < PATIENCE
            n = min(MOST, 2 * n) if quick else max(1, n // 2)
            for repeat, row_ids, length in zip(repeats, ids, lengths, strict=bool(repeats)):
                repeat.add(row_ids[:length].tolist())
            pieces = [
                row.take(ids[b, :length].tolist(), logprobs[b, :length].tolist())
                for b, (row, length) in enumerate(zip(rows, lengths, strict=True))
            ]
            if any(row.stopped == "stop" for row in rows):  # of which the loop knows nothing
                is_over = np.array([row.stopped is not None for row in rows])
                left = np.where(is_over, np.int32(0), np.asarray(state.left))
                state = state._replace(left=jnp.asarray(left))
            yield state, pieces

    def room(self, length: int) -> int | None:
        """Tokens that fit behind so many; without end when every layer has a window."""
        return self.context - length if None in self.config.windows else None

    def _for(self, positions: int) -> Weights:
        """The weights as a product of so many positions wants them."""
        return self._for_one if positions == 1 else self._for_more

    def _rounds(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[Continuation],
        request: Request,
        draft: int,
    ) -> Iterator[list[Sample]]:
        if all(row.stopped for row in rows):
            yield [row.take([], []) for row in rows]
            return
        state = self._read(prompts, [row.limit for row in rows], draft)
        for _, pieces in self.rounds(state, rows, request, draft, prompts):
            yield pieces

    def _read(self, prompts: Sequence[Sequence[int]], limits: list[int], draft: int) -> DecodeState:
        """The state after all prompts, from which each row may produce so many tokens."""
        cache = self.read(prompts, self.empty_cache(len(prompts), draft))
        return DecodeState(
            cache=cache,
            token=jnp.asarray([prompt[-1] for prompt in prompts], jnp.int32),
            position=jnp.asarray([len(prompt) - 1 for prompt in prompts], jnp.int32),
            left=jnp.asarray(limits, jnp.int32),
            seen=jnp.asarray(newest(prompts, 0)),
        )

    def check(self, prompts: Sequence[Sequence[int]], max_tokens: int = 0, draft: int = 0) -> None:
        """Raises `BadInput` for what this model cannot continue, or not so far."""
        if not 0 <= max_tokens < 2**31:
            raise BadInput(f"max_tokens must be at least 0 and below 2**31, not {max_tokens}")
        if not 0 <= draft <= MOST_DRAFT:
            raise BadInput(f"draft must be from 0 (off) to {MOST_DRAFT} tokens, not {draft}")
        if not prompts:
            raise BadInput("there is no prompt; give at least one")
        for prompt in prompts:
            if not len(prompt):
                raise BadInput("a prompt has no tokens; an empty text is the BOS token alone")
            for id_ in prompt:
                if not 0 <= id_ < self.config.vocab_size:
                    raise BadInput(
                        f"prompt token {id_} is not an id of the model, which has "
                        f"0 to {self.config.vocab_size - 1}"
                    )
            if (self.room(len(prompt)) or 0) < 0:
                raise BadInput(
                    f"the prompt has {len(prompt)} tokens and the context {self.context}; "
                    "ask for a longer context"
                )

    def check_memory(self, batch: int, draft: int) -> None:
        """Raises `BadInput` when the cache for so many rows would not fit."""
        needed = cached_bytes(self._cache_size(batch, draft))
        free = free_bytes(self.weights["norm.scale"])
        check_fits("the cache takes", needed, free, SHORTER)

    def _cache_size(self, batch: int, draft: int) -> CacheSize:
        return cache_size(self.config, self.weights, batch, self.chunk, self.context, draft)


def stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The texts that end a continuation, of which a text alone is one.

    Raises:
        BadInput: one is empty.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in texts:
        raise BadInput("a stop text is empty; give at least a character to stop at")
    return texts
