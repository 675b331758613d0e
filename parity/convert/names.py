"""What every format calls every weight: one row a tensor, read in any direction.

Standard library only. All formats keep the output axes first, so they differ in names, in
whether heads have an axis of their own, and in the order of the rows of queries and keys:
the rotary embedding turns pairs of lanes, which Hugging Face's and lechat's files have half
a head apart, (h, h + H/2), and Mistral's own next to each other, (2h, 2h + 1).

The kernels of a layer's experts are one weight in lechat and one for each expert in files of
all other formats. Where formats meet, each expert's own is a part of lechat's weight, with a
name of its own: `blocks.0.mlp.experts.3.gate.kernel` of `blocks.0.mlp.experts.gate.kernel`.
What is no expert's is its own part.
"""

import itertools
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
        lechat: here and in training runs; `{i}` is the layer, and in other formats `{e}` the
            expert.
        hf: in Hugging Face's files.
        mistral: in Mistral's own, `consolidated.*`.
        torch: in the state dict of `lechat_torch`.
        axes: its shape. What stands in parentheses is one axis in the other formats.
        rotary: whether Mistral's own files have its rows in another order.
        expert: whose part of lechat's weight it is.
    """

    lechat: str
    hf: str
    mistral: str
    torch: str
    axes: str
    rotary: bool = False
    expert: int | None = None


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
    Tensor("norm.scale", "model.norm.weight", "norm.weight", "norm.weight", "D"),
)
FEED_FORWARD = (
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
)
# The same of several experts, and who chooses among them. transformers 5 has the gates and ups
# of all experts in one tensor while it computes, but not in its files.
MIXTURE = (
    Tensor(
        "blocks.{i}.mlp.router.kernel",
        "model.layers.{i}.block_sparse_moe.gate.weight",
        "layers.{i}.feed_forward.gate.weight",
        "blocks.{i}.mlp.router.weight",
        "E D",
    ),
    Tensor(
        "blocks.{i}.mlp.experts.gate.kernel",
        "model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight",
        "layers.{i}.feed_forward.experts.{e}.w1.weight",
        "blocks.{i}.mlp.experts.{e}.gate.weight",
        "F D",
    ),
    Tensor(
        "blocks.{i}.mlp.experts.up.kernel",
        "model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight",
        "layers.{i}.feed_forward.experts.{e}.w3.weight",
        "blocks.{i}.mlp.experts.{e}.up.weight",
        "F D",
    ),
    Tensor(
        "blocks.{i}.mlp.experts.down.kernel",
        "model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",
        "layers.{i}.feed_forward.experts.{e}.w2.weight",
        "blocks.{i}.mlp.experts.{e}.down.weight",
        "D F",
    ),
)
# Absent from a tied model, whose head is the embedding.
HEAD = Tensor("head.kernel", "lm_head.weight", "output.weight", "head.weight", "V D")

# What early files carry beside the weights, and every reader computes instead.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def rows(config: MistralConfig) -> dict[str, Tensor]:
    """The row of each part of the weights of such a model, the layer and the expert filled in.

    >>> from lechat_jax.config import preset
    >>> row = rows(preset("mixtral-8x7b-v0.1"))["blocks.0.mlp.experts.3.gate.kernel"]
    >>> row.lechat, row.hf
    ('blocks.0.mlp.experts.gate.kernel', 'model.layers.0.block_sparse_moe.experts.3.w1.weight')
    """
    table = (*TENSORS, *(MIXTURE if config.n_experts else FEED_FORWARD))
    table = table if config.tied_embeddings else (*table, HEAD)
    filled = {}
    for row in table:
        layers = range(config.n_layers if "{i}" in row.lechat else 1)
        experts = range(config.n_experts) if "{e}" in row.hf else (None,)
        for i, e in itertools.product(layers, experts):
            of_layer = {fmt: getattr(row, fmt).format(i=i, e=e) for fmt in FORMATS}
            part = of_layer["lechat"].replace(".experts.", f".experts.{e}.")
            filled[part] = row._replace(**of_layer, expert=e)
    return filled


def parts(config: MistralConfig) -> dict[str, list[str]]:
    """The parts of each weight of such a model, by lechat's name: those of its experts, or one."""
    found: dict[str, list[str]] = {}
    for part, row in rows(config).items():
        found.setdefault(row.lechat, []).append(part)
    return found


def names(config: MistralConfig, fmt: Format) -> dict[str, str]:
    """The name in a format of each part of such a model; in lechat, of each weight.

    >>> from lechat_jax.config import preset
    >>> names(preset("lechat-15m"), "mistral")["blocks.5.attn.q.kernel"]
    'layers.5.attention.wq.weight'
    """
    if fmt == "lechat":
        return {row.lechat: row.lechat for row in rows(config).values()}
    return {part: getattr(row, fmt) for part, row in rows(config).items()}


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
        "E": config.n_experts,
    }
    groups = re.findall(r"\(([^)]*)\)|(\w)", axes)
    parts = [[size[letter] for letter in (inside or single).split()] for inside, single in groups]
    if fmt == "lechat":
        return tuple(n for part in parts for n in part)
    return tuple(math.prod(part) for part in parts)


def shapes(config: MistralConfig, fmt: Format) -> dict[str, tuple[int, ...]]:
    """The shape in a format of each part of such a model; in lechat, of each weight."""
    found = {part: shape(config, fmt, row.axes) for part, row in rows(config).items()}
    if fmt != "lechat":
        return found
    return {
        name: found[of[0]] if of == [name] else (len(of), *found[of[0]])
        for name, of in parts(config).items()
    }


def match(
    config: MistralConfig, fmt: Format, keys: Collection[str], where: object
) -> dict[str, str]:
    """The key of each part, or in lechat each weight, when `keys` are those of such a model.

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
