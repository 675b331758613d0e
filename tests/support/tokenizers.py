"""Mistral's tokenizer files: those that mistral-common ships, and small ones of later versions."""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import sentencepiece

from lechat_jax.tokenizer.tokenizer import Tokenizer

SHIPPED = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
    "v7m1": "mistral_instruct_tokenizer_241114.model.v7m1",
    "v3-tekken": "tekken_240718.json",
    "v3m1-tekken": "tekken_240911.json",
}


def shipped(name: str) -> Path:
    """The file of that name in mistral-common's data."""
    spec = importlib.util.find_spec("mistral_common")
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "data", SHIPPED[name])


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    """A shipped tokenizer, loaded once."""
    return Tokenizer.from_file(shipped(name))


@functools.cache
def _real() -> dict[str, Any]:
    return json.loads(shipped("v3-tekken").read_text(encoding="utf-8"))


def small_tekken(path: Path, version: str) -> Path:
    """Tekken's first 2,000 merges, with the control tokens that later versions have."""
    from mistral_common.tokens.tokenizers.base import SpecialTokens
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    old = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    names = [str(getattr(name, "value", name)) for name in old]
    names += [token.value for token in SpecialTokens if token.value not in names]
    special = [{"rank": i, "token_str": n, "is_control": True} for i, n in enumerate(names)]
    sizes = {"default_vocab_size": 2100, "default_num_special_tokens": 100}
    config = {**_real()["config"], **sizes, "num_vocab_tokens": 2000, "version": version}
    fields = {"config": config, "vocab": _real()["vocab"][:2000], "special_tokens": special}
    if version == "v15":
        effort = {"values": ["none", "high"], "default": "none"}
        fields["model_settings_builder"] = {"reasoning_effort": effort}
    path.write_text(json.dumps(fields), encoding="utf-8")
    return path


def taught(folder: Path, **options: Any) -> Path:
    """A SentencePiece model of some 300 ids, as Mistral's are: BPE of the text as it is.

    `options` of the trainer make it another one.
    """
    usual: dict[str, Any] = {"normalization_rule_name": "identity"}
    usual |= {"remove_extra_whitespaces": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"The square of {i} is {i * i}." for i in range(2000)),
        model_prefix=str(folder / "taught"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **usual | options,
    )
    return folder / "taught.model"
