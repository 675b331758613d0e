"""PyTorch models on lechat's weights: the state dict, the device. Imported only for a peer."""

from collections.abc import Mapping

import jax
import numpy as np
import torch
from jaxtyping import Shaped
from torch import nn

from lechat_jax.config import MistralConfig
from lechat_jax.data.parallel_encoding import cores
from lechat_jax.errors import BadInput
from lechat_jax.formats import names
from lechat_jax.formats.layouts import unstacked
from parity.peers.live_tensors import Tensors, fuse, live_name

Weights = Mapping[str, Shaped[np.ndarray, "..."]] | Mapping[str, Shaped[jax.Array, "..."]]


def device() -> torch.device:
    """The device PyTorch computes on: of the kind that JAX uses, a CPU with all cores.

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


def state_dict(
    config: MistralConfig, layout: names.Format, weights: Weights, share: bool = False
) -> Tensors:
    """The weights as a PyTorch model of that layout has them, by its names and in its shapes.

    With `share` the tensors are views of the arrays' own memory, NumPy's or JAX's; but those of
    transformers' experts and of arrays that are read-only are copies. Else all are copies.
    """

    def tensor(leaf: np.ndarray | jax.Array) -> torch.Tensor:
        if isinstance(leaf, np.ndarray) and not (share and leaf.flags.writeable):
            return torch.tensor(leaf)
        view = torch.from_dlpack(leaf)
        return view if share else view.clone()

    parts = unstacked(config, {name: tensor(leaf) for name, leaf in weights.items()})
    shapes = names.shapes(config, layout)
    state = {
        name: parts[part].reshape(shapes[part])
        for part, name in names.names(config, layout).items()
    }
    return fuse(config, state) if layout == "hf" else state


def load_state(
    model: nn.Module, config: MistralConfig, layout: names.Format, state: Tensors
) -> None:
    """Has a model compute with these very tensors; the head of a tied one is its embedding."""
    head, embed = names.tied_head(config, layout), names.names(config, layout)["embed.kernel"]
    if layout == "hf":
        head, embed = head and live_name(config, head), live_name(config, embed)
    model.load_state_dict(state | ({head: state[embed]} if head else {}), assign=True)
    if head:  # the one parameter, and not another in the same memory
        module = model.get_submodule(head.removesuffix(".weight"))
        module.register_parameter("weight", model.get_parameter(embed))
