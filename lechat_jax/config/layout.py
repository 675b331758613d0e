"""The table of a model's weights: the name of each, its axes, and its names in other files.

One letter, one size: V token ids, D model width, N query heads, K key-value heads, H head width,
U width of a head's value, F feed-forward width, E experts, X the width of one, J that of those
which all tokens share, L layers. Of latent attention, Q and C are the ranks of queries and of keys
and values, Z what the cache keeps, which is C and the rotary key R, and Y a head's key without a
position O and its value. Small letters are sizes of the vision tower: d, n, h, f as in the decoder,
c channels, p pixels along a patch, m patches of a token. A kernel has the axes that it writes first
and those that it reads last, so
y[writes] = sum over [reads] of kernel[writes, reads] * x[reads]. What other files have to know of a
weight follows from this table: how it is split over devices, which of its axes the optimiser and
the scales of int8 reduce over, which maps can have an adapter, how many weights a model has, and
what they are called in the files of Hugging Face, of Mistral and of llama.cpp (GGUF). No other file
decides by an end or another part of a name; `tests/test_architecture.py` sees to it.
"""

import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from lechat_jax.config.vision import VisionConfig


class Row(NamedTuple):
    """A row of the table: the axes of a weight, a letter each, and its name elsewhere.

    Attributes:
        writes: axes of what it makes; experts are counted by their first letter.
        reads: axes of what it is multiplied with; none of a norm, which only scales.
        hf: name in Hugging Face's files, less the layer's beginning and `.weight` or `.bias`; `{e}`
            is the number of an expert, each of which has a tensor of its own there.
        mistral: likewise, in Mistral's own files.
        gguf: likewise, in GGUF, which has the kernels of a layer's experts in one tensor as here.
        is_rotated: whether RoPE rotates what it makes, in pairs of rows that are half a head apart
            here and in Hugging Face's files, and neighbours in Mistral's and in GGUF.
        is_bias: whether it is added to what a map makes.
        is_split: whether its axes are apart in all files, as those of a convolution.
        hf_latent: its name in Hugging Face's files of models with latent attention, if another.
        mistral_latent: likewise, in Mistral's own.
    """

    writes: str
    reads: str
    hf: str
    mistral: str
    gguf: str
    is_rotated: bool = False
    is_bias: bool = False
    is_split: bool = False
    hf_latent: str = ""
    mistral_latent: str = ""

    @property
    def letters(self) -> str:
        """All axes, in the order of the array."""
        return self.writes + self.reads

    @property
    def of_latent(self) -> "Row":
        """The row in a model with latent attention."""
        hf, mistral = self.hf_latent or self.hf, self.mistral_latent or self.mistral
        return self._replace(hf=hf, mistral=mistral)


