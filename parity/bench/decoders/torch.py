"""Greedy decoding in PyTorch: lechat_torch and transformers' Mistral. Imported only for a peer."""

import contextlib
import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import transformers
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from lechat_jax.config import MistralConfig
from lechat_jax.formats.folder import read_config
from lechat_torch.cache import Cache as Rings
from lechat_torch.cache import empty_cache
from lechat_torch.generate import left_padded
from lechat_torch.model import Mistral
from parity.bench.decoders.lechat import Prompts
from parity.bench.work import first_line
from parity.peers import lechat_torch
from parity.peers.pytorch import Weights, device, load_state
from parity.peers.transformers import AttentionName, build

PIECE = 4096  # tokens of a prompt that transformers reads in one forward pass
TRIAL = 8  # tokens by which the modes of transformers are compared, in each of its trials
TRIALS = 3
READ_TRIAL = 1024  # tokens by which its two attentions are compared


def start() -> None:
    """Initialises PyTorch: its threads, its device and the first matmul."""
    x = torch.ones(8, device=device())
    (x @ x).item()


def forget_peak() -> None:
    """Empties the GPU's allocator cache and restarts its peak memory statistics."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class _Steps:
    """Decode loop of a PyTorch model; tokens stay on the device, since a look waits for it."""

    def __init__(self) -> None:
        self.note = ""
        self._made: list[Int[Tensor, "B 1"]] = []

    @property
    def ids(self) -> list[list[int]]:
        """See `Decoder.ids`."""
        return torch.cat(self._made, dim=1).tolist() if self._made else []

    @torch.inference_mode()
    def advance(self, n: int) -> int:
        """See `Decoder.advance`."""
        for _ in range(n):
            self._made.append(self._next(self._made[-1]))
        self._made[-1].tolist()
        return n

    def device_bytes(self) -> int | None:
        """See `Decoder.device_bytes`."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None

    def _next(self, token: Int[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
        raise NotImplementedError


class LechatTorch(_Steps):
    """The PyTorch reference: chunks into its ring, then a token at a time."""

    def __init__(self, model: Mistral) -> None:
        super().__init__()
        self.model, self.device = model, model.embed.weight.device
        self._cache: Rings = ()
        forget_peak()

    @classmethod
    def around(cls, config: MistralConfig, weights: Weights) -> "LechatTorch":
        """A decoder that computes with these very arrays, by lechat's names."""
        return cls(lechat_torch.build(config, weights, share=True))

    @classmethod
    def load(cls, folder: Path, dtype: str) -> "LechatTorch":
        """The model of a folder that `parity.convert --to torch` wrote."""
        config, _ = read_config(folder)
        state = torch.load(folder / "model.pt", weights_only=True, map_location=device())
        wanted = getattr(torch, dtype)
        model = lechat_torch.empty(config)
        state = {name: tensor.to(wanted) for name, tensor in state.items()}
        load_state(model, config, "torch", state)
        return cls(model)

    @torch.inference_mode()
    def start(self, prompts: Prompts, room: int, skip: int = 0) -> None:
        """See `Decoder.start`."""
        chunk = 64 if self.device.type == "cpu" else 256  # as lechat_jax has it
        tokens, positions = left_padded(prompts, self.device)
        B, T = tokens.shape
        dtype, room = self.model.norm.weight.dtype, T + room
        self._cache = ()  # the last one is given back before the next is made
        self._cache = empty_cache(self.model.config, B, chunk, room, dtype, self.device)
        last = tokens
        for ids, where in _pieces(tokens[:, skip:], positions[:, skip:], chunk):
            last = self.model.extend(ids, where, self._cache)[0][:, -1:].argmax(-1)
        self._position = positions[:, -1:]
        self._made = [last]
        self._made[-1].tolist()

    def _next(self, token: Int[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
        self._position = self._position + 1
        return self.model.extend(token, self._position, self._cache)[0].argmax(-1)


class Mode(NamedTuple):
    """A way for transformers to decode: KV cache, attention, torch.compile or not."""

    cache: Literal["dynamic", "static"]
    attention: AttentionName
    compiled: bool

    def __str__(self) -> str:
        how = "compiled" if self.compiled else "not compiled"
        return f"{self.cache} cache, {self.attention} attention, {how}"


MODES = tuple(Mode(c, a, False) for c in ("dynamic", "static") for a in ("sdpa", "eager"))


class Transformers(_Steps):
    """transformers' Mistral with one of its own caches, and a loop with little around it.

    The loop does what `generate` does of what is needed here: positions, the mask of a static
    cache made outside of what is compiled, the forward pass, the likeliest token.
    """

    def __init__(self, model: Any, mode: Mode = MODES[0]) -> None:
        super().__init__()
        self.model, self.mode, self.device = model, mode, model.device
        # The argument was renamed in transformers 5.
        known = inspect.signature(model.forward).parameters
        self._keyword = "cache" if "cache" in known else "past_key_values"
        self._compiled: dict[Mode, Callable[..., Any]] = {}
        self._cache: Cache | None = None
        self._mask: Tensor | None = None

    @classmethod
    def around(cls, config: MistralConfig, weights: Weights) -> "Transformers":
        """A decoder that computes with these very arrays, by lechat's names.

        Raises:
            BadInput: transformers has no such model.
        """
        model = build(config, weights, share=True)
        forget_peak()  # of the weights that it drew
        return cls(model)

    @classmethod
    def load(cls, folder: Path, dtype: str) -> "Transformers":
        """The model of a folder in Hugging Face's format, as transformers loads it."""
        model = transformers.MistralForCausalLM.from_pretrained(folder, dtype=dtype)
        return cls(cast(Any, model).to(device()))

    @torch.inference_mode()
    def start(self, prompts: Prompts, room: int, skip: int = 0) -> None:
        """See `Decoder.start`; a prompt of up to `PIECE` tokens is one forward pass."""
        self.model.set_attn_implementation(self.mode.attention)
        tokens, positions = left_padded(prompts, self.device)
        tokens, positions = tokens[:, skip:], positions[:1, skip:]
        T = tokens.shape[1]
        if self.mode.cache == "static":
            self._cache = StaticCache(config=self.model.config, max_cache_len=T + room)
        else:
            self._cache = DynamicCache(config=self.model.config)
        self._mask, self._read, self._made = None, 0, []
        last = tokens
        for ids, where in _pieces(tokens, positions, PIECE):
            last = self._forward(self.model.forward, ids, where, None)
        self._position = positions[:, -1:]
        self._made = [last]
        self._made[-1].tolist()

    def _next(self, token: Int[Tensor, "B 1"]) -> Int[Tensor, "B 1"]:
        self._position = self._position + 1
        forward = self._compile() if self.mode.compiled else self.model.forward
        return self._forward(forward, token, self._position, self._step_mask(token))

    def _compile(self) -> Callable[..., Any]:
        if self.mode not in self._compiled:
            # As transformers itself compiles for a GPU: with CUDA graphs.
            how = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._compiled[self.mode] = torch.compile(self.model.forward, mode=how)
        return self._compiled[self.mode]

    def _forward(
        self,
        forward: Callable[..., Any],
        tokens: Int[Tensor, "B T"],
        positions: Int[Tensor, "1 T"],
        mask: Tensor | None,
    ) -> Int[Tensor, "B 1"]:
        self._read += tokens.shape[1]
        given: dict[str, Any] = {self._keyword: self._cache}
        logits = forward(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **given,
        ).logits
        return logits[:, -1:].argmax(-1)

    def _step_mask(self, token: Int[Tensor, "B 1"]) -> Tensor | None:
        """Attention mask of one token over a static cache; the same once the window is full."""
        window = self.model.config.sliding_window
        is_full = window is not None and self._read >= window
        if self.mode.cache == "dynamic" or (is_full and self._mask is not None):
            return self._mask
        given: dict[str, Any] = {self._keyword: self._cache}
        nothing = torch.empty((*token.shape, 0), dtype=self.model.dtype, device=self.device)
        mask = create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=nothing,
            attention_mask=None,
            position_ids=self._position,
            **given,
        )
        self._mask = cast(Tensor, mask) if is_full else None
        return cast(Tensor, mask)


DECODERS = {"lechat_torch": LechatTorch, "transformers": Transformers}


def settle(model: Transformers, prompts: Prompts, may_compile: bool) -> dict[str, float]:
    """Chooses transformers' fastest decoding mode, and notes it; gives the seconds a token of each.

    All modes without compilation are tried, and then the better attention compiled, with
    either cache. A mode that does not work here is noted with its reason.
    """
    window = model.model.config.sliding_window
    if isinstance(window, int):  # a cache that is full is as slow as it gets
        prompts = [prompt[-window:] for prompt in prompts]
    torch.compiler.reset()  # what was compiled for other prompts only counts towards its limit
    notes: list[str] = []
    found = _try(model, MODES, prompts, notes)
    best = min(found, key=found.__getitem__)
    if may_compile:
        compiled = [Mode(cache, best.attention, True) for cache in ("static", "dynamic")]
        found |= _try(model, compiled, prompts, notes)
        best = min(found, key=found.__getitem__)
    model.mode = best
    model.note = "; ".join([str(best), *notes])
    return {str(mode): seconds for mode, seconds in found.items()}


@contextlib.contextmanager
def fastest_prefill(model: Transformers, prompts: Prompts) -> Iterator[None]:
    """Within it, transformers' prefill uses the attention that is faster for such prompts."""
    before = model.mode, model.note
    tried = [prompt[:READ_TRIAL] for prompt in prompts]
    found = {}
    for mode in (mode for mode in MODES if mode.cache == "dynamic"):
        model.mode = mode
        model.start(tried, 1)
        began = time.perf_counter()
        model.start(tried, 1)
        found[mode] = time.perf_counter() - began
    model.mode = min(found, key=found.__getitem__)
    model.note = str(model.mode)
    try:
        yield
    finally:
        model.mode, model.note = before


def _try(
    model: Transformers, modes: Sequence[Mode], prompts: Prompts, notes: list[str]
) -> dict[Mode, float]:
    """Seconds a token of each mode that works."""
    found = {}
    for mode in modes:
        model.mode = mode
        times = []
        try:
            model.start(prompts, (TRIALS + 1) * TRIAL)
            for _ in range(TRIALS + 1):
                began = time.perf_counter()
                model.advance(TRIAL)
                times.append((time.perf_counter() - began) / TRIAL)
        except Exception as error:  # a missing compiler, a bug in it: it fails in many ways
            if not mode.compiled:
                raise
            what = f"torch.compile with a {mode.cache} cache"
            notes.append(f"{what} does not work here: {first_line(error)}")
        else:
            found[mode] = statistics.median(times[1:])  # the first compiles
    return found


def _pieces(
    tokens: Int[Tensor, "B T"], positions: Int[Tensor, "#B T"], chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(tokens.split(chunk, 1), positions.split(chunk, 1), strict=True)
