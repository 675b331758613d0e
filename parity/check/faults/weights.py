"""What conversions get wrong: the weights of a layer, and the numbers of the config."""

from collections.abc import Callable
from typing import Any

import numpy as np

from lechat_jax.config import MistralConfig
from parity.check.faults.plant import Change, Weights, in_config, in_weights


def _layer(*, of: str, become: str) -> Change:
    """Weights of a layer under another's name of the same layer, and the other way round."""

    def change(_: MistralConfig, w: Weights, i: int) -> Weights:
        a, b = f"blocks.{i}.{of}", f"blocks.{i}.{become}"
        return {a: w[b], b: w[a]}

    return change


def _one(name: str, f: Callable[[MistralConfig, np.ndarray], np.ndarray]) -> Change:
    """One tensor changed; `{i}` in its name is the layer."""

    def change(config: MistralConfig, w: Weights, i: int) -> Weights:
        key = name.format(i=i)
        return {key: f(config, w[key])}

    return change


def _interleaved(x: np.ndarray) -> np.ndarray:
    """Rows of heads [N, H, D] taken for those of Mistral's own format, and put in order."""
    N, H, D = x.shape
    return x.reshape(N, H // 2, 2, D).swapaxes(1, 2).reshape(N, H, D)


def _permuted(*kernels: str) -> Change:
    def change(_: MistralConfig, w: Weights, i: int) -> Weights:
        keys = [f"blocks.{i}.attn.{kernel}.kernel" for kernel in kernels]
        return {key: _interleaved(w[key]) for key in keys}

    return change


def _from_next_layer(name: str) -> Change:
    def change(config: MistralConfig, w: Weights, i: int) -> Weights:
        return {name.format(i=i): w[name.format(i=(i + 1) % config.n_layers)]}

    return change


def _swapped_layers(config: MistralConfig, w: Weights, i: int) -> Weights:
    a, b = f"blocks.{i}.", f"blocks.{(i + 1) % config.n_layers}."
    return {
        key: w[key.replace(*pair, 1)]
        for pair in ((a, b), (b, a))
        for key in w
        if key.startswith(pair[0])
    }


def _flipped_bit(_: MistralConfig, x: np.ndarray) -> np.ndarray:
    bits = np.array(x, np.float32)
    weights = np.flatnonzero(bits)  # a zero with that bit is as good as zero
    bits.view(np.uint32).flat[weights[weights.size // 2]] ^= 1 << 16  # the last of a bfloat16
    return bits


def _transposed(_: MistralConfig, x: np.ndarray) -> np.ndarray:
    flat = x.reshape(x.shape[0], -1)
    return flat.T.reshape(x.shape)


def _has_one_feed_forward(config: MistralConfig) -> bool:
    return not config.n_experts


def _is_grouped(config: MistralConfig) -> bool:
    return config.latent_attention is None


def _has_a_head(config: MistralConfig) -> bool:
    return not config.tied_embeddings


def _has_windows(config: MistralConfig) -> bool:
    return any(config.windows)


WEIGHTS = (
    in_weights(
        "ids are one too high in the embedding",
        "embed",
        _one("embed.kernel", lambda _, x: np.roll(x, 1, 0)),
    ),
    in_weights(
        "queries and keys are permuted as if from Mistral's own format",
        "attn.0",
        _permuted("q", "k"),
        needs=_is_grouped,
    ),
    in_weights(
        "values are permuted like queries and keys", "attn.0", _permuted("v"), needs=_is_grouped
    ),
    in_weights("queries are permuted, keys are not", "attn.0", _permuted("q"), needs=_is_grouped),
    in_weights(
        "query heads are dealt out to the kv heads in turn",
        "attn.0",
        _one(
            "blocks.{i}.attn.q.kernel",
            lambda c, x: x.reshape(c.n_kv_heads, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape),
        ),
        needs=_is_grouped,
    ),
    in_weights(
        "heads are in reverse order in the output kernel",
        "attn.0",
        _one("blocks.{i}.attn.o.kernel", lambda _, x: x[:, ::-1]),
    ),
    in_weights(
        "a square kernel is transposed",
        "attn.0",
        _one("blocks.{i}.attn.o.kernel", _transposed),
        base={"dim": 48},
        needs=lambda c: c.dim == c.n_heads * c.value_dim,
    ),
    in_weights(
        "keys and values are swapped",
        "attn.0",
        _layer(of="attn.k.kernel", become="attn.v.kernel"),
        needs=_is_grouped,
    ),
    in_weights(
        "the two norms of a layer are swapped",
        "attn.0",
        _layer(of="attn_norm.scale", become="mlp_norm.scale"),
    ),
    in_weights(
        "gate and up are swapped",
        "mlp.0",
        _layer(of="mlp.gate.kernel", become="mlp.up.kernel"),
        needs=_has_one_feed_forward,
    ),
    in_weights(
        "one tensor is from the next layer",
        "mlp.1",
        _from_next_layer("blocks.{i}.mlp.up.kernel"),
        needs=_has_one_feed_forward,
        layer=1,
    ),
    in_weights(
        "two layers are swapped",
        "attn.1",
        _swapped_layers,
        layer=1,
        # Of two, the first would be another, too; and a dense one is no mixture.
        needs=lambda c: c.n_layers > 2 and not c.n_dense_layers,
    ),
    in_weights(
        "one bit of one weight is flipped",
        "mlp.1",
        _one("blocks.{i}.mlp.down.kernel", _flipped_bit),
        needs=_has_one_feed_forward,
        layer=1,
    ),
    in_weights(
        "the final norm is all ones", "norm", _one("norm.scale", lambda _, x: np.ones_like(x))
    ),
    in_weights(
        "the head is tied to the embedding",
        "logits",
        lambda _, w, i: {"head.kernel": w["embed.kernel"]},
        needs=_has_a_head,
    ),
    in_weights(
        "ids are one too high in the head",
        "logits",
        _one("head.kernel", lambda _, x: np.roll(x, 1, 0)),
        needs=_has_a_head,
    ),
)


def _windows(change: Callable[[int], int | None]) -> Callable[[MistralConfig], dict[str, Any]]:
    def changed(config: MistralConfig) -> dict[str, Any]:
        windows = tuple(change(w) if w else w for w in config.windows)
        return {"sliding_window": windows if len(set(windows)) > 1 else windows[0]}

    return changed


CONFIG = (
    in_config("the window has one key more", _windows(lambda w: w + 1), needs=_has_windows),
    in_config("the window has one key less", _windows(lambda w: max(1, w - 1)), needs=_has_windows),
    in_config("there is no window", _windows(lambda w: None), needs=_has_windows),
    in_config("theta is 1e6 instead of 1e4", lambda c: {"rope_theta": c.rope_theta * 100}),
    in_config("theta is 1e4 instead of 1e6", lambda c: {"rope_theta": c.rope_theta / 100}),
    in_config("eps is 1e-6 instead of 1e-5", lambda c: {"norm_eps": c.norm_eps / 10}),
    in_config("eps is 1e-5 instead of 1e-6", lambda c: {"norm_eps": c.norm_eps * 10}),
)