# Without the number of the layer, which is also the name of a stack of all layers, [L, ...].
TABLE = {
    "embed.kernel": Row("V", "D", "model.embed_tokens", "tok_embeddings", "token_embd"),
    "blocks.attn_norm.scale": Row("D", "", "input_layernorm", "attention_norm", "attn_norm"),
    "blocks.attn.q.kernel": Row(
        "NH", "D", "self_attn.q_proj", "attention.wq", "attn_q", is_rotated=True
    ),
    "blocks.attn.k.kernel": Row(
        "KH", "D", "self_attn.k_proj", "attention.wk", "attn_k", is_rotated=True
    ),
    "blocks.attn.v.kernel": Row("KH", "D", "self_attn.v_proj", "attention.wv", "attn_v"),
    "blocks.attn.o.kernel": Row("D", "NU", "self_attn.o_proj", "attention.wo", "attn_output"),
    "blocks.attn.q_a.kernel": Row("Q", "D", "self_attn.q_a_proj", "attention.wq_a", ""),
    "blocks.attn.q_norm.scale": Row("Q", "", "self_attn.q_a_layernorm", "attention.q_a_norm", ""),
    "blocks.attn.q_b.kernel": Row("NH", "Q", "self_attn.q_b_proj", "attention.wq_b", ""),
    "blocks.attn.kv_a.kernel": Row(
        "Z", "D", "self_attn.kv_a_proj_with_mqa", "attention.wkv_a_with_mqa", ""
    ),
    "blocks.attn.kv_norm.scale": Row(
        "C", "", "self_attn.kv_a_layernorm", "attention.kv_a_norm", ""
    ),
    "blocks.attn.kv_b.kernel": Row("NY", "C", "self_attn.kv_b_proj", "attention.wkv_b", ""),
    "blocks.mlp_norm.scale": Row("D", "", "post_attention_layernorm", "ffn_norm", "ffn_norm"),
    "norm.scale": Row("D", "", "model.norm", "norm", "output_norm"),
    "blocks.mlp.gate.kernel": Row("F", "D", "mlp.gate_proj", "feed_forward.w1", "ffn_gate"),
    "blocks.mlp.up.kernel": Row("F", "D", "mlp.up_proj", "feed_forward.w3", "ffn_up"),
    "blocks.mlp.down.kernel": Row("D", "F", "mlp.down_proj", "feed_forward.w2", "ffn_down"),
    "blocks.mlp.router.kernel": Row(
        *("E", "D", "block_sparse_moe.gate", "feed_forward.gate", "ffn_gate_inp"),
        hf_latent="mlp.gate",
        mistral_latent="gate",
    ),
    "blocks.mlp.experts.gate.kernel": Row(
        *("EX", "D", "block_sparse_moe.experts.{e}.w1", "feed_forward.experts.{e}.w1"),
        "ffn_gate_exps",
        hf_latent="mlp.experts.{e}.gate_proj",
        mistral_latent="experts.{e}.w1",
    ),
    "blocks.mlp.experts.up.kernel": Row(
        *("EX", "D", "block_sparse_moe.experts.{e}.w3", "feed_forward.experts.{e}.w3"),
        "ffn_up_exps",
        hf_latent="mlp.experts.{e}.up_proj",
        mistral_latent="experts.{e}.w3",
    ),
    "blocks.mlp.experts.down.kernel": Row(
        *("ED", "X", "block_sparse_moe.experts.{e}.w2", "feed_forward.experts.{e}.w2"),
        "ffn_down_exps",
        hf_latent="mlp.experts.{e}.down_proj",
        mistral_latent="experts.{e}.w2",
    ),
    "blocks.mlp.shared.gate.kernel": Row(
        "J", "D", "mlp.shared_experts.gate_proj", "shared_experts.w1", ""
    ),
    "blocks.mlp.shared.up.kernel": Row(
        "J", "D", "mlp.shared_experts.up_proj", "shared_experts.w3", ""
    ),
    "blocks.mlp.shared.down.kernel": Row(
        "D", "J", "mlp.shared_experts.down_proj", "shared_experts.w2", ""
    ),
    "head.kernel": Row("V", "D", "lm_head", "output", "output"),
    # The vision tower, which GGUF has in a file of its own that is not read here.
    "vision.patch.kernel": Row("d", "cpp", "patch_conv", "patch_conv", "", is_split=True),
    "vision.norm.scale": Row("d", "", "ln_pre", "ln_pre", ""),
    "vision.blocks.attn_norm.scale": Row("d", "", "attention_norm", "attention_norm", ""),
    "vision.blocks.attn.q.kernel": Row(
        "nh", "d", "attention.q_proj", "attention.wq", "", is_rotated=True
    ),
    "vision.blocks.attn.k.kernel": Row(
        "nh", "d", "attention.k_proj", "attention.wk", "", is_rotated=True
    ),
    "vision.blocks.attn.v.kernel": Row("nh", "d", "attention.v_proj", "attention.wv", ""),
    "vision.blocks.attn.o.kernel": Row("d", "nh", "attention.o_proj", "attention.wo", ""),
    "vision.blocks.mlp_norm.scale": Row("d", "", "ffn_norm", "ffn_norm", ""),
    "vision.blocks.mlp.gate.kernel": Row("f", "d", "feed_forward.gate_proj", "feed_forward.w1", ""),
    "vision.blocks.mlp.up.kernel": Row("f", "d", "feed_forward.up_proj", "feed_forward.w3", ""),
    "vision.blocks.mlp.down.kernel": Row("d", "f", "feed_forward.down_proj", "feed_forward.w2", ""),
    "projector.norm.scale": Row("d", "", "norm", "pre_mm_projector_norm", ""),
    "projector.merge.kernel": Row(
        "d", "dm", "patch_merger.merging_layer", "patch_merger.merging_layer", ""
    ),
    "projector.linear_1.kernel": Row("D", "d", "linear_1", "vision_language_adapter.w_in", ""),
    "projector.linear_1.bias": Row(
        "D", "", "linear_1", "vision_language_adapter.w_in", "", is_bias=True
    ),
    "projector.linear_2.kernel": Row("D", "D", "linear_2", "vision_language_adapter.w_out", ""),
    "projector.linear_2.bias": Row(
        "D", "", "linear_2", "vision_language_adapter.w_out", "", is_bias=True
    ),
}
TOWER, PROJECTOR = "vision.", "projector."
EMBEDDING = "embed.kernel"
HEAD = "head.kernel"  # not of a tied model, whose head is the embedding
ROUTER = "blocks.mlp.router.kernel"
EXPERTS = tuple(name for name in TABLE if name.startswith("blocks.mlp.experts."))
SHARED = tuple(name for name in TABLE if name.startswith("blocks.mlp.shared."))
# The maps that can have an adapter, by their word, in the order in which they are used.
GROUPED = {word: f"blocks.attn.{word}.kernel" for word in "qkv"}
LATENT = {word: f"blocks.attn.{word}.kernel" for word in ("q_a", "q_b", "kv_a", "kv_b")}
LATENT_NORMS = ("blocks.attn.q_norm.scale", "blocks.attn.kv_norm.scale")
ATTENTION = GROUPED | LATENT | {"o": "blocks.attn.o.kernel"}
FEED_FORWARD = {word: f"blocks.mlp.{word}.kernel" for word in ("gate", "up", "down")}
MAPS = ATTENTION | FEED_FORWARD

