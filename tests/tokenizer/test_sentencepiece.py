"""SentencePiece's ids word by word from a cache, where no piece spans two words."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lechat_jax.tokenizer import sentencepiece as spm
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.tokenizers import taught
from tests.support.tokenizers import tokenizer as load


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
@given(
    text=st.text(st.sampled_from("ab c\u6f22\n\t\r\u00a0\u2581\u3000\0"), max_size=60) | st.text()
)
@example(text="  two words \n\n  and a line  ")
@example(text="\u2581 a \u2581")
def test_words_from_the_cache_have_the_ids_of_the_whole_text(version: str, text: str) -> None:
    tokenizer = load(version)
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text), "from the cache"


def test_rare_and_long_words_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spm, "MOST_WORDS", 3)
    monkeypatch.setattr(spm, "LONGEST_WORD", 9)
    tokenizer = Tokenizer.mistral_v1()
    assert isinstance(tokenizer.codec, spm.SentencePiece)
    text = "one unimaginable two three four five one"
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)
    assert list(tokenizer.codec._words or ()) == ["one", "two", "three"]


@pytest.mark.parametrize(
    "trained",
    [
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": True},
        {"user_defined_symbols": ["square of"]},
        {"user_defined_symbols": ["\n"]},
        {"split_by_whitespace": False},
    ],
    ids=["normalises", "drops spaces", "a piece of two words", "an end of line", "no words"],
)
def test_a_tokenizer_whose_ids_go_beyond_words_encodes_whole_texts(
    tmp_path: Path, trained: dict[str, Any]
) -> None:
    tokenizer = Tokenizer.from_file(taught(tmp_path, **trained))
    assert isinstance(tokenizer.codec, spm.SentencePiece)
    assert tokenizer.codec._words is None
    texts = ["The square of 12 is 144.", "\ufb01  e\u0301\n The square  of", ""]
    found = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    assert found == [tokenizer.encode(text) for text in texts]
