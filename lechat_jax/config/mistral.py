"""What a Mistral is: its shape, in the words of Mistral's own `params.json`.

Standard library only, so that a tool can read a checkpoint's config without JAX.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lechat_jax.config.layout import EMBEDDING, HEAD, FeedForwards, Row, is_expert, weights
from lechat_jax.config.vision import CHANNELS, VisionConfig
from lechat_jax.errors import BadInput

Window = int | None


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Rotary frequencies stretched for texts longer than those a model first learned from.

    Peng et al. 2023 (arXiv:2309.00071). A pair of lanes that turns more than `beta` times in
    `original_max_position_embeddings` tokens keeps its speed, one that turns less than `alpha`
    times is slowed down by `factor`, and between the two the speed falls along a line.

    Attributes:
        factor: of the slow-down.
        original_max_position_embeddings: tokens of the texts before.
        beta: turns from which a speed is kept; Hugging Face's `beta_fast`.
        alpha: turns up to which a speed is divided; Hugging Face's `beta_slow`.
        apply_scale: whether queries and keys are 0.1 * ln(factor) + 1 times as long.

    Raises:
        BadInput: a number is out of range.
    """

    factor: float
    original_max_position_embeddings: int
    beta: float
    alpha: float
    apply_scale: bool

    def __post_init__(self) -> None:
        if not (1 <= self.factor < math.inf and self.original_max_position_embeddings > 0):
            raise BadInput(
                f"yarn must stretch some length by a factor of at least 1, not "
                f"{self.original_max_position_embeddings} by {self.factor}"
            )
        if not 0 < self.alpha < self.beta < math.inf:
            raise BadInput(f"yarn needs 0 < alpha < beta, not {self.alpha} and {self.beta}")

    @property
    def mscale(self) -> float:
        """The paper's factor of queries and keys, 0.1 ln(factor) + 1, applied or not."""
        return 0.1 * math.log(self.factor) + 1

    @property
    def attention_factor(self) -> float:
        """What queries and keys are multiplied by, so that attention stays as sharp.

        >>> round(Yarn(64.0, 4096, 4.0, 1.0, apply_scale=True).attention_factor, 5)
        1.41589
        """
        return self.mscale if self.apply_scale else 1.0


@dataclasses.dataclass(frozen=True)
class Llama4Scaling:
    """Queries that grow with their position: by 1 + beta * ln(1 + floor(position / original)).

    As in Llama 4, after the rotation. Below `original_max_position_embeddings` it is 1, so no
    short text can show whether it is there.

    Attributes:
        beta: how fast.
        original_max_position_embeddings: tokens of a step.

    Raises:
        BadInput: a number is out of range.
    """

    beta: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if not (0 <= self.beta < math.inf and self.original_max_position_embeddings > 0):
            raise BadInput(
                f"llama_4_scaling needs a beta of at least 0 and a positive original length, not "
                f"{self.beta} and {self.original_max_position_embeddings}"
            )


@dataclasses.dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (MLA): keys and values are made of one short vector a token.

    DeepSeek-V2 (arXiv:2405.04434, section 2.1), as in Mistral Small 4 and Large 3. The cache holds
    that vector and one rotary key for all heads, instead of the keys and values of each. A head's
    query and key have lanes without a position first, and then those that RoPE rotates, in
    neighbouring pairs. Field names are those of Mistral's `params.json`.

    Attributes:
        q_lora_rank: width Q of what a token's queries are made of.
        kv_lora_rank: width C of what its keys and values are made of, the latent.
        qk_nope_head_dim: lanes of a head's query and key without a position.
        qk_rope_head_dim: rotary lanes R of a head's query, and of the key that all heads share.
        v_head_dim: width U of a head's value.
        squared_yarn_scale: whether scores are multiplied by (0.1 ln(factor) + 1)^2 of YaRN, as
            transformers does since 5.23; vLLM, sglang and NeMo do not.

    Raises:
        BadInput: a width is out of range.
    """

    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    squared_yarn_scale: bool = False

    def __post_init__(self) -> None:
        for name in (
            "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim"
        ).split():
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be positive, not {getattr(self, name)}")
        if self.qk_rope_head_dim % 2:
            raise BadInput(
                f"qk_rope_head_dim must be even for rotary embeddings, not {self.qk_rope_head_dim}"
            )

    @property
    def head_dim(self) -> int:
        """Width H of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