# Small, and read in float: a router, and the map of which latent attention absorbs one half into
# the query and the other into the output.
UNQUANTISED = (ROUTER, LATENT["kv_b"])

# Behind the name of a kernel: the parts of a quantised one; behind that of a map: its adapter's.
SCALE, ZERO, ORDER = ".scale", ".zero", ".order"
LORA_A, LORA_B, LORA_SCALE = ".lora.a", ".lora.b", ".lora.scale"

# Of every name that there is, less the layer's number: the row, and which part of it this is.
KNOWN = {
    **{name: (name, "") for name in TABLE},
    **{
        name + part: (name, part)
        for name, row in TABLE.items()
        if row.reads and name not in UNQUANTISED and not name.startswith((TOWER, PROJECTOR))
        for part in (SCALE, ZERO, ORDER)
    },
    **{
        name.removesuffix(".kernel") + part: (name, part)
        for name in MAPS.values()
        for part in (LORA_A, LORA_B, LORA_SCALE)
    },
}
LAYER = re.compile(r"(vision\.)?blocks\.(\d+)\.")


class FeedForwards(NamedTuple):
    """Which feed-forwards a model has: one a layer, or experts in all layers but the first.

    Attributes:
        is_mixture: whether there are experts.
        n_dense: first layers that have none.
        has_shared: whether all tokens share some.
    """

    is_mixture: bool
    n_dense: int = 0
    has_shared: bool = False

    def are_experts(self, layer: int) -> bool:
        """Whether those of a layer are experts."""
        return self.is_mixture and layer >= self.n_dense

    def have(self, name: str, layer: int) -> bool:
        """Whether a weight, by the name of its stack, is one of a layer, as far as they decide."""
        if name in FEED_FORWARD.values():
            return not self.are_experts(layer)
        return name not in (ROUTER, *EXPERTS, *SHARED) or self.are_experts(layer)


@functools.lru_cache(maxsize=8)
def weights(
    n_layers: int,
    feed_forwards: FeedForwards,
    tied_embeddings: bool,
    is_latent: bool = False,
    vision: VisionConfig | None = None,
) -> Mapping[str, Row]:
    """Every weight of such a model by name, with its row; shared, so it cannot be changed.

    >>> list(weights(2, FeedForwards(is_mixture=False), tied_embeddings=True))[:3]
    ['embed.kernel', 'blocks.0.attn_norm.scale', 'blocks.1.attn_norm.scale']
    """
    absent = {HEAD} if tied_embeddings else set[str]()
    absent |= {*GROUPED.values()} if is_latent else {*LATENT.values(), *LATENT_NORMS}
    absent |= set() if feed_forwards.has_shared else {*SHARED}
    if vision is None:
        absent |= {name for name in TABLE if is_vision(name)}
    else:
        absent |= set() if vision.projector_norm else {"projector.norm.scale"}
        absent |= set() if vision.spatial_merge_size > 1 else {"projector.merge.kernel"}
        absent |= set() if vision.projector_bias else {n for n, row in TABLE.items() if row.is_bias}
    n_blocks = {"blocks": n_layers, "vision": vision.n_layers if vision else 0}
    found = {
        in_layer(name, i): row.of_latent if is_latent else row
        for name, row in TABLE.items()
        if name not in absent
        for i in range(n_blocks[name.partition(".")[0]] if is_stack(name) else 1)
        if feed_forwards.have(name, i)
    }
    return MappingProxyType(found)


