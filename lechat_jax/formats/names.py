"""What each format calls each weight, in what shape: Hugging Face, Mistral, GGUF, lechat, torch.

Standard library only. The names are those of `lechat_jax.config.layout`. All formats keep the
output axes first, so they differ in names, in whether heads have an axis of their own, and in the
order of the rows of queries and keys: the rotary embedding rotates pairs of lanes, which Hugging
Face's and lechat's files have half a head apart, (h, h + H/2), and Mistral's own and GGUF next to
each other, (2h, 2h + 1).

The kernels of a layer's experts are one weight in lechat and one for each expert in files of
all other formats but GGUF. Where formats meet, each expert's own is a part of lechat's weight,
with a name of its own: `blocks.0.mlp.experts.3.gate.kernel` of `blocks.0.mlp.experts.gate.kernel`.
What is no expert's is its own part.

A large mixture has 1,739 parts, and everything is asked for each of them: answers are kept.
"""

import functools
import math
import re
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import (
    HEAD,
    TABLE,
    Row,
    is_expert,
    is_projector,
    is_vision,
    layer_of,
    module_of,
    vision_layer_of,
)
from lechat_jax.errors import BadInput

Format = Literal["lechat", "hf", "mistral", "torch", "gguf"]
FORMATS: tuple[Format, ...] = ("lechat", "hf", "mistral", "torch")  # of folders
STACKED: tuple[Format, ...] = ("lechat", "gguf")  # all experts of a layer are one tensor
INTERLEAVED: tuple[Format, ...] = ("mistral", "gguf")  # RoPE's pairs are neighbours
SHOWN = 4  # names listed in an error, of those that may be hundreds
KEPT = 20  # answers kept: five formats of two models, and of models of single layers

# What early files carry beside the weights, and every reader computes instead.
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class Tensor(NamedTuple):
    """A weight, or an expert's part of one, under its name in each format.

    Attributes:
        lechat: here and in training runs.
        hf: in Hugging Face's files.
        mistral: in Mistral's own, `consolidated.*`.
        torch: in the state dict of `lechat_torch`.
        gguf: in GGUF, of all experts' parts the same.
        writes: axes of what it makes, which are one in the other formats.
        reads: axes of what it is multiplied with, likewise.
        rotary: whether Mistral's own files and GGUF have its rows in another order.
        expert: whose part of lechat's weight it is.
        is_split: whether its axes are apart in the other formats too.
    """

    lechat: str
    hf: str
    mistral: str
    torch: str
    gguf: str
    writes: str
    reads: str
    rotary: bool = False
    expert: int | None = None
    is_split: bool = False


def _tensor(name: str, row: Row, expert: int | None = None, sees: bool = False) -> Tensor:
    """The names of a weight, of a model that `sees` images or does not."""
    layer, module = layer_of(name), _of_expert(module_of(name), expert)
    within = "" if layer is None else f"layers.{layer}."
    if is_vision(name):
        hf, mistral = _beginnings(name)
    else:
        hf, mistral = f"{'language_model.' * sees}{within and 'model.'}{within}", within
    end = "bias" if row.is_bias else "weight"
    return Tensor(
        lechat=name,
        hf=f"{hf}{row.hf.format(e=expert)}.{end}",
        mistral=f"{mistral}{row.mistral.format(e=expert)}.{end}",
        torch=f"{module}.{end}",
        gguf=f"{'' if layer is None else f'blk.{layer}.'}{row.gguf}.weight",
        writes=row.writes if expert is None else row.writes[1:],
        reads=row.reads,
        rotary=row.is_rotated,
        expert=expert,
        is_split=row.is_split,
    )


def _beginnings(name: str) -> tuple[str, str]:
    """What comes before a name of the vision tower or the projector, in hf's files and Mistral's.

    >>> _beginnings("vision.blocks.3.attn.q.kernel")
    ('vision_tower.transformer.layers.3.', 'vision_encoder.transformer.layers.3.')
    """
    if is_projector(name):
        return "multi_modal_projector.", ""
    layer = vision_layer_of(name)
    within = "" if layer is None else f"transformer.layers.{layer}."
    return f"vision_tower.{within}", f"vision_encoder.{within}"


