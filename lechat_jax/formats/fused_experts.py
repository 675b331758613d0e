"""Kernels of experts that Hugging Face's files of Mistral 4 have in one tensor for a whole layer.

`mlp.experts.gate_up_proj` is [E, 2X, D], of each expert the rows of its gate first, and
`mlp.experts.down_proj` is [E, D, X]. Apart, each kernel has the name that it has in files of
DeepSeek-V3 and in those of quantised copies, such as `mlp.experts.3.gate_proj.weight`.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.stores import Store, Stored

FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)(_scale_inv|_activation_scale)?")
OWN = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
WORDS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def expert_keys(key: str, n_experts: int) -> list[str]:
    """The kernels that a tensor of the files is made of, in its order; none of any other tensor.

    >>> expert_keys("model.layers.0.mlp.experts.gate_up_proj", 2)[1:3]
    ['model.layers.0.mlp.experts.0.up_proj.weight', 'model.layers.0.mlp.experts.1.gate_proj.weight']
    """
    match = FUSED.fullmatch(key)
    if not match or match[3]:
        return []
    return [f"{match[1]}.{e}.{word}.weight" for e in range(n_experts) for word in WORDS[match[2]]]


def fused_key(key: str) -> str:
    """The tensor of the files that has this one in it, which may be itself.

    >>> fused_key("model.layers.0.mlp.experts.3.up_proj.weight"), fused_key("model.norm.weight")
    ('model.layers.0.mlp.experts.gate_up_proj', 'model.norm.weight')
    """
    match = OWN.fullmatch(key)
    if not match:
        return key
    return f"{match[1]}.{'down' if match[3] == 'down' else 'gate_up'}_proj"


def fused(keys: Iterable[str], n_experts: int) -> dict[str, list[str]]:
    """Every tensor of the files by its key, with the keys of what it is made of."""
    whole = dict.fromkeys(fused_key(key) for key in keys)
    return {key: expert_keys(key, n_experts) or [key] for key in whole}


def unfused(store: Store, config: MistralConfig) -> Store:
    """A store in which each expert has kernels and scales of its own, views of the files'.

    Raises:
        BadInput: a tensor is not of all experts.
    """
    tensors: dict[str, Stored] = {}
    for key, one in store.tensors.items():
        match = FUSED.fullmatch(key) if config.latent_attention else None
        if not match:
            tensors[key] = one
        elif match[3] == "_activation_scale":
            tensors[f"{match[1]}.{match[2]}.activation_scale"] = one
        else:
            end = "weight_scale_inv" if match[3] else "weight"
            tensors |= _of_each(one, match[1], WORDS[match[2]], end, config.n_experts)
    return dataclasses.replace(store, tensors=tensors)


def _of_each(
    one: Stored, stem: str, words: tuple[str, ...], end: str, n_experts: int
) -> dict[str, Stored]:
    """What each expert has of a tensor; a scale may be one for all its words."""
    E, *rest = one.shape or (0,)
    n = 1 if end != "weight" and math.prod(rest) == 1 else len(words)
    if E != n_experts or (n > 1 and (not rest or rest[0] % n)):
        raise BadInput(
            f"{one.where} has the shape {list(one.shape)}, which is not of {n_experts} experts"
            + f" that have {n} parts each" * (n > 1)
        )
    shape = (rest[0] // n, *rest[1:]) if rest else ()

    def part(e: int, i: int) -> Stored:
        rows = slice(i % n * shape[0], (i % n + 1) * shape[0]) if shape else ...
        where = f"{words[i]} of expert {e} in {one.where}"
        return dataclasses.replace(one, shape=shape, where=where, read=lambda: one.read()[e][rows])

    places = ((e, i) for e in range(E) for i in range(len(words)))
    return {f"{stem}.{e}.{words[i]}.{end}": part(e, i) for e, i in places}
