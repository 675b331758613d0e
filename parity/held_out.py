"""Text that no model of lechat's was trained on, in the rows that measuring reads."""

import math
from typing import NamedTuple

import numpy as np

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.cli.display import Display
from lechat_jax.data.held_out import BLOCK, HeldOut
from lechat_jax.data.rows import Rows
from lechat_jax.data.sources import form_of
from lechat_jax.data.tokens import load_tokens
from lechat_jax.errors import BadInput
from lechat_jax.shell import command
from lechat_jax.tokenizer.vocabulary import no_tokenizer


class Text(NamedTuple):
    """What both models read, in rows of equal length.

    Attributes:
        rows: of T + 1 tokens, with what counts of them.
        n_bytes: of UTF-8 that the counted tokens stand for; `None` for random ids.
        name: of the text.
        note: what a reader of the figures should know, or nothing.
    """

    rows: Rows
    n_bytes: int | None
    name: str
    note: str = ""


def held_out(trained: SavedModel, data: str | None, n_tokens: int, display: Display) -> Text:
    """Rows of the text held out from training, evenly spread over it, or else of random ids.

    Args:
        trained: whose tokenizer reads it.
        data: as for training; by default what a run was trained on, or training's default.
        n_tokens: to be read, or a few more to fill the rows; all of a shorter text.
        display: of the progress.

    Raises:
        BadInput: there is no such text, or the tokenizer is another model's.
    """
    block, vocab = min(BLOCK, n_tokens), trained.config.vocab_size
    n_rows = math.ceil(n_tokens / block)
    if (tokenizer := trained.tokenizer) is None:
        if data is not None:
            raise BadInput(no_tokenizer(trained.folder, "--data cannot be read"))
        ids = np.random.default_rng(0).integers(vocab, size=(n_rows, block + 1))
        rows = Rows(ids, np.ones_like(ids, bool))
        note = f"{trained.folder} has no tokenizer: the ids are random, no text that anyone wrote"
        return Text(rows, None, "random ids", note)
    asked = trained.run.config["train"] if trained.run else {}
    named = data if data is not None else asked.get("data")
    if form_of(named):
        raise BadInput(
            f"{named} holds examples and no text; name a text with --data, or measure with: "
            f"{command('lechat_jax.eval', trained.folder, data=named)}"
        )
    tokens = load_tokens(named, tokenizer, on_progress=display.counter("tokenising"))
    held = HeldOut.of_text(tokens, tokenizer, block, interim=n_rows)
    rows = Rows(held.rows.tokens[held.subset], np.asarray(held.rows.counted)[held.subset])
    notes = [tokens.note, trained.not_trained_on(data, tokens.name, tokens.sha256)]
    note = "; ".join(filter(None, notes))
    return Text(rows, held.bytes_of(held.subset), tokens.name, note)
