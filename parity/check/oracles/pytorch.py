"""What the two PyTorch oracles have in common: they are watched and trained alike."""

import abc
import contextlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import nn

from lechat_jax.config import MistralConfig
from lechat_jax.formats import names
from lechat_jax.formats.layouts import stacked_experts
from parity.check.oracles.interface import (
    OF_VISION,
    AdamW,
    Arrays,
    Dtype,
    Gradients,
    Pictures,
    Stages,
    Trajectory,
)
from parity.peers.live_tensors import Tensors, live_name, split
from parity.peers.pytorch import device, load_state, state_dict

M = TypeVar("M", bound=nn.Module)
Show = Callable[[torch.Tensor, torch.Tensor], None]


class Watched(abc.ABC, Generic[M]):
    """A PyTorch model as an oracle; what is its own is left to the two below.

    With `share`, it may compute with the arrays that it is given instead of copies, which
    spares memory and forbids training.
    """

    model: M
    layout: names.Format

    def __init__(self, config: MistralConfig, dtype: Dtype, share: bool) -> None:
        self.config, self.share = config, share
        self.pictures: list[torch.Tensor] = []
        self.patches: torch.Tensor | None = None
        self.dtype: Dtype = dtype
        self.device = device()
        torch.set_float32_matmul_precision("highest")  # no TensorFloat-32 where rounding is judged

    @abc.abstractmethod
    def logits(self, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        """Of whole sequences [B, T]: scores [B, T, V] in at least float32."""

    def show(self, pictures: Pictures, patches: Float[np.ndarray, "rows d"] | None = None) -> None:
        """See `Oracle.show`."""
        self.pictures = [self._floats(picture) for picture in pictures]
        self.patches = None if patches is None else self._floats(patches)

    def _floats(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, torch_dtype(self.dtype))

    def has_images(self, tokens: torch.Tensor) -> bool:
        """Whether a text has image tokens in it."""
        vision = self.config.vision
        if vision is None or not self.pictures:
            return False
        return bool((tokens == vision.image_token_id).any())

    @abc.abstractmethod
    def stations(self) -> dict[str, nn.Module]:
        """The modules to watch: those that make `attn.i`, `mlp.i`, `norm.0` and `norm`.

        And the block that reads `embed`.
        """

    def load(self, weights: Arrays) -> None:
        """See `Oracle.load`."""
        state = state_dict(self.config, self.layout, weights, share=True)
        kind, is_copy = torch_dtype(self.dtype), not self.share
        state = {name: leaf.to(self.device, kind, copy=is_copy) for name, leaf in state.items()}
        load_state(self.model, self.config, self.layout, state)

    def drop(self) -> None:
        """See `Oracle.drop`."""
        for parameter in self.model.parameters():  # of the same shape, in the memory of one number
            parameter.data = torch.zeros((), device=self.device).expand(parameter.shape)

    def forward(self, tokens: Int[np.ndarray, "B T"], first_position: int = 0) -> Stages:
        """See `Oracle.forward`."""
        seen: dict[str, torch.Tensor] = {}

        def show(name: str) -> Show:
            def put(x: torch.Tensor, y: torch.Tensor) -> None:
                seen[name] = x if name == "embed" else y
                if name == "norm":
                    seen["stream"] = x

            return put

        stations = self.stations()
        with (
            torch.no_grad(),
            _fed(stations.get("patches"), self.patches),
            _watching([(module, show(name)) for name, module in stations.items()]),
        ):
            seen["logits"] = self.logits(self._tensor(tokens), first_position)
        if "patches" in seen:  # transformers sees the images of each row anew
            of_vision = [name for name in seen if name.partition(".")[0] in OF_VISION]
            seen |= {name: self._of_one_row(name, seen[name]) for name in of_vision}
        return {name: to_numpy(leaf) for name, leaf in seen.items()}

    def _of_one_row(self, name: str, found: torch.Tensor) -> torch.Tensor:
        """The first images' part of what a station of the tower made, a row in all."""
        tower = self.config.vision
        assert tower is not None
        pixels = sum(picture.shape[1] * picture.shape[2] for picture in self.pictures)
        n = pixels // tower.patch_size**2
        n = n // tower.n_merged if name == "projector" else n
        return found.reshape(-1, found.shape[-1])[None, :n]

    def gradients(self, rows: Int[np.ndarray, "B row"]) -> Gradients:
        """See `Oracle.gradients`."""
        self.model.zero_grad(set_to_none=True)
        loss = self._loss(self._tensor(rows))
        loss.backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        found = Gradients(loss.item(), self.by_lechat_name(grads))
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
        after = self.by_lechat_name(dict(self.model.named_parameters()))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(before[name])
        return Trajectory(np.array(losses), after)

    def _modules(
        self,
        block: str,
        attn: str,
        attn_norm: str,
        norm: str,
        patches: str,
        vision_block: str,
        projector: str,
    ) -> dict[str, nn.Module]:
        """The stations, by what this implementation calls its modules."""
        layers = [block.format(i=i) for i in range(self.config.n_layers)]
        paths = {f"attn.{i}": f"{layer}.{attn}" for i, layer in enumerate(layers)}
        paths |= {f"mlp.{i}": f"{layer}.mlp" for i, layer in enumerate(layers)}
        paths |= {"embed": layers[0], "norm.0": f"{layers[0]}.{attn_norm}", "norm": norm}
        if tower := self.config.vision:
            paths |= {"patches": patches, "projector": projector}
            paths |= {f"vision.{i}": vision_block.format(i=i) for i in range(tower.n_layers)}
        return {station: self.model.get_submodule(path) for station, path in paths.items()}

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.logits(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    def _tensor(self, ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(ids, np.int64)).to(self.device)

    def by_lechat_name(self, tensors: Tensors) -> dict[str, np.ndarray]:
        """The model's tensors, weights or their gradients, named and shaped as in lechat."""
        table, wanted = names.rows(self.config), names.names(self.config, self.layout)
        if self.layout == "hf":
            tensors = split(self.config, tensors)
            wanted = {part: live_name(self.config, name) for part, name in wanted.items()}
        found = {
            part: to_numpy(tensors[name]).reshape(names.shape(self.config, "lechat", table[part]))
            for part, name in wanted.items()
        }
        return stacked_experts(self.config, found)


@contextlib.contextmanager
def _fed(module: nn.Module | None, made: torch.Tensor | None) -> Iterator[None]:
    """Within it, each call of the module gives these rows instead, if there are any."""
    if module is None or made is None:
        yield
        return
    handle = module.register_forward_hook(lambda _, args, out: made.reshape(out.shape))
    try:
        yield
    finally:
        handle.remove()


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


def torch_dtype(name: Dtype) -> torch.dtype:
    """PyTorch's name for it."""
    return getattr(torch, name)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The numbers in float64, in memory of their own."""
    return tensor.detach().double().cpu().numpy().copy()  # a view would change with the weights
