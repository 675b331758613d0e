"""Hugging Face's transformers on lechat's weights, and its attention. Imported only for a peer."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
import transformers
from jaxtyping import Float
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lechat_jax.config import MistralConfig
from lechat_jax.formats.configs.hugging_face import to_hugging_face
from parity.peers.pytorch import Weights, device, load_state, state_dict

AttentionName = Literal["eager", "sdpa"]


def drawn(config: MistralConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Transformers' model of that shape, on `device()`, with weights that it draws.

    Of the class that transformers itself takes for such a config: Mistral, Ministral where
    some layers have a window, Ministral 3 where positions are stretched, Mixtral with experts,
    Mistral 4 with latent attention.

    Raises:
        BadInput: transformers has no such model.
    """
    fields = to_hugging_face(config, "float32", positions=None, bos_id=1, eos_id=2)
    words: Any = transformers.AutoConfig.for_model(**fields)
    words.use_cache = False
    (kind,) = fields["architectures"]  # no AutoModelForCausalLM knows Mistral 4
    with device():
        return getattr(transformers, kind)._from_config(words, dtype=dtype)


def build(config: MistralConfig, weights: Weights, share: bool = False) -> Any:
    """Transformers' model with these weights, in their dtype, on `device()`; see `state_dict`.

    Raises:
        BadInput: transformers has no such model.
    """
    state = state_dict(config, "hf", weights, share)
    model = drawn(config, next(iter(state.values())).dtype)
    load_state(model, config, "hf", state)
    return model.to(device())


def image_features(
    config: MistralConfig, weights: Weights
) -> Callable[[Float[np.ndarray, "3 _height _width"]], Float[np.ndarray, "M D"]]:
    """Vision tower and projector with these very weights: from normalised pixels to features.

    Raises:
        BadInput: transformers has no such model.
    """
    model = build(config, weights, share=True).eval()

    def see(pixels: Float[np.ndarray, "3 _height _width"]) -> Float[np.ndarray, "M D"]:
        image = torch.from_numpy(pixels)[None].to(model.device, model.dtype)
        size = torch.tensor([pixels.shape[1:]], device=model.device)
        with torch.inference_mode():
            (found,) = model.get_image_features(image, image_sizes=size).pooler_output
        return found.float().cpu().numpy()

    return see


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
    # What transformers' attention functions ask of the module that calls them.
    caller: Any = SimpleNamespace(num_key_value_groups=q.shape[2] // k.shape[2], is_causal=True)
    cotangent = torch.from_numpy(q).to(where)

    def run() -> object:
        out, _ = sdpa_attention_forward(caller, *tensors, attention_mask=mask[None, None])
        if is_both:
            out = torch.autograd.grad(out, tensors, cotangent)
        if where.type == "cuda":
            torch.cuda.synchronize()
        return out

    return run
