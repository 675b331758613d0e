"""lechat_torch and transformers as oracles: two PyTorch models, trained and watched alike."""

import abc
import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from jaxtyping import Float, Int
from torch import nn

from lechat_jax.config import MistralConfig
from lechat_torch.cache import empty_cache
from lechat_torch.generate import generate
from lechat_torch.model import Mistral
from parity import names, transformers_peer
from parity.oracle_jax import pieces
from parity.oracles import AdamW, Arrays, Dtype, Gradients, Implementation, Stages, Text, Trajectory

M = TypeVar("M", bound=nn.Module)
Show = Callable[[torch.Tensor, torch.Tensor], None]


class _Watched(abc.ABC, Generic[M]):
    """A PyTorch model as an oracle; what is its own is left to the two below.

    With `share`, it may compute with the arrays that it is given instead of copies, which
    spares memory and forbids training.
    """

    model: M
    layout: names.Format

    def __init__(self, config: MistralConfig, dtype: Dtype, share: bool) -> None:
        self.config, self.share = config, share
        self.dtype: Dtype = dtype
        self.device = transformers_peer.device()
        torch.set_float32_matmul_precision("highest")  # no TensorFloat-32 where rounding is judged

    @abc.abstractmethod
    def logits(self, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        """Of whole sequences [B, T]: scores [B, T, V] in at least float32."""

    @abc.abstractmethod
    def ends(self) -> tuple[nn.Embedding, nn.Linear]:
        """The embedding and the head."""

    @abc.abstractmethod
    def stations(self) -> dict[str, nn.Module]:
        """The modules to watch: those that make `attn.i`, `mlp.i`, `norm.0` and `norm`.

        And the block that reads `embed`.
        """

    def load(self, weights: Arrays) -> None:
        """See `Oracle.load`."""
        shapes = names.shapes(self.config, self.layout)
        state = {}
        for ours, name in names.names(self.config, self.layout).items():
            array = weights[ours] if self.share else np.array(weights[ours])
            tensor = torch.from_numpy(array.reshape(shapes[ours]))
            state[name] = tensor.to(self.device, _dtype(self.dtype))
        if head := names.tied_head(self.config, self.layout):
            state[head] = state[names.names(self.config, self.layout)["embed.kernel"]]
        self.model.load_state_dict(state, assign=True)
        if self.config.tied_embeddings:
            embed, head_module = self.ends()
            head_module.weight = embed.weight

    def forward(self, tokens: Int[np.ndarray, "B T"], first_position: int = 0) -> Stages:
        """See `Oracle.forward`."""
        seen: dict[str, torch.Tensor] = {}

        def show(name: str) -> Show:
            def put(x: torch.Tensor, y: torch.Tensor) -> None:
                seen[name] = x if name == "embed" else y
                if name == "norm":
                    seen["stream"] = x

            return put

        with torch.no_grad(), _watching([(m, show(name)) for name, m in self.stations().items()]):
            seen["logits"] = self.logits(self._tensor(tokens), first_position)
        return {name: _numpy(leaf) for name, leaf in seen.items()}

    def gradients(self, rows: Int[np.ndarray, "B row"]) -> Gradients:
        """See `Oracle.gradients`."""
        self.model.zero_grad(set_to_none=True)
        loss = self._loss(self._tensor(rows))
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        found = Gradients(loss.item(), self._by_lechat_name(grads))
        self.model.zero_grad(set_to_none=True)
        return found

    def train(self, steps: Int[np.ndarray, "steps B row"], adamw: AdamW) -> Trajectory:
        """See `Oracle.train`; the optimiser is PyTorch's. The weights are put back afterwards."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=adamw.rate,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.eps,
            weight_decay=adamw.decay,
        )
        losses = []
        for rows in self._tensor(steps):
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(rows)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        after = self._by_lechat_name(dict(self.model.named_parameters()))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(before[name])
        return Trajectory(np.array(losses), after)

    def _modules(self, block: str, attn: str, attn_norm: str, norm: str) -> dict[str, nn.Module]:
        """The stations, by what this implementation calls its modules."""
        layers = [block.format(i=i) for i in range(self.config.n_layers)]
        paths = {f"attn.{i}": f"{layer}.{attn}" for i, layer in enumerate(layers)}
        paths |= {f"mlp.{i}": f"{layer}.mlp" for i, layer in enumerate(layers)}
        paths |= {"embed": layers[0], "norm.0": f"{layers[0]}.{attn_norm}", "norm": norm}
        return {station: self.model.get_submodule(path) for station, path in paths.items()}

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def _tensor(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(self.device)

    def _by_lechat_name(self, tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
        shapes = names.shapes(self.config, "lechat")
        return {
            ours: _numpy(tensors[name]).reshape(shapes[ours])
            for ours, name in names.names(self.config, self.layout).items()
        }


class TorchOracle(_Watched[Mistral]):
    """lechat_torch; see `Oracle`."""

    name: Implementation = "torch"
    layout: names.Format = "torch"

    def __init__(
        self, config: MistralConfig, weights: Arrays, dtype: Dtype, share: bool = False
    ) -> None:
        super().__init__(config, dtype, share)
        with torch.device("meta"):  # its weights come from outside, so none are drawn
            self.model = Mistral(config)
        self.load(weights)

    def logits(self, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        """See `_Watched.logits`."""
        return self.model(tokens, first_position)

    def ends(self) -> tuple[nn.Embedding, nn.Linear]:
        """See `_Watched.ends`."""
        return self.model.embed, self.model.head

    def stations(self) -> dict[str, nn.Module]:
        """See `_Watched.stations`."""
        return self._modules("blocks.{i}", "attn", "attn_norm", "norm")

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """See `Oracle.cached`."""
        B, T = tokens.shape
        ids = self._tensor(tokens)
        found = []
        cache = empty_cache(self.config, B, chunk, T, _dtype(self.dtype), self.device)
        with torch.no_grad():
            for start, end in pieces(T, prompt, chunk):
                positions = torch.arange(start, end, device=self.device).expand(B, -1)
                logits, cache = self.model.extend(ids[:, start:end], positions, cache)
                found.append(_numpy(logits))
        return np.concatenate(found, axis=1)

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """See `Oracle.greedy`."""
        made = generate(self.model, prompts, n, chunk=chunk, context=context)
        return [Text(list(sample.ids), list(sample.logprobs)) for sample in made]


class TransformersOracle(_Watched[transformers.MistralForCausalLM]):
    """transformers' `MistralForCausalLM` with its eager attention; see `Oracle`.

    Raises:
        BadInput: the layers have windows of their own, which that model has not.
    """

    name: Implementation = "transformers"
    layout: names.Format = "hf"

    def __init__(
        self, config: MistralConfig, weights: Arrays, dtype: Dtype, share: bool = False
    ) -> None:
        super().__init__(config, dtype, share)
        self.model = transformers_peer.build(config, None)
        self.model.set_attn_implementation("eager")
        self.model.generation_config.eos_token_id = None  # here no id ends a text
        cast(nn.Module, self.model).to(_dtype(dtype))
        self.load(weights)

    def logits(self, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        """See `_Watched.logits`."""
        positions = first_position + torch.arange(tokens.shape[1], device=self.device)[None]
        logits = self.model(input_ids=tokens, position_ids=positions).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def ends(self) -> tuple[nn.Embedding, nn.Linear]:
        """See `_Watched.ends`."""
        return self.model.model.embed_tokens, self.model.lm_head

    def stations(self) -> dict[str, nn.Module]:
        """See `_Watched.stations`."""
        return self._modules("model.layers.{i}", "self_attn", "input_layernorm", "model.norm")

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """See `Oracle.cached`."""
        ids = self._tensor(tokens)
        # The argument was renamed in transformers 5.
        known = inspect.signature(self.model.forward).parameters
        cache = {
            "cache" if "cache" in known else "past_key_values": transformers.DynamicCache(
                config=self.model.config
            )
        }
        found = []
        with torch.no_grad():
            for start, end in pieces(tokens.shape[1], prompt, chunk):
                out = self.model(
                    input_ids=ids[:, start:end],
                    position_ids=torch.arange(start, end, device=self.device)[None],
                    use_cache=True,
                    **cache,
                )
                found.append(_numpy(out.logits))
        return np.concatenate(found, axis=1)

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """See `Oracle.greedy`; its own `generate`, which reads each prompt in one piece."""
        longest = max(map(len, prompts))
        ids = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        real = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model: Any = self.model  # whose type says that it cannot generate
        made = model.generate(
            self._tensor(ids),
            attention_mask=self._tensor(real),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=n,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            ),
        )
        new = made.sequences[:, longest:].cpu()
        nats = torch.log_softmax(torch.stack(made.logits, dim=1).double().cpu(), dim=-1)
        chosen = nats.gather(2, new[..., None])[..., 0]
        return [Text(new[b].tolist(), chosen[b].tolist()) for b in range(len(prompts))]


@contextlib.contextmanager
def _watching(shows: list[tuple[nn.Module, Show]]) -> Iterator[None]:
    """Within it, each call of these modules is shown, its input and its first output."""

    def hook(show: Show) -> Callable[[nn.Module, tuple, dict, object], None]:
        def see(_: nn.Module, args: tuple, named: dict, out: object) -> None:
            x = args[0] if args else named["hidden_states"]
            made = out[0] if isinstance(out, tuple) else out
            assert isinstance(made, torch.Tensor)
            show(x, made)

        return see

    handles = [module.register_forward_hook(hook(show), with_kwargs=True) for module, show in shows]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dtype(name: Dtype) -> torch.dtype:
    return {
        "float64": torch.float64,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }[name]


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy().copy()  # a view would change with the weights
