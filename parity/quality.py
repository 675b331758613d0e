"""What quantising costs: a model and its int8 or int4 read the same held-out text, token by token.

python -m parity.quality DIR quantises the weights of DIR; with --against FOLDER it takes those
of a folder. They are computed with as they are, as generating does, never dequantised first.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int, Integer
from rich.console import Console

from lechat_jax.checkpoint.load import load_to_compute
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.cli import flags
from lechat_jax.cli.display import Display
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_writable, write_atomic
from lechat_jax.model.binding import Weights, bind
from lechat_jax.ops.matmul import project
from lechat_jax.quantize.scheme import INT8, Format, form_of, quantize_weights, scheme_for
from parity.held_out import Text, held_out
from parity.measure import machine_line
from parity.report import TableText

CHUNK = 256  # tokens whose logits are in memory at a time, of both models


@dataclasses.dataclass(frozen=True)
class Quality:
    """The flags of `python -m parity.quality`.

    Attributes:
        dir: Reference: a training run, or unquantised weights of any format.
        quantize: How the reference is quantised to be compared with itself; by default int8.
        against: Folder of weights to compare with the reference instead.
        data: Text whose held-out tenth is read, as for training; by default that of the run, or
            training's default.
        tokens: Tokens of it that are read, evenly spread, in rows of up to 1024.
        dtype: Type to compute in; by default as stored, but float32 on a CPU where that fits.
        json: File for the figures, for scripts.
    """

    dir: tyro.conf.Positional[Path]
    quantize: Format | None = None
    against: Path | None = None
    data: str | None = None
    tokens: int = 4096
    dtype: Literal["float32", "bfloat16"] | None = None
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.quantize and self.against:
            raise BadInput("--quantize and --against are two ways to say the same; leave out one")
        if self.tokens < 1:
            raise BadInput(f"--tokens must be at least 1, not {self.tokens}")
        check_writable(self.json)


class Tokens(NamedTuple):
    """What two models make of each token.

    Attributes:
        nats: -log of the probability that the reference gives to it.
        other_nats: and of that which the other gives.
        kl: KL(reference || other) over the whole vocabulary, in nats.
        agrees: whether both find the same token the likeliest.
    """

    nats: Float[np.ndarray, " tokens"]
    other_nats: Float[np.ndarray, " tokens"]
    kl: Float[np.ndarray, " tokens"]
    agrees: Bool[np.ndarray, " tokens"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see `--help`."""
    options = flags.parse(Quality, "parity.quality", __doc__ or "", argv)
    with Display(None) as display:
        found = measure(options, display)
    show(found, Console(highlight=False, soft_wrap=True))
    if options.json:
        write_atomic(options.json, json.dumps(found, indent=1, allow_nan=False) + "\n")
        print(f"report: {options.json}")
    return 0


def measure(options: Quality, display: Display) -> dict[str, Any]:
    """The figures, as JSON types.

    One model is in memory at a time. Of the reference only its head stays, and what that read
    at each place: its logits would take V / D times as much.

    Raises:
        BadInput: a folder cannot be read, the reference is quantised already, or the two are of
            different models.
    """
    trained = SavedModel.open(options.dir)
    if trained.quantization:
        raise BadInput(
            f"{options.dir} is {trained.quantization} itself; name the folder that it was made "
            "from, and this one with --against"
        )
    other = SavedModel.open(options.against) if options.against else None
    config = trained.config
    if other and other.config != config:
        raise BadInput(f"{options.dir} and {options.against} are not the same model")
    text = held_out(trained, options.data, options.tokens, display)
    inputs, counted = text.rows.tokens[:, :-1], np.asarray(text.rows.counted)[:, 1:]
    display.wait("loading weights")
    weights = _load(trained, options.dtype)
    dtype = str(weights["norm.scale"].dtype)
    rows = [_row(dtype, weights)]
    head = weights[config.head]
    read = [_hidden(config, weights, row) for row in _shown(inputs, display, "reference")]
    display.wait("quantising" if other is None else "loading weights")
    if other is None:
        weights = quantize_weights(weights, scheme_for(options.quantize, config) or INT8)
    else:
        weights.clear()
        weights = _load(other, dtype)
    rows.append(_row(str(form_of(weights) or dtype), weights))
    parts = []
    for i, row in enumerate(_shown(inputs, display, rows[1]["weights"])):
        x, y = read[i][0], _hidden(config, weights, row)[0]
        for place in range(0, len(x), CHUNK):
            chunk = slice(place, place + CHUNK)
            targets = jnp.asarray(text.rows.tokens[i, 1:][chunk], jnp.int32)
            parts.append(_compare(config, head, weights, x[chunk], y[chunk], targets))
    fields = (np.concatenate(leaves) for leaves in zip(*parts, strict=True))
    tokens = Tokens(*(leaf[counted.reshape(-1)] for leaf in fields))
    return {
        "folder": str(options.dir),
        "against": str(options.against) if options.against else None,
        **summary(tokens, text, rows),
        "machine": machine_line(),
    }