def row_of(name: str) -> Row:
    """The row of a weight, or of the same weight of all layers in a stack.

    >>> row_of("blocks.0.attn.o.kernel").letters, row_of("blocks.mlp.experts.up.kernel").letters
    ('DNU', 'LEXD')

    Raises:
        ValueError: there is no weight of that name.
    """
    key, part = KNOWN.get(stacked(name), ("", ""))
    if not key or part:
        raise ValueError(f"{name} is no weight of a model")
    row = TABLE[key]
    return row._replace(writes=f"L{row.writes}") if is_stack(name) else row


def letters(name: str) -> str:
    """All axes of a weight; of what is none of the model's own, none.

    >>> letters("blocks.0.attn.q.kernel"), letters("blocks.attn.q.kernel"), letters("norm.scale")
    ('NHD', 'LNHD', 'D')
    """
    return row_of(name).letters if part_of(name) == "" else ""


def letters_of_part(name: str, n_axes: int, by_groups: bool = False) -> str:
    """All axes of a weight, or of a part of a quantised one; a dot is an axis of no letter.

    Groups of features stand for the first axis that the kernel reads, and the axes of a matrix
    for the first ones that it writes and reads. `by_groups` is an int4 kernel that has groups
    first, see `ops.matmul_int4`.

    >>> letters_of_part("blocks.0.attn.o.kernel", 3), letters_of_part("norm.scale", 1)
    ('DNU', 'D')
    >>> letters_of_part("blocks.0.attn.o.kernel.scale", 1)  # of int8: of each output
    'D'
    >>> letters_of_part("blocks.0.mlp.down.kernel.scale", 2)  # of int4: of each group, too
    'DF'
    >>> letters_of_part("blocks.0.mlp.up.kernel", 3, by_groups=True)
    'DF.'
    """
    part = part_of(name)
    if part not in ("", SCALE, ZERO):
        return "." * n_axes
    row = row_of(kernel_of(name))
    if by_groups:
        return f"{row.reads[0]}{row.writes[0]}."[:n_axes]
    if part == "":
        return row.letters if n_axes == len(row.letters) else row.writes[0] + row.reads[0]
    return row.writes + row.reads[: n_axes - len(row.writes)]


def n_reads(name: str) -> int:
    """How many of the last axes of a weight are read; none of a norm's.

    >>> n_reads("blocks.0.attn.q.kernel"), n_reads("blocks.0.attn.o.kernel")
    (1, 2)

    Raises:
        ValueError: there is no weight of that name.
    """
    return len(row_of(name).reads)


def part_of(name: str) -> str | None:
    """Which part of a kernel or of an adapter has that name; "" of a weight, `None` of nothing.

    >>> [part_of(name) for name in ("embed.kernel.scale", "norm.scale", "blocks.0.attn.q.lora.a")]
    ['.scale', '', '.lora.a']
    """
    known = KNOWN.get(stacked(name))
    return known and known[1]


def kernel_of(name: str) -> str:
    """The kernel that a part or an adapter belongs to; a weight's own name.

    >>> kernel_of("blocks.3.attn.q.lora.a"), kernel_of("embed.kernel.scale")
    ('blocks.3.attn.q.kernel', 'embed.kernel')
    """
    key, place = KNOWN[stacked(name)][0], LAYER.match(name)
    return in_layer(key, int(place[2])) if place else key


def module_of(name: str) -> str:
    """The module that a weight, a part of it or its adapter lies in.

    >>> module_of("blocks.3.attn.q.lora.a"), module_of("blocks.0.mlp_norm.scale")
    ('blocks.3.attn.q', 'blocks.0.mlp_norm')
    """
    return kernel_of(name).rpartition(".")[0]


def layer_of(name: str) -> int | None:
    """The number of the decoder's layer that a weight is of; `None` outside them and of a stack.

    >>> layer_of("blocks.3.attn.q.kernel"), layer_of("blocks.attn.q.kernel"), layer_of("norm.scale")
    (3, None, None)
    """
    match = LAYER.match(name)
    return int(match[2]) if match and not match[1] else None


