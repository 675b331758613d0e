"""A tokenizer travels with the weights, under the name that each format has for it."""

import dataclasses
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lechat_jax.config import MistralConfig
from lechat_jax.tokenizer import Tokenizer
from lechat_jax.trained import Trained
from parity.names import FORMATS, Format
from tests.converting import convert, random_weights, write_torch
from tests.tokenizers import small_tekken
from tests.tokenizers import tokenizer as load_tokenizer

TEXTS = (
    "The cat sat on the mat.",
    "",
    " leading",
    "   three",
    "\nfirst\n\n  second\r\n\ttab",
    "😀 emoji 👩‍👩‍👧, é, e\u0301, 日本語, \u2581, \u00a0",
    "<s> and </s>, <unk> and [INST] as text",
    "<0x0A>",
    " ",
)


def speaking(folder: Path, tiny: MistralConfig, tokenizer: Tokenizer) -> Path:
    """A model in lechat_torch's format with that tokenizer."""
    config = dataclasses.replace(tiny, vocab_size=tokenizer.vocab_size, n_layers=1)
    write_torch(folder, config, random_weights(config))
    tokenizer.save(folder)
    return folder


@pytest.fixture
def with_tokenizer(tiny: MistralConfig, tmp_path: Path) -> Path:
    return speaking(tmp_path / "start", tiny, Tokenizer.mistral_v1())


@pytest.mark.parametrize("version", ["v1", "v3", "v7"])
def test_transformers_tokenizer_gives_the_same_ids(
    version: str, tiny: MistralConfig, tmp_path: Path
) -> None:
    ours = load_tokenizer(version)
    hf = convert(speaking(tmp_path / "start", tiny, ours), tmp_path / "hf", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(hf)

    def check(text: str) -> None:
        ids = [ours.bos_id, *ours.encode(text)]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids)

    for text in TEXTS:
        check(text)
    settings(max_examples=60)(given(st.text(max_size=30))(check))()
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (1, 2, ours.vocab_size)


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_the_name_of_a_tokenizer_says_its_version(
    version: str, tiny: MistralConfig, tmp_path: Path
) -> None:
    ours, name = load_tokenizer(version), f"tokenizer.model.{version}"
    start = speaking(tmp_path / "start", tiny, ours)
    hf = convert(start, tmp_path / "hf", "hf")
    assert (hf / "tokenizer.model").read_bytes() == ours.path.read_bytes()
    ways: list[tuple[Path, Format]] = [(start, "mistral"), (hf, "mistral"), (hf, "lechat")]
    for source, to in ways:
        made = convert(source, tmp_path / f"{source.name}-{to}", to)
        assert [path.name for path in made.glob("tokenizer.model*")] == [name]
        assert (made / name).read_bytes() == ours.path.read_bytes()
    found = Trained.open(tmp_path / "hf-lechat").tokenizer
    assert found
    assert (found.version, found.sha256) == (version, ours.sha256)


def test_a_name_that_says_another_version_is_put_right(tiny: MistralConfig, tmp_path: Path) -> None:
    start = speaking(tmp_path / "start", tiny, load_tokenizer("v3"))
    (start / "tokenizer.model.v3").rename(start / "tokenizer.model.v1")
    made = convert(start, tmp_path / "lechat", "lechat")
    assert [path.name for path in made.glob("tokenizer.model*")] == ["tokenizer.model.v3"]


def test_tekken_keeps_its_name_everywhere(tiny: MistralConfig, tmp_path: Path) -> None:
    tekken = Tokenizer.from_file(small_tekken(tmp_path / "tekken.json", "v7"))
    source = speaking(tmp_path / "start", tiny, tekken)
    for to in FORMATS:
        source = convert(source, tmp_path / to, to)
        assert (source / "tekken.json").read_bytes() == tekken.path.read_bytes()
        assert not list(source.glob("tokenizer*"))
    found = Trained.open(tmp_path / "lechat").tokenizer
    assert found
    assert found.sha256 == tekken.sha256


def test_of_several_tokenizers_the_folder_says_which(tiny: MistralConfig, tmp_path: Path) -> None:
    tekken = Tokenizer.from_file(small_tekken(tmp_path / "tekken.json", "v7"))
    start = speaking(tmp_path / "start", tiny, tekken)
    load_tokenizer("v1").save(start)
    load_tokenizer("v3").save(start)
    made = convert(start, tmp_path / "lechat", "lechat")
    names = {path.name for path in made.iterdir() if path.name.startswith("t")}
    assert names == {"tekken.json", "tokenizer.model.v3"}
    found = Trained.open(made).tokenizer
    assert found
    assert found.version == "v7"


def test_tokenizer_files_keep_their_content(with_tokenizer: Path, tmp_path: Path) -> None:
    hf = convert(with_tokenizer, tmp_path / "hf", "hf")
    (hf / "tokenizer_config.json").write_text('{"their": "own"}')
    (hf / "tokenizer.json").write_text("{}")
    lechat = convert(hf, tmp_path / "lechat", "lechat")
    assert Tokenizer.from_file(lechat / "tokenizer.model.v1").encode("a") == [264]
    again = convert(lechat, tmp_path / "again", "hf")
    assert (again / "tokenizer_config.json").read_text() == '{"their": "own"}'
    assert (again / "tokenizer.json").read_text() == "{}"
    assert (again / "tokenizer.model").read_bytes() == (hf / "tokenizer.model").read_bytes()
