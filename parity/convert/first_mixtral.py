"""Files of the first Mixtral-8x7B release, in which all experts of a layer are one tensor.

Its files, `consolidated.00.pt` to `.07.pt`, have different tensors each. In `w1`, `w2` and `w3`
of `layers.N.block_sparse_moe` the experts lie below each other, F rows each; of `w2` what each
has is transposed. Mistral's own program has since split them, which is done here by views.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.stores import Store, Stored
from parity.convert.torch_files import pickle_store

KEY = re.compile(r"(layers\.\d+)\.block_sparse_moe\.(?:(w[123])|gate\.weight)")


def read(files: Sequence[Path], config: MistralConfig) -> Store:
    """The tensors of all files, under the names that Mistral's files have today.

    Raises:
        BadInput: as `pickle_store` does, or the experts are no E kernels.
    """
    found: dict[str, Stored] = {}
    for path in files:
        found |= pickle_store(path).tensors
    tensors: dict[str, Stored] = {}
    for key, one in found.items():
        if not (match := KEY.fullmatch(key)):
            tensors[key] = one
        elif not (kind := match[2]):
            tensors[f"{match[1]}.feed_forward.gate.weight"] = one
        else:
            for e in range(config.n_experts):
                name = f"{match[1]}.feed_forward.experts.{e}.{kind}.weight"
                tensors[name] = _expert(one, config, e, is_transposed=kind == "w2")
    return Store(tensors)


def _expert(one: Stored, config: MistralConfig, e: int, is_transposed: bool) -> Stored:
    F, D = config.hidden_dim, config.dim
    if one.shape != (config.n_experts * F, D):
        raise BadInput(
            f"{one.where} has the shape {list(one.shape)} instead of "
            f"{[config.n_experts * F, D]}, the rows of {config.n_experts} experts"
        )
    if is_transposed:
        return dataclasses.replace(
            one, shape=(D, F), read=lambda: one.read()[e * F : (e + 1) * F].T
        )
    return dataclasses.replace(one, shape=(F, D), read=lambda: one.read()[e * F : (e + 1) * F])