def vision_layer_of(name: str) -> int | None:
    """The number of the vision tower's layer that a weight is of, likewise.

    >>> vision_layer_of("vision.blocks.3.attn.q.kernel"), vision_layer_of("blocks.3.attn.q.kernel")
    (3, None)
    """
    match = LAYER.match(name)
    return int(match[2]) if match and match[1] else None


def stacked(name: str) -> str:
    """The name of the stack of all layers that a weight is in; outside the layers its own.

    >>> stacked("blocks.3.attn.q.kernel"), stacked("norm.scale")
    ('blocks.attn.q.kernel', 'norm.scale')
    """
    return LAYER.sub(r"\1blocks.", name, count=1) if LAYER.match(name) else name


def is_stack(name: str) -> bool:
    """Whether a name is that of a stack of all layers."""
    return name.startswith(("blocks.", "vision.blocks.")) and LAYER.match(name) is None


def in_layer(name: str, layer: int) -> str:
    """The inverse of `stacked`: the name that a weight of the stack has in a layer.

    >>> in_layer("blocks.attn.q.kernel", 3), in_layer("norm.scale", 3)
    ('blocks.3.attn.q.kernel', 'norm.scale')
    """
    return name.replace("blocks.", f"blocks.{layer}.", 1)


def is_vision(name: str) -> bool:
    """Whether a weight is of the vision tower or of its projector.

    >>> is_vision("vision.blocks.0.attn.q.kernel"), is_vision("blocks.0.attn.q.kernel")
    (True, False)
    """
    return name.startswith((TOWER, PROJECTOR))


def is_tower(name: str) -> bool:
    """Whether a weight is of the vision tower, and not of its projector."""
    return name.startswith(TOWER)


def is_projector(name: str) -> bool:
    """Whether a weight is of the projector, from the vision tower to the decoder's width."""
    return name.startswith(PROJECTOR)


def is_expert(name: str) -> bool:
    """Whether a weight is of the experts of a layer, each of which is a map of its own."""
    return KNOWN.get(stacked(name), ("",))[0] in EXPERTS


def is_map(name: str) -> bool:
    """Whether a weight is the kernel of a map that can have an adapter.

    >>> is_map("blocks.0.attn.q.kernel"), is_map("blocks.0.mlp.experts.up.kernel")
    (True, False)
    """
    return stacked(name) in MAPS.values()


def is_kernel(name: str) -> bool:
    """Whether a weight is one that is quantised: a kernel, and not a router's or a vision tower's.

    >>> is_kernel("blocks.0.attn.q.kernel"), is_kernel("embed.kernel")
    (True, True)
    >>> is_kernel("norm.scale"), is_kernel("blocks.0.mlp.router.kernel")
    (False, False)
    """
    return part_of(name + SCALE) == SCALE


def is_matrix(name: str) -> bool:
    """Whether a weight is multiplied with what it reads: any but a norm and a bias.

    >>> is_matrix("blocks.0.mlp.router.kernel"), is_matrix("norm.scale")
    (True, False)
    """
    return bool(part_of(name) == "" and row_of(name).reads)


def is_norm(name: str) -> bool:
    """Whether a weight is the scale of a norm, and not that of a quantised kernel or an adapter.

    >>> is_norm("norm.scale"), is_norm("blocks.3.attn_norm.scale"), is_norm("embed.kernel.scale")
    (True, True, False)
    """
    return part_of(name) == "" and not row_of(name).reads and not row_of(name).is_bias


def is_bias(name: str) -> bool:
    """Whether a weight is added to what a map makes.

    >>> is_bias("projector.linear_1.bias"), is_bias("norm.scale")
    (True, False)
    """
    return part_of(name) == "" and row_of(name).is_bias


def is_scale(name: str) -> bool:
    """Whether this is the name of the scale of a quantised kernel; a norm has another scale.

    >>> is_scale("embed.kernel.scale"), is_scale("norm.scale")
    (True, False)
    """
    return part_of(name) == SCALE


def is_part(name: str) -> bool:
    """Whether this is the name of what belongs to a quantised kernel, beside its numbers.

    >>> is_part("embed.kernel.scale"), is_part("norm.scale"), is_part("head.kernel")
    (True, False, False)
    """
    return part_of(name) in (SCALE, ZERO, ORDER)


def is_adapter(name: str) -> bool:
    """Whether this is the name of a part of an adapter.

    >>> is_adapter("blocks.0.attn.q.lora.scale"), is_adapter("norm.scale")
    (True, False)
    """
    return part_of(name) in (LORA_A, LORA_B, LORA_SCALE)
