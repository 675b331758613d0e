"""A tokenizer travels with the weights, under the name that each format has for it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.eval import command as evaluate
from lechat_jax.formats.names import FORMATS, Format
from lechat_jax.generate import command as generate
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.tokenizer.jinja_template import chat_template
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.transcripts import Transcripts
from lechat_jax.train import command as train
from parity.convert.write import TOKENIZER_CONFIG
from tests.parity.checkpoints import convert, random_weights, write_torch
from tests.support.tokenizers import small_tekken
from tests.support.tokenizers import tokenizer as load_tokenizer

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
    found = SavedModel.open(tmp_path / "hf-lechat").tokenizer
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
    found = SavedModel.open(tmp_path / "lechat").tokenizer
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
    found = SavedModel.open(made).tokenizer
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


# --- a vocabulary that was grown ---

CHATML = {"<|im_end|>": 32000, "<|im_start|>": 32001}
QUESTION = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"


def resized(folder: Path, tiny: MistralConfig, rows: int, **config: Any) -> Path:
    """A model of Hugging Face's with more rows than its tokenizer has ids."""
    model = dataclasses.replace(tiny, vocab_size=rows, n_layers=1)
    start = write_torch(folder / "start", model, random_weights(model))
    Tokenizer.mistral_v1().save(start)
    hf = convert(start, folder / "hf", "hf")
    fields = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(fields | config))
    for name in ("generation_config.json", "tokenizer_config.json"):
        (hf / name).unlink()
    return hf


@pytest.mark.parametrize("settings", [None, {}, {"legacy": True}, {"legacy": False}])
def test_added_tokens_have_the_ids_of_transformers(
    settings: dict[str, Any] | None, tiny: MistralConfig, tmp_path: Path
) -> None:
    hf = resized(tmp_path, tiny, 32002)
    (hf / "added_tokens.json").write_text(json.dumps(CHATML))
    if settings is not None:
        settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **settings}
        (hf / "tokenizer_config.json").write_text(json.dumps(settings))
    lechat = convert(hf, tmp_path / "lechat", "lechat")
    back = convert(lechat, tmp_path / "back", "hf")
    ours = SavedModel.open(lechat).tokenizer
    assert ours
    for folder in (hf, back):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        for text in (QUESTION, "a <|im_end|> b<|im_end|><|im_end|>c  ", "no token"):
            assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (32000, [2, 32000], [2, 32000]),
        ([2, 32000], None, [2, 32000]),
        (32000, None, 32000),
        (None, [32000, 2], [32000, 2]),
        (2, None, 2),
    ],
)
def test_what_ends_a_text_survives_a_round_trip_and_ends_it(
    in_config: object, in_generation: object, expected: object, tiny: MistralConfig, tmp_path: Path
) -> None:
    hf = resized(tmp_path, tiny, 32002, eos_token_id=in_config)
    fields = {"bos_token_id": 1, "eos_token_id": in_generation, "temperature": 0.15}
    if in_generation:
        (hf / "generation_config.json").write_text(json.dumps(fields))
    source = hf
    for to in ("mistral", "torch", "lechat", "hf"):
        source = convert(source, tmp_path / f"{to}-again", to)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((source / name).read_text())["eos_token_id"] == expected
    if in_generation:
        assert json.loads((source / "generation_config.json").read_text()) == fields
    transformers.AutoConfig.from_pretrained(source)
    said = expected if isinstance(expected, list) else [expected]
    made = Generator.from_checkpoint(tmp_path / "lechat-again")
    assert made.eos_ids == {2, *said}
    (sample,) = made.generate([[1, 415]], 8, Sampling(temperature=0))
    ended = made.generate([[1, 415]], 8, Sampling(temperature=0), eos_ids=sample.ids[:1])
    assert (ended[0].ids, ended[0].text, ended[0].stopped) == (sample.ids[:1], "", "eos")


