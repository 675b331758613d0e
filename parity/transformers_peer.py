"""The peer: Hugging Face's Mistral, trained in PyTorch. Imported only when it is measured."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Bool, Float, Integer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from parity.formats import to_format
from parity.learners import FOREVER, AdamW, Lesson, NotCompiled
from parity.measure import cores, in_turn
from parity.names import rows

AttentionName = Literal["eager", "sdpa"]
PROBES = 3  # timed steps of each attention before one is chosen


class Chosen(NamedTuple):
    """An attention implementation of transformers, and why it."""

    name: AttentionName
    why: str


def to_transformers(
    config: MistralConfig, weights: Mapping[str, Float[np.ndarray, "..."]]
) -> dict[str, Float[torch.Tensor, "..."]]:
    """The weights under transformers' names and in its shapes; nothing is copied."""
    return {
        row.hf: torch.from_numpy(to_format(weights[name], config, "hf", row))
        for name, row in rows(config).items()
    }


def build(
    config: MistralConfig, weights: Mapping[str, Float[np.ndarray, "..."]] | None
) -> transformers.MistralForCausalLM:
    """Transformers' model of that shape with these weights, in float32; `None` leaves its own.

    Raises:
        BadInput: the layers have windows of their own, which transformers' Mistral has not.
    """
    if isinstance(config.sliding_window, tuple):
        raise BadInput("transformers' Mistral has one window for all layers; choose another preset")
    words = transformers.MistralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        sliding_window=config.sliding_window,
        tie_word_embeddings=config.tied_embeddings,
        use_cache=False,
    )
    with device():
        model = transformers.MistralForCausalLM(words)
    if weights is None:
        return model
    tensors = to_transformers(config, weights)
    if config.tied_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


def device() -> torch.device:
    """Where PyTorch computes: on the kind of device that JAX uses, with all cores.

    Raises:
        BadInput: JAX uses a GPU that this PyTorch cannot, or a TPU.
    """
    torch.set_num_threads(cores())
    platform = jax.default_backend()
    if platform == "gpu" and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, as XLA does by default
        return torch.device("cuda")
    if platform != "cpu":
        raise BadInput(
            f"JAX computes on a {platform} but this PyTorch ({torch.__version__}) cannot; "
            "compare on the CPU with JAX_PLATFORMS=cpu, or install PyTorch for the device"
        )
    return torch.device("cpu")


class Peer:
    """transformers' Mistral under PyTorch's own fused AdamW, eager or compiled."""

    def __init__(
        self, lesson: Lesson, adamw: AdamW, attention: AttentionName, compiled: bool
    ) -> None:
        self.lesson, self.adamw = lesson, adamw
        self.model = build(lesson.config, lesson.weights)
        self.model.set_attn_implementation(attention)
        self.device = self.model.device
        kinds = {True: adamw.decay, False: 0.0}
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [p for p in self.model.parameters() if (p.ndim > 1) == decays],
                    "weight_decay": decay,
                }
                for decays, decay in kinds.items()
            ],
            lr=adamw.rate,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.eps,
            fused=True,
        )
        self.compiled = compiled
        # The loss is compiled with the model, so that it can fuse with the head.
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.step = 0
        self.note = f"AdamW at {adamw.rate:g}, {attention} attention"

    def advance(self, n: int, total: int) -> list[float]:
        """See `Learner.advance`.

        Raises:
            NotCompiled: `torch.compile` does not work here.
        """
        losses = []
        for batch in torch.from_numpy(self.lesson.rows(self.step, n)).to(self.device):
            losses.append(self._backward(batch))
            for group in self.optimizer.param_groups:
                group["lr"] = self.adamw.rate * self.adamw.share_of_rate(self.step, total)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
        return torch.stack(losses).tolist()

    def nats(
        self,
        inputs: Integer[np.ndarray, "B T"],
        targets: Integer[np.ndarray, "B T"],
        counted: Bool[np.ndarray, "B T"],
    ) -> float:
        """See `Learner.nats`; never compiled, since its shape is not the training's."""
        ids, wanted = (
            torch.from_numpy(x.astype(np.int64)).to(self.device) for x in (inputs, targets)
        )
        with torch.no_grad():
            logits = self.model(input_ids=ids).logits
            nats = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        return float(nats[torch.from_numpy(counted.ravel()).to(self.device)].sum())

    def device_bytes(self) -> int | None:
        """See `Learner.device_bytes`."""
        return None if self.device.type == "cpu" else torch.cuda.max_memory_allocated(self.device)

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=rows[:, :-1]).logits
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    def _backward(self, rows: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, its gradients being left in the parameters."""
        try:
            loss = self.loss(rows)
            loss.backward()
        except Exception as error:  # a missing compiler, a bug in it: it fails in many ways
            if not self.compiled or self.step:
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise NotCompiled(reason[0]) from error
        return loss.detach()


def fastest_attention(lesson: Lesson) -> Chosen:
    """The attention with which an eager forward and backward pass takes the least time."""
    learner = Peer(lesson, AdamW(rate=0.0), "eager", compiled=False)

    def seconds(name: AttentionName) -> float:
        learner.model.set_attn_implementation(name)
        began = time.perf_counter()
        learner.advance(1, FOREVER)
        return time.perf_counter() - began

    names: tuple[AttentionName, ...] = ("eager", "sdpa")
    for name in names:
        seconds(name)
    times = in_turn({name: lambda name=name: seconds(name) for name in names}, PROBES)
    best, other = sorted(names, key=lambda name: statistics.median(times[name]))
    ratio = statistics.median(times[other]) / statistics.median(times[best])
    return Chosen(best, f"{best} attention takes a step {ratio:.2f} times as fast as {other} here")


class _Heads(torch.nn.Module):
    """What transformers' attention functions ask of the module that calls them."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def sdpa(
    q: Float[np.ndarray, "B T N H"],
    k: Float[np.ndarray, "B T K H"],
    v: Float[np.ndarray, "B T K H"],
    window: int,
    is_both: bool,
) -> Callable[[], object]:
    """Runs window attention as transformers does it in PyTorch, with a mask of T * T.

    `is_both` adds the gradients of queries, keys and values.
    """
    where = device()
    tensors = [
        torch.from_numpy(x).transpose(1, 2).contiguous().to(where).requires_grad_(is_both)
        for x in (q, k, v)
    ]
    i = torch.arange(q.shape[1], device=where)
    mask = (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - window)
    heads = _Heads(q.shape[2] // k.shape[2])
    cotangent = torch.from_numpy(q).to(where)

    def run() -> object:
        out, _ = sdpa_attention_forward(heads, *tensors, attention_mask=mask[None, None])
        if is_both:
            out = torch.autograd.grad(out, tensors, cotangent)
        if where.type == "cuda":
            torch.cuda.synchronize()
        return out

    return run
