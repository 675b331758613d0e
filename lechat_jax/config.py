"""What a Mistral is: its shape, in the words of Mistral's own `params.json`.

Standard library only, so that a tool can read a checkpoint's config without JAX.
"""

import dataclasses
import math
from typing import Any

from lechat_jax.errors import BadInput

Window = int | None


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
        if self.head_dim % 2:
            raise BadInput(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        if not min(1, self.n_experts) <= self.n_experts_per_token <= self.n_experts:
            raise BadInput(
                f"n_experts_per_token must be between 1 and n_experts ({self.n_experts}), or both "
                f"0 for a model without experts, not {self.n_experts_per_token}"
            )
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
    def n_params(self) -> int:
        """Number of weights, embedding and head included.

        >>> PRESETS["lechat-15m"].n_params
        15165888
        """
        return self._count(max(1, self.n_experts))

    @property
    def n_active_params(self) -> int:
        """Number of weights that a token meets: of the experts only those chosen for it.

        >>> PRESETS["mixtral-8x7b-v0.1"].n_active_params
        12879925248
        """
        return self._count(max(1, self.n_experts_per_token))

    def _count(self, n_feed_forwards: int) -> int:
        attention = self.dim * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        feed_forward = self.dim * (3 * self.hidden_dim * n_feed_forwards + self.n_experts)
        block = attention + feed_forward + 2 * self.dim
        tables = self.vocab_size * self.dim * (1 if self.tied_embeddings else 2)
        return tables + self.n_layers * block + self.dim

    @property
    def n_products(self) -> int:
        """Number of weights that a token is multiplied by, or scaled; not those looked up.

        Nor those of experts that it is not for.

        >>> PRESETS["lechat-15m"].n_params - PRESETS["lechat-15m"].n_products
        6144000
        """
        return self.n_active_params - (0 if self.tied_embeddings else self.vocab_size * self.dim)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types; `from_dict` gives the same config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "MistralConfig":
        """The config that `to_dict` wrote.

        Raises:
            BadInput: a field is missing, unknown or out of range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, f in known.items() if f.default is dataclasses.MISSING}
        if missing := sorted(required - fields.keys()):
            raise BadInput(f"model config lacks {', '.join(missing)}")
        if unknown := sorted(fields.keys() - known.keys()):
            raise BadInput(f"model config has unknown fields: {', '.join(unknown)}")
        return cls(**{name: _from_json(name, value) for name, value in fields.items()})


def _from_json(name: str, value: Any) -> Any:
    """The value of a field as JSON spells it, which may be of any type."""
    if name == "sliding_window":
        windows = value if isinstance(value, list | tuple) else [value]
        if not all(window is None or type(window) is int for window in windows):
            raise BadInput(f"{name} must be a whole number, null or a list of these, not {value!r}")
        return tuple(value) if isinstance(value, list) else value
    if name == "tied_embeddings":
        if type(value) is not bool:
            raise BadInput(f"{name} must be true or false, not {value!r}")
        return value
    if name in ("norm_eps", "rope_theta"):
        if type(value) not in (int, float):
            raise BadInput(f"{name} must be a number, not {value!r}")
        return float(value)
    if type(value) is not int:
        raise BadInput(f"{name} must be a whole number, not {value!r}")
    return value


PRESETS: dict[str, MistralConfig] = {
    # The default of the main job; five minutes on two cores. The window is half the
    # training block, so that what is trained is sliding-window attention.
    "lechat-15m": MistralConfig(
        dim=192,
        n_layers=6,
        n_heads=8,
        n_kv_heads=2,
        head_dim=24,
        hidden_dim=672,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=64,
    ),
    # For measuring: 1.00 GB of float32 weights are read for each token decoded.
    "bench-284m": MistralConfig(
        dim=1024,
        n_layers=16,
        n_heads=16,
        n_kv_heads=4,
        head_dim=64,
        hidden_dim=3584,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=256,
    ),
    # For measuring training on a GPU: a billion parameters.
    "bench-1b": MistralConfig(
        dim=2048,
        n_layers=16,
        n_heads=16,
        n_kv_heads=4,
        head_dim=128,
        hidden_dim=7168,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=1024,
    ),
    # https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
    "mistral-7b-v0.1": MistralConfig(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=14336,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=4096,
    ),
    # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json
    "mixtral-8x7b-v0.1": MistralConfig(
        dim=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=14336,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        n_experts=8,
        n_experts_per_token=2,
    ),
    # https://huggingface.co/mistralai/Mixtral-8x22B-v0.1/blob/main/config.json
    "mixtral-8x22b-v0.1": MistralConfig(
        dim=6144,
        n_layers=56,
        n_heads=48,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=16384,
        vocab_size=32000,
        norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        n_experts=8,
        n_experts_per_token=2,
    ),
    # https://huggingface.co/mistralai/Mixtral-8x22B-Instruct-v0.1/blob/main/config.json
    # The same with 768 control tokens; so is mistral-inference's 8x22B v0.3.
    "mixtral-8x22b-v0.3": MistralConfig(
        dim=6144,
        n_layers=56,
        n_heads=48,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=16384,
        vocab_size=32768,
        norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        n_experts=8,
        n_experts_per_token=2,
    ),
}


def preset(name: str) -> MistralConfig:
    """The config of that name in `PRESETS`.

    Raises:
        BadInput: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise BadInput(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