@pytest.mark.parametrize("rows", [32002, pytest.param(32064, marks=pytest.mark.slow)])
def test_a_resized_model_is_used_as_any_other(
    rows: int, tiny: MistralConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = resized(tmp_path, tiny, rows, eos_token_id=32000)
    (hf / "added_tokens.json").write_text(json.dumps(CHATML))
    lechat = convert(hf, tmp_path / "lechat", "lechat")
    (tmp_path / "text.txt").write_text(QUESTION * 60)
    run, data = tmp_path / "run", ["--data", str(tmp_path / "text.txt")]
    few = ["--max-tokens", "3", "--temperature", "0"]
    small = ["--steps", "2", "--batch", "1", "--block", "16", "--out", str(run)]
    assert generate.main([str(lechat), "--prompt-ids", "1,415,32001", *few]) == 0
    assert generate.main([str(lechat), "--prompt", QUESTION, *few]) == 0
    assert capsys.readouterr().out.count(QUESTION) == 1
    assert evaluate.main([str(lechat), *data, "--block", "16"]) == 0
    assert train.main(["--init-from", str(lechat), *data, *small, "--lora-rank", "2", *few]) == 0
    assert generate.main([str(run), "--prompt", QUESTION, *few]) == 0
    back = convert(run, tmp_path / "back", "hf")
    assert json.loads((back / "config.json").read_text())["eos_token_id"] == [2, 32000]
    assert json.loads((back / "added_tokens.json").read_text()) == CHATML
    assert len(transformers.AutoTokenizer.from_pretrained(back)) == 32002


# --- a tokenizer that is not read here ---


def test_a_conversion_says_what_to_do_without_a_tokenizer_and_that_works(
    tiny: MistralConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(tiny, vocab_size=32000, n_layers=1)
    start = write_torch(tmp_path / "start", config, random_weights(config))
    (start / "tokenizer.json").write_text("{}")
    lechat = convert(start, tmp_path / "my model", "lechat")
    said = capsys.readouterr().out
    assert (
        f"note:      {lechat} has no tokenizer of Mistral's, and a tokenizer.json is none" in said
    )
    assert f"generate:  python -m lechat_jax.generate '{lechat}' --prompt-ids 1\n" in said
    assert "--prompt " not in said
    few = ["--max-tokens", "2"]
    assert generate.main([str(lechat), "--prompt-ids", "1", *few]) == 0
    with pytest.raises(BadInput, match="so a prompt cannot be read; put the model's own into it"):
        generate.main([str(lechat), "--prompt", "Hi", *few])
    Tokenizer.mistral_v1().save(lechat)
    capsys.readouterr()
    assert generate.main([str(lechat), "--prompt", "Hi", *few]) == 0
    assert capsys.readouterr().out.startswith("Hi")
    back = convert(lechat, tmp_path / "back", "hf")
    assert (back / "tokenizer.model").read_bytes() == Tokenizer.mistral_v1().path.read_bytes()


# --- how a conversation is written down ---

CONVERSATIONS = (
    [("user", "Hi there"), ("assistant", "Hello!")],
    [
        *[("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!")],
        *[("user", "Why\n\nis it so?"), ("assistant", "Because.\nI say")],
    ],
    [("user", " spaces "), ("assistant", " lead and trail "), ("user", "x"), ("assistant", "\ny")],
)


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_a_model_taught_conversations_takes_a_template_that_writes_them_so(
    version: str, tiny: MistralConfig, tmp_path: Path
) -> None:
    ours = load_tokenizer(version)
    config = dataclasses.replace(tiny, n_layers=1, vocab_size=ours.vocab_size)
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    run.config = {"model": config.to_dict(), "train": {"chat": True}}
    ours.save(run.folder)
    Checkpoints(run.checkpoints).save(1, {"model": random_weights(config, np.dtype("f4"))}, {})
    hf = convert(convert(run.folder, tmp_path / "lechat", "lechat"), tmp_path / "hf", "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(hf)
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        ids, _, _ = Transcripts(ours).write(messages)
        assert theirs.apply_chat_template(messages, return_dict=False) == ids
        asked = theirs.apply_chat_template(
            messages[:-1], return_dict=False, add_generation_prompt=True
        )
        assert asked == ids[: len(asked)]
    with pytest.raises(Exception, match="only system, user and assistant are taught"):
        theirs.apply_chat_template([{"role": "tool", "content": "4"}])
    run.config = {"model": config.to_dict(), "train": {"chat": False}}
    assert not list(convert(run.folder, tmp_path / "text", "hf").glob("chat_template*"))
    run.config = {"model": config.to_dict(), "train": {"chat": True}}
    (run.folder / "chat_template.jinja").write_text("its own")
    kept = convert(run.folder, tmp_path / "kept", "hf")
    assert (kept / "chat_template.jinja").read_text() == "its own"


@pytest.mark.parametrize("version", ["v1", "v3", "v7"])
def test_a_template_has_the_spaces_that_the_settings_leave_to_it(
    version: str, tmp_path: Path
) -> None:
    ours = load_tokenizer(version)
    shutil.copy(ours.path, tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    settings = TOKENIZER_CONFIG | {"split_special_tokens": False, "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    template = chat_template(version, starts_anew=False)
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": content} for role, content in turns]
        found = theirs.apply_chat_template(messages, chat_template=template, return_dict=False)
        assert found == Transcripts(ours).write(messages)[0]
