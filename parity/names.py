"""What every format calls every weight: one row a tensor, read in any direction.

Standard library only. All formats keep the output axes first, so they differ in names, in
whether heads have an axis of their own, and in the order of the rows of queries and keys:
the rotary embedding turns pairs of lanes, which Hugging Face's and lechat's files have half
a head apart, (h, h + H/2), and Mistral's own next to each other, (2h, 2h + 1).
"""

import math
import re
from collections.abc import Collection
from typing import Literal, NamedTuple

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput

Format = Literal["lechat", "hf", "mistral", "torch"]
FORMATS: tuple[Format, ...] = ("lechat", "hf", "mistral", "torch")
SHOWN = 4  # names listed in an error, of those that may be hundreds


class Tensor(NamedTuple):
    """One row: a weight under its name in each format.

    Attributes:
        lechat: here and in training runs; `{i}` is the layer.
        hf: in Hugging Face's files.
        mistral: in Mistral's own, `consolidated.*`.
        torch: in the state dict of `lechat_torch`.
        axes: its shape. What stands in parentheses is one axis in the other formats.
        rotary: whether Mistral's own files have its rows in another order.
    """

    lechat: str
    hf: str
    mistral: str
    torch: str
    axes: str
    rotary: bool = False


TENSORS = (
    Tensor(
        "embed.kernel",
        "model.embed_tokens.weight",
        "tok_embeddings.weight",
        "embed.weight",
        "V D",
    ),
    Tensor(
        "blocks.{i}.attn_norm.scale",
        "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.attention_norm.weight",
        "blocks.{i}.attn_norm.weight",
        "D",
    ),
    Tensor(
        "blocks.{i}.attn.q.kernel",
        "model.layers.{i}.self_attn.q_proj.weight",
        "layers.{i}.attention.wq.weight",
        "blocks.{i}.attn.q.weight",
        "(N H) D",
        rotary=True,
    ),
    Tensor(
        "blocks.{i}.attn.k.kernel",
        "model.layers.{i}.self_attn.k_proj.weight",
        "layers.{i}.attention.wk.weight",
        "blocks.{i}.attn.k.weight",
        "(K H) D",
        rotary=True,
    ),
    Tensor(
        "blocks.{i}.attn.v.kernel",
        "model.layers.{i}.self_attn.v_proj.weight",
        "layers.{i}.attention.wv.weight",
        "blocks.{i}.attn.v.weight",
        "(K H) D",
    ),
    Tensor(
        "blocks.{i}.attn.o.kernel",
        "model.layers.{i}.self_attn.o_proj.weight",
        "layers.{i}.attention.wo.weight",
        "blocks.{i}.attn.o.weight",
        "D (N H)",
    ),
    Tensor(
        "blocks.{i}.mlp_norm.scale",
        "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.ffn_norm.weight",
        "blocks.{i}.mlp_norm.weight",
        "D",
    ),
    Tensor(
        "blocks.{i}.mlp.gate.kernel",
        "model.layers.{i}.mlp.gate_proj.weight",
        "layers.{i}.feed_forward.w1.weight",
        "blocks.{i}.mlp.gate.weight",
        "F D",
    ),
    Tensor(
        "blocks.{i}.mlp.up.kernel",
        "model.layers.{i}.mlp.up_proj.weight",
        "layers.{i}.feed_forward.w3.weight",
        "blocks.{i}.mlp.up.weight",
        "F D",
    ),
    Tensor(
        "blocks.{i}.mlp.down.kernel",
        "model.layers.{i}.mlp.down_proj.weight",
        "layers.{i}.feed_forward.w2.weight",
        "blocks.{i}.mlp.down.weight",
        "D F",
    ),
    Tensor("norm.scale", "model.norm.weight", "norm.weight", "norm.weight", "D"),
)
# Absent from a tied model, whose head is the embedding.
HEAD = Tensor("head.kernel", "lm_head.weight", "output.weight", "head.weight", "V D")

# What early files carry beside the weights, and every reader computes instead.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def rows(config: MistralConfig) -> dict[str, Tensor]:
    """The row of each weight of such a model by lechat's name, the layer filled in."""
    table = TENSORS if config.tied_embeddings else (*TENSORS, HEAD)
    filled = {}
    for row in table:
        for i in range(config.n_layers if "{i}" in row.lechat else 1):
            of_layer = {fmt: getattr(row, fmt).format(i=i) for fmt in FORMATS}
            filled[of_layer["lechat"]] = row._replace(**of_layer)
    return filled


def names(config: MistralConfig, fmt: Format) -> dict[str, str]:
    """The name in a format of each weight of such a model, by lechat's name.

    >>> from lechat_jax.config import preset
    >>> names(preset("lechat-15m"), "mistral")["blocks.5.attn.q.kernel"]
    'layers.5.attention.wq.weight'
    """
    return {name: getattr(row, fmt) for name, row in rows(config).items()}


def tied_head(config: MistralConfig, fmt: Format) -> str | None:
    """The name of the head in a tied model, where a file may repeat the embedding; or None.

    PyTorch lists it in a state dict; the other formats leave it out.
    """
    return getattr(HEAD, fmt) if config.tied_embeddings else None


def shape(config: MistralConfig, fmt: Format, axes: str) -> tuple[int, ...]:
    """The sizes of a row's axes; those in parentheses are one, but in lechat.

    >>> from lechat_jax.config import preset
    >>> config = preset("lechat-15m")
    >>> shape(config, "lechat", "(N H) D"), shape(config, "hf", "(N H) D")
    ((8, 24, 192), (192, 192))
    """
    size = {
        "D": config.dim,
        "N": config.n_heads,
        "K": config.n_kv_heads,
        "H": config.head_dim,
        "F": config.hidden_dim,
        "V": config.vocab_size,
    }
    groups = re.findall(r"\(([^)]*)\)|(\w)", axes)
    parts = [[size[letter] for letter in (inside or single).split()] for inside, single in groups]
    if fmt == "lechat":
        return tuple(n for part in parts for n in part)
    return tuple(math.prod(part) for part in parts)


def shapes(config: MistralConfig, fmt: Format) -> dict[str, tuple[int, ...]]:
    """The shape in a format of each weight of such a model, by lechat's name."""
    return {name: shape(config, fmt, row.axes) for name, row in rows(config).items()}


def match(
    config: MistralConfig, fmt: Format, keys: Collection[str], where: object
) -> dict[str, str]:
    """The key of each weight, by lechat's name, when `keys` are those of such a model.

    A tied model's head may be among them; see `tied_head`.

    Raises:
        BadInput: a weight has no key or a key is no weight's; both differences are listed.
    """
    wanted = names(config, fmt)
    spare = {tied_head(config, fmt)}
    missing = [key for key in wanted.values() if key not in keys]
    known = spare.union(wanted.values())
    extra = [key for key in sorted(keys) if key not in known and not IGNORED.fullmatch(key)]
    if missing or extra:
        said = [f"lacks {_some(missing)}"] if missing else []
        said += [f"has {_some(extra)}, which its config does not know"] if extra else []
        raise BadInput(f"{where} {' and '.join(said)}; config and weights are of different models")
    return wanted


def _some(keys: list[str]) -> str:
    """The first few of the keys, and how many more there are."""
    rest = len(keys) - SHOWN
    return ", ".join(keys[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
