"""Texts in files, and what their token streams are."""

import gzip
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import zstandard

from lechat_jax.data.tokens import Tokens
from lechat_jax.tokenizer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.mistral_v1()
BOS, EOS = TOKENIZER.bos_id, TOKENIZER.eos_id
TEXTS = [f"Document {i} has {i * i} words.\n" * (1 + i % 5) for i in range(97)]


def jsonl(path: Path, texts: Sequence[str]) -> Path:
    """A file of records with these texts, compressed as its suffix says."""
    raw = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    packed = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(raw.encode()))
    return path


def documents(stream: np.ndarray) -> list[str]:
    """The texts of a stream, whose documents each begin with BOS and end with EOS."""
    starts = [*np.flatnonzero(stream == BOS).tolist(), len(stream)]
    assert all(stream[end - 1] == EOS for end in starts[1:])
    return [TOKENIZER.decode(stream[a:b]) for a, b in itertools.pairwise(starts)]


def same(one: Tokens, other: Tokens) -> bool:
    """Whether both are the same streams of the same text."""
    facts = ("val_bytes", "size", "n_bytes", "sha256", "note")
    pairs = [(one.train, other.train), (one.val, other.val)]
    return all(a.tolist() == b.tolist() for a, b in pairs) and all(
        getattr(one, name) == getattr(other, name) for name in facts
    )