PARTS = {
    "yarn": Yarn,
    "llama_4_scaling": Llama4Scaling,
    "latent_attention": LatentConfig,
    "vision": VisionConfig,
}
MIXTURE = ("n_experts", "n_experts_per_token", "expert_hidden_dim")
MIXTURE += ("n_shared_experts", "n_dense_layers")
BOOLEANS = {"tied_embeddings", "apply_scale", "squared_yarn_scale"}
BOOLEANS |= {"projector_norm", "projector_bias"}
OPTIONAL = (*MIXTURE, *PARTS)  # what most models have none of


@dataclasses.dataclass(frozen=True)
class MistralConfig:
    """The shape of one model, with no default for what released checkpoints disagree on.

    Field names are those of Mistral's `params.json`. Dtype, batch and length are not
    part of the model and are chosen where it is used.

    Attributes:
        dim: model width D.
        n_layers: number of blocks L.
        n_heads: query heads N.
        n_kv_heads: key and value heads K; N = K * G, query head n reads kv head n // G.
        head_dim: width H of one head; N * H need not equal D (Mistral-Nemo: 4096, 5120).
        hidden_dim: feed-forward width F.
        vocab_size: number of token ids V.
        norm_eps: epsilon of every RMSNorm, added to the mean square.
        rope_theta: base of the rotary frequencies.
        sliding_window: number of keys W that a query sees, itself included; `None` is
            full causal attention; a tuple gives each layer its own (Ministral-8B).
        tied_embeddings: the head is the embedding matrix.
        n_experts: feed-forwards E in a layer, of which a router chooses for each token
            (Mixtral); 0 is a single one, without a router.
        n_experts_per_token: how many it chooses.
        expert_hidden_dim: feed-forward width X of an expert; 0 is `hidden_dim`.
        n_shared_experts: experts that every token meets besides, one feed-forward so many times as
            wide.
        n_dense_layers: first layers that have a single feed-forward, of width `hidden_dim`.
        yarn: how the rotary frequencies were stretched, if they were.
        llama_4_scaling: how queries grow with their position, if they do.
        latent_attention: what keys and values are made of, if not of the token itself; `head_dim`
            is then its own, and there are as many key-value heads as queries have.
        vision: the vision tower, if the model sees images.

    Raises:
        BadInput: a field is out of range, or two fields contradict each other.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    sliding_window: int | None | tuple[Window, ...]
    tied_embeddings: bool = False
    n_experts: int = 0
    n_experts_per_token: int = 0
    expert_hidden_dim: int = 0
    n_shared_experts: int = 0
    n_dense_layers: int = 0
    yarn: Yarn | None = None
    llama_4_scaling: Llama4Scaling | None = None
    latent_attention: LatentConfig | None = None
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        for name in (
            "dim n_layers n_heads n_kv_heads head_dim hidden_dim vocab_size norm_eps rope_theta"
        ).split():
            if not 0 < getattr(self, name) < math.inf:
                raise BadInput(f"{name} must be positive, not {getattr(self, name)}")
        if self.n_heads % self.n_kv_heads:
            raise BadInput(
                f"n_heads ({self.n_heads}) must be divisible by n_kv_heads ({self.n_kv_heads}), "
                "since each key-value head serves an equal group of query heads"
            )
        if self.head_dim % 2 and not self.latent_attention:
            raise BadInput(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        if not 0 <= min(1, self.n_experts) <= self.n_experts_per_token <= self.n_experts:
            raise BadInput(
                f"n_experts_per_token must be between 1 and n_experts ({self.n_experts}), or both "
                f"0 for a model without experts, not {self.n_experts_per_token}"
            )
        for name in ("expert_hidden_dim", "n_shared_experts", "n_dense_layers"):
            if getattr(self, name) < 0 or (getattr(self, name) and not self.n_experts):
                raise BadInput(
                    f"{name} must be 0 in a model without experts and not negative, not "
                    f"{getattr(self, name)}"
                )
        if self.n_dense_layers > self.n_layers:
            raise BadInput(
                f"n_dense_layers ({self.n_dense_layers}) must be at most n_layers ({self.n_layers})"
            )
        if latent := self.latent_attention:
            if (self.head_dim, self.n_kv_heads) != (latent.head_dim, self.n_heads):
                raise BadInput(
                    f"with latent attention head_dim is qk_nope_head_dim + qk_rope_head_dim, here "
                    f"{latent.head_dim}, and n_kv_heads is n_heads, here {self.n_heads}; not "
                    f"{self.head_dim} and {self.n_kv_heads}"
                )
            if set(self.windows) != {None}:
                raise BadInput("latent attention has no sliding_window; it must be null")
        if self.vision and (last := max(self.vision.token_ids)) >= self.vocab_size:
            raise BadInput(f"vision has the token id {last}, and vocab_size is {self.vocab_size}")
        if isinstance(self.sliding_window, tuple) and len(self.sliding_window) != self.n_layers:
            raise BadInput(
                f"sliding_window names {len(self.sliding_window)} layers, "
                f"but n_layers is {self.n_layers}"
            )
        for window in self.windows:
            if window is not None and window < 1:
                raise BadInput(
                    f"sliding_window must be at least 1 (a query sees itself), not {window}; "
                    "use null (--sliding-window full) for full attention"
                )

    @property
    def windows(self) -> tuple[Window, ...]:
        """The window of each layer.

        >>> from lechat_jax.config import PRESETS
        >>> PRESETS["lechat-15m"].windows[:2]
        (64, 64)
        """
        if isinstance(self.sliding_window, tuple):
            return self.sliding_window
        return (self.sliding_window,) * self.n_layers

    @property
    def group_size(self) -> int:
        """Query heads per key-value head, G."""
        return self.n_heads // self.n_kv_heads

    @property
    def value_dim(self) -> int:
        """Width U of a head's value, which differs from H in latent attention alone."""
        return self.latent_attention.v_head_dim if self.latent_attention else self.head_dim

    @property
    def cached(self) -> tuple[int, int, int]:
        """What a layer's cache holds of a token: heads, and the width of their keys and values.

        Of latent attention one rotary key, and as the value one latent.
        """
        if latent := self.latent_attention:
            return 1, latent.qk_rope_head_dim, latent.kv_lora_rank
        return self.n_kv_heads, self.head_dim, self.head_dim

    @property
    def expert_dim(self) -> int:
        """Feed-forward width X of an expert."""
        return self.expert_hidden_dim or self.hidden_dim

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts, instead of a single feed-forward."""
        return self.feed_forwards.are_experts(layer)

    @property
    def feed_forwards(self) -> FeedForwards:
        """Which feed-forwards there are, as the table of weights asks."""
        return FeedForwards(self.n_experts > 0, self.n_dense_layers, self.n_shared_experts > 0)

    @property
    def weights(self) -> Mapping[str, Row]:
        """Every weight by name, with its row of the table, `layout`."""
        latent = self.latent_attention is not None
        return weights(self.n_layers, self.feed_forwards, self.tied_embeddings, latent, self.vision)

    @property
    def text(self) -> "MistralConfig":
        """The decoder alone, without the vision tower."""
        return dataclasses.replace(self, vision=None)

    @property
    def head(self) -> str:
        """Name of the weight that makes the logits: the embedding's, if they are tied."""
        return EMBEDDING if self.tied_embeddings else HEAD

    def shape(self, letters: str) -> tuple[int, ...]:
        """The sizes of axes, see `layout`.

        >>> from lechat_jax.config import PRESETS
        >>> PRESETS["lechat-15m"].shape("NHD")
        (8, 24, 192)
        """
        sizes = {
            "V": self.vocab_size,
            "D": self.dim,
            "N": self.n_heads,
            "K": self.n_kv_heads,
            "H": self.head_dim,
            "F": self.hidden_dim,
            "U": self.value_dim,
            "E": self.n_experts,
            "X": self.expert_dim,
            "J": self.expert_dim * self.n_shared_experts,
            "L": self.n_layers,
        }
        if latent := self.latent_attention:
            sizes |= {"Q": latent.q_lora_rank, "C": latent.kv_lora_rank}
            sizes |= {"Z": latent.kv_lora_rank + latent.qk_rope_head_dim}
            sizes |= {"Y": latent.qk_nope_head_dim + latent.v_head_dim}
        if tower := self.vision:
            sizes |= {"d": tower.dim, "n": tower.n_heads, "h": tower.head_dim}
            sizes |= {"f": tower.hidden_dim, "m": tower.n_merged}
            sizes |= {"c": CHANNELS, "p": tower.patch_size}
        return tuple(sizes[letter] for letter in letters)

    @property
    def n_params(self) -> int:
        """Number of weights, embedding, head and vision tower included.

        >>> from lechat_jax.config import PRESETS
        >>> PRESETS["lechat-15m"].n_params
        15165888
        """
        return self._count(max(1, self.n_experts))

    @property
    def n_active_params(self) -> int:
        """Number of weights that a token meets: of the experts only those chosen for it.

        Those of a vision tower, which only images meet, are not counted.

        >>> from lechat_jax.config import PRESETS
        >>> PRESETS["mixtral-8x7b-v0.1"].n_active_params
        12879925248
        """
        return self.text._count(max(1, self.n_experts_per_token))

    def _count(self, n_feed_forwards: int) -> int:
        total = 0
        for name, row in self.weights.items():
            size = math.prod(self.shape(row.letters))
            total += size * n_feed_forwards // self.n_experts if is_expert(name) else size
        return total

    @property
    def n_products(self) -> int:
        """Number of weights that a token is multiplied by, or scaled; not those looked up.

        Nor those of experts that it is not for.

        >>> from lechat_jax.config import PRESETS
        >>> PRESETS["lechat-15m"].n_params - PRESETS["lechat-15m"].n_products
        6144000
        """
        return self.n_active_params - (0 if self.tied_embeddings else self.vocab_size * self.dim)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `from_dict` gives the same config back.

        A part that the model has not goes unsaid.
        """
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in OPTIONAL or value}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "MistralConfig":
        """The config that `to_dict` wrote.

        Raises:
            BadInput: a field is missing, unknown or out of range.
        """
        return _built(cls, fields, "model config")


def vision_from_dict(fields: dict[str, Any]) -> VisionConfig:
    """The vision tower of these fields, as `MistralConfig.to_dict` spells them.

    Raises:
        BadInput: a field is missing, unknown or out of range.
    """
    return _built(VisionConfig, fields, "vision")


def _built(cls: type, fields: dict[str, Any], what: str) -> Any:
    """A dataclass of these fields, none of which is missing or unknown."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    required = {name for name, f in known.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - fields.keys()):
        raise BadInput(f"{what} lacks {', '.join(missing)}")
    if unknown := sorted(fields.keys() - known.keys()):
        raise BadInput(f"{what} has unknown fields: {', '.join(unknown)}")
    return cls(**{name: _from_json(name, value) for name, value in fields.items()})


def _from_json(name: str, value: Any) -> Any:
    """The value of a field as JSON spells it, which may be of any type."""
    if name in PARTS:
        if value is None:
            return None
        if not isinstance(value, dict):
            raise BadInput(f"{name} must be null or an object, not {value!r}")
        return _built(PARTS[name], value, name)
    if name == "sliding_window":
        windows = value if isinstance(value, list | tuple) else [value]
        if not all(window is None or type(window) is int for window in windows):
            raise BadInput(f"{name} must be a whole number, null or a list of these, not {value!r}")
        return tuple(value) if isinstance(value, list) else value
    if name in BOOLEANS:
        if type(value) is not bool:
            raise BadInput(f"{name} must be true or false, not {value!r}")
        return value
    if name in ("norm_eps", "rope_theta", "factor", "beta", "alpha"):
        if type(value) not in (int, float):
            raise BadInput(f"{name} must be a number, not {value!r}")
        return float(value)
    if type(value) is not int:
        raise BadInput(f"{name} must be a whole number, not {value!r}")
    return value