def _of_expert(name: str, expert: int | None) -> str:
    return name if expert is None else name.replace(".experts.", f".experts.{expert}.")


@functools.lru_cache(KEPT)
def rows(config: MistralConfig) -> Mapping[str, Tensor]:
    """The names of each part of the weights of such a model.

    >>> from lechat_jax.config import preset
    >>> row = rows(preset("mixtral-8x7b-v0.1"))["blocks.0.mlp.experts.3.gate.kernel"]
    >>> row.lechat, row.hf
    ('blocks.0.mlp.experts.gate.kernel', 'model.layers.0.block_sparse_moe.experts.3.w1.weight')
    """
    found = {
        _of_expert(name, expert): _tensor(name, row, expert, config.vision is not None)
        for name, row in config.weights.items()
        for expert in (range(config.n_experts) if is_expert(name) else (None,))
    }
    return MappingProxyType(found)


@functools.lru_cache(KEPT)
def parts(config: MistralConfig) -> Mapping[str, tuple[str, ...]]:
    """The parts of each weight of such a model, by lechat's name: those of its experts, or one."""
    found: dict[str, list[str]] = {}
    for part, row in rows(config).items():
        found.setdefault(row.lechat, []).append(part)
    return MappingProxyType({name: tuple(of) for name, of in found.items()})


@functools.lru_cache(KEPT)
def names(config: MistralConfig, fmt: Format) -> Mapping[str, str]:
    """The name in a format of each part of such a model; in lechat and GGUF, of each weight.

    >>> from lechat_jax.config import preset
    >>> names(preset("lechat-15m"), "mistral")["blocks.5.attn.q.kernel"]
    'layers.5.attention.wq.weight'
    """
    if fmt == "lechat":
        return MappingProxyType({name: name for name in config.weights})
    if fmt == "gguf":
        return MappingProxyType({row.lechat: row.gguf for row in rows(config).values()})
    return MappingProxyType({part: getattr(row, fmt) for part, row in rows(config).items()})


def tied_head(config: MistralConfig, fmt: Format) -> str | None:
    """The name of the head in a tied model, where a file may repeat the embedding; or None.

    PyTorch lists it in a state dict; the other formats leave it out.
    """
    head = _tensor(HEAD, TABLE[HEAD], sees=config.vision is not None)
    return getattr(head, fmt) if config.tied_embeddings else None


def shape(config: MistralConfig, fmt: Format, row: Tensor) -> tuple[int, ...]:
    """The sizes of a row's axes; in the other formats those that it writes are one, and so on.

    >>> from lechat_jax.config import preset
    >>> config = preset("lechat-15m")
    >>> row = rows(config)["blocks.0.attn.q.kernel"]
    >>> shape(config, "lechat", row), shape(config, "hf", row)
    ((8, 24, 192), (192, 192))
    """
    if fmt == "lechat" or row.is_split:
        return config.shape(row.writes + row.reads)
    return tuple(math.prod(config.shape(axes)) for axes in (row.writes, row.reads) if axes)


@functools.lru_cache(KEPT)
def shapes(config: MistralConfig, fmt: Format) -> Mapping[str, tuple[int, ...]]:
    """The shape in a format of each part of such a model; in lechat and GGUF, of each weight."""
    if fmt == "lechat":
        found = {name: config.shape(row.letters) for name, row in config.weights.items()}
    elif fmt == "gguf":
        found = {
            row.lechat: (*config.shape("E" * (row.expert is not None)), *shape(config, fmt, row))
            for row in rows(config).values()
        }
    else:
        found = {part: shape(config, fmt, row) for part, row in rows(config).items()}
    return MappingProxyType(found)


def match(
    config: MistralConfig, fmt: Format, keys: Collection[str], where: object
) -> Mapping[str, str]:
    """The key of each part, or in lechat and GGUF each weight, if `keys` are those of the model.

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