def summary(tokens: Tokens, text: Text, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tokens say together, beside the rows of the reference and the other."""
    n = len(tokens.kl)
    nats = [np.asarray(leaf, np.float64) for leaf in (tokens.nats, tokens.other_nats)]
    for row, each in zip(rows, nats, strict=True):
        row["loss"] = float(each.mean())
        row["perplexity"] = math.exp(row["loss"])
        bits = float(each.sum()) / math.log(2)
        row["bits_per_byte"] = bits / text.n_bytes if text.n_bytes else None
    rise = nats[1] - nats[0]
    return {
        "text": text.name,
        "tokens": n,
        "bytes": text.n_bytes,
        "rows": rows,
        "loss_rise": float(rise.mean()),
        "loss_rise_error": float(rise.std()) / math.sqrt(n),
        "kl_mean": float(np.mean(tokens.kl, dtype=np.float64)),
        "kl_p99": float(np.percentile(tokens.kl, 99)),
        "top1_agreement": float(np.mean(tokens.agrees)),
        "note": text.note,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The figures as a table, and what they mean in a few lines."""
    header = ("weights", "memory", "perplexity", "bits per byte", "nats per token")
    lines = [
        (
            row["weights"],
            f"{row['weight_bytes'] / 1e9:.3f} GB",
            f"{row['perplexity']:,.4f}",
            "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.5f}",
            f"{row['loss']:.5f}",
        )
        for row in found["rows"]
    ]
    console.print(TableText(header, lines).rich(console.is_terminal))
    reference, other = (row["weights"] for row in found["rows"])
    for line in (
        f"loss rises by {found['loss_rise']:.5f} ± {found['loss_rise_error']:.5f} nats a token "
        "(standard error)",
        f"KL({reference} || {other}): {found['kl_mean']:.6f} nats a token in the mean, "
        f"{found['kl_p99']:.6f} at the 99th percentile",
        f"the likeliest token is the same at {found['top1_agreement']:.2%} of places",
        f"text: {found['text']}, {found['tokens']:,} held-out tokens"
        if found["bytes"]
        else f"text: {found['text']}, {found['tokens']:,} tokens",
        found["note"],
        found["machine"],
    ):
        if line:
            console.print(line, markup=False)


def _load(trained: SavedModel, dtype: str | None) -> Weights:
    return load_to_compute(trained, dtype, None, lambda shapes: None)


def _row(kind: str, weights: Weights) -> dict[str, Any]:
    return {"weights": kind, "weight_bytes": sum(leaf.nbytes for leaf in weights.values())}


def _shown(
    rows: Integer[np.ndarray, "B T"], display: Display, kind: str
) -> Iterator[Int[Array, "1 T"]]:
    """Each row as a batch of one, while the display tells how many are done."""
    for done, row in enumerate(rows):
        yield jnp.asarray(row[None], jnp.int32)
        display.work(f"{kind}, row", done + 1, len(rows))


def _hidden(
    config: MistralConfig, weights: Weights, ids: Int[Array, "1 T"]
) -> Float[Array, "1 T D"]:
    """What the head reads, once it is known: until then the weights would stay in memory."""
    return jax.block_until_ready(_jitted_hidden(config, weights, ids))


@functools.partial(jax.jit, static_argnums=0)
def _jitted_hidden(
    config: MistralConfig, weights: Weights, ids: Int[Array, "1 T"]
) -> Float[Array, "1 T D"]:
    return bind(config, weights).hidden(ids)


@functools.partial(jax.jit, static_argnums=0)
def _compare(
    config: MistralConfig,
    head: Float[Array, "V D"],
    weights: Weights,
    x: Float[Array, "T D"],
    y: Float[Array, "T D"],
    targets: Int[Array, " T"],
) -> tuple[Array, ...]:
    """The fields of `Tokens`; the reference's head read `x`, and the other model's reads `y`."""
    reference = jax.nn.log_softmax(project(x, head, None, jnp.float32))
    other = jax.nn.log_softmax(bind(config, weights).logits(y))
    hit = jnp.arange(len(targets)), targets
    return (
        -reference[hit],
        -other[hit],
        jnp.sum(jnp.exp(reference) * (reference - other), axis=-1),
        reference.argmax(axis=-1) == other.argmax(axis=-1),
    )


if __name__ == "__main__":
    flags.run(main)
