"""Mistral's own ids, and a stream of text that is never broken."""

import importlib.util
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lechat_jax.errors import BadInput
from lechat_jax.tokenizer import sentencepiece as spm
from lechat_jax.tokenizer import tokenizer as module
from lechat_jax.tokenizer.chat_template import Conversation
from lechat_jax.tokenizer.tokenizer import StreamDecoder, Tokenizer, preferred
from lechat_jax.tokenizer.vocabulary import ends
from tests.support.tokenizers import SHIPPED, shipped, small_tekken
from tests.support.tokenizers import tokenizer as load

TOKENIZER = Tokenizer.mistral_v1()
HELLO = 22557
GRIN = [243, 162, 155, 131]  # the four bytes of U+1F600; byte b has the id b + 3

SAMPLES = [
    "Hello, world!",
    " leading space",
    "  two leading",
    "trailing  ",
    "tabs\tand\n\nnew lines\r\n",
    "many      spaces",
    "caf\u00e9 \u6f22\u5b57 \u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467 flag \U0001f1eb\U0001f1f7",
    "<s> </s> <unk> <0x41>",
    "\x00\x7f\ufffd\ufeff",
    "",
]

# Not U+2581, SentencePiece's own sign for a space; not surrogates, which are no text.
plain_text = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"]))
any_ids = st.lists(
    st.one_of(
        st.integers(0, 2),  # unknown, BOS, EOS
        st.integers(3, 258),  # bytes
        st.sampled_from([28705, 259, HELLO]),  # a space, two, a word
        st.integers(0, 31_999),
    )
)


def streamed(ids: list[int], cuts: list[int], prefix: list[int] | None = None) -> list[str]:
    """The pushes of the ids, cut at these places, and the flush."""
    decoder = StreamDecoder(TOKENIZER, prefix or [])
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    return [*(decoder.push(ids[a:b]) for a, b in pairwise(edges)), decoder.flush()]


# --- the tokenizer ---


def test_it_is_the_tokenizer_of_mistral_7b_v01() -> None:
    assert (TOKENIZER.vocab_size, TOKENIZER.bos_id, TOKENIZER.eos_id) == (32_000, 1, 2)
    assert TOKENIZER.sha256 == "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"
    assert TOKENIZER.encode("Hello world") == [HELLO, 1526]


def test_finding_it_does_not_import_mistral_common() -> None:
    program = (
        "import sys; from lechat_jax.tokenizer.tokenizer import Tokenizer; Tokenizer.mistral_v1();"
        "print(*{'mistral_common', 'jax'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout.split()) == (0, []), run.stderr


@pytest.fixture(scope="module")
def mistrals_own():
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    return SentencePieceTokenizer(TOKENIZER.path)


@pytest.mark.parametrize("text", SAMPLES)
def test_the_ids_are_those_of_mistral_common(mistrals_own, text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids == mistrals_own.encode(text, bos=False, eos=False)
    assert [TOKENIZER.bos_id, *ids, TOKENIZER.eos_id] == mistrals_own.encode(
        text, bos=True, eos=True
    )


@pytest.mark.parametrize("text", SAMPLES)
def test_decoding_gives_the_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(plain_text)
def test_decoding_gives_any_text_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_ids_may_be_numbers_of_numpy() -> None:
    assert TOKENIZER.decode(np.array([HELLO, 1526], np.uint16)) == "Hello world"


@pytest.mark.parametrize("id_", [-1, 32_000, 2**40])
def test_an_id_beyond_the_vocabulary_is_refused(id_: int) -> None:
    with pytest.raises(BadInput, match=f"id {id_} is not in the tokenizer's vocabulary of 32000"):
        TOKENIZER.decode([HELLO, id_])
    with pytest.raises(BadInput, match=f"id {id_} is not in the tokenizer's vocabulary of 32000"):
        StreamDecoder(TOKENIZER).push([id_])


def test_undecodable_bytes_of_a_command_line_are_refused() -> None:
    with pytest.raises(BadInput, match="character 2 of the text is not Unicode"):
        TOKENIZER.encode("ab\udcff")


# --- many texts at once ---


@pytest.mark.parametrize("num_threads", [0, 1, 2])
def test_a_batch_has_the_ids_of_its_texts(num_threads: int) -> None:
    batch = TOKENIZER.encode_batch(SAMPLES, num_threads)
    assert [ids.tolist() for ids in batch] == [TOKENIZER.encode(text) for text in SAMPLES]
    assert TOKENIZER.encode_batch([]) == []


# --- the stream ---


@given(any_ids, st.lists(st.integers(0, 40), max_size=6))
@example([28705, HELLO], [1])
@example([1, 28705, HELLO], [1, 2])
@example([*GRIN[:2], 1, *GRIN[2:]], [1, 2, 3])
@example([3 + byte for byte in b"\xed\xa0\x80\xe0\x80\x80\xf4\x90\x80\x80\xc0\xaf\xff"], [2, 5])
def test_the_stream_is_the_decoding(ids: list[int], cuts: list[int]) -> None:
    assert "".join(streamed(ids, cuts)) == TOKENIZER.decode(ids)


@given(plain_text, st.lists(st.integers(0, 40), max_size=6))
@example(SAMPLES[7], list(range(40)))
def test_text_is_streamed_without_a_broken_character(text: str, cuts: list[int]) -> None:
    pushes = streamed(TOKENIZER.encode(text), cuts)
    assert "".join(pushes) == text
    assert pushes[-1] == ""
    assert all(text.startswith("".join(pushes[:n])) for n in range(len(pushes)))


@given(plain_text, st.integers(0, 40))
def test_what_follows_a_prompt_keeps_its_space(text: str, cut: int) -> None:
    ids = TOKENIZER.encode(text)
    prompt, rest = ids[:cut], ids[cut:]
    said = StreamDecoder(TOKENIZER).push(prompt)
    assert said + "".join(streamed(rest, [1], prompt)) == text


def test_a_word_after_a_prompt_starts_with_a_space_and_after_bos_does_not() -> None:
    assert streamed([HELLO], [], TOKENIZER.encode("Say")) == [" Hello", ""]
    assert streamed([HELLO], [], [1]) == ["Hello", ""]
    assert streamed([HELLO], []) == ["Hello", ""]


def test_bytes_are_held_until_they_are_a_character() -> None:
    assert streamed(GRIN, [1, 2, 3]) == ["", "", "", "\U0001f600", ""]
    assert streamed(GRIN[2:], [], [HELLO, *GRIN[:2]]) == ["\U0001f600", ""], "begun in the prompt"


@pytest.mark.parametrize(
    ("ids", "pushes"),
    [
        ([*GRIN[:2], HELLO], ["", "", "\ufffd\ufffd Hello", ""]),  # a word cuts it short
        ([*GRIN[:2], 3 + 0x41], ["", "", "\ufffd\ufffdA", ""]),  # so does a letter
        ([3 + 0xFF, HELLO], ["\ufffd", " Hello", ""]),  # no character starts so
        ([3 + 0xE0, 3 + 0x80], ["", "\ufffd\ufffd", ""]),  # longer than it needs to be
        (GRIN[:3], ["", "", "", "\ufffd\ufffd\ufffd"]),  # nothing follows
    ],
)
def test_bytes_that_cannot_become_a_character_are_let_go_at_once(
    ids: list[int], pushes: list[str]
) -> None:
    assert streamed(ids, list(range(1, len(ids)))) == pushes


def test_the_work_per_id_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = spm.SentencePiece.decode

    def counted(self: spm.SentencePiece, ids: list[int]) -> str:
        sizes.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(spm.SentencePiece, "decode", counted)
    "".join(streamed([HELLO, *GRIN] * 200, list(range(1000))))
    assert len(sizes) <= 1000
    assert max(sizes) <= 2


# --- every version ---


@pytest.mark.parametrize(
    ("name", "version", "vocab_size", "file_name"),
    [
        ("v1", "v1", 32_000, "tokenizer.model.v1"),
        ("v2", "v2", 32_768, "tokenizer.model.v2"),
        ("v3", "v3", 32_768, "tokenizer.model.v3"),
        ("v7", "v7", 32_768, "tokenizer.model.v7"),
        ("v3-tekken", "v3", 131_072, "tekken.json"),
        ("v3m1-tekken", "v3", 131_072, "tekken.json"),
    ],
)
def test_the_version_is_found_in_the_content(
    name: str, version: str, vocab_size: int, file_name: str, tmp_path: Path
) -> None:
    nameless = tmp_path / "tokenizer.model"  # as Hugging Face calls it
    nameless.write_bytes(shipped(name).read_bytes())
    found = Tokenizer.from_file(nameless)
    assert (found.version, found.vocab_size, found.file_name) == (version, vocab_size, file_name)
    assert (found.bos_id, found.eos_id) == (1, 2)
    assert found.save(tmp_path).name == file_name


def test_the_name_says_how_images_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model.v7m1"
    path.write_bytes(shipped("v7m1").read_bytes())
    assert Tokenizer.from_file(path).version == "v7"
    assert Tokenizer.from_file(path).file_name == "tokenizer.model.v7m1"


@pytest.mark.parametrize("version", ["v7", "v11", "v13", "v15"])
def test_a_later_tekken_says_its_version(tmp_path: Path, version: str) -> None:
    found = Tokenizer.from_file(small_tekken(tmp_path / "tekken.json", version))
    assert (found.version, found.vocab_size) == (version, 2100)
    assert found.decode(found.encode("Hi, caf\u00e9")) == "Hi, caf\u00e9"


@pytest.mark.parametrize("name", SHIPPED)
def test_each_gives_the_ids_and_texts_of_mistral_common(name: str) -> None:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    theirs = MistralTokenizer.from_file(shipped(name)).instruct_tokenizer.tokenizer
    ours = load(name)
    for text in [*SAMPLES, "[INST] as text [/INST]"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, bos=False, eos=False)
        assert ours.decode(ids) == theirs.decode(ids) == text
    batch = ours.encode_batch(SAMPLES, 2)
    assert [ids.tolist() for ids in batch] == [ours.encode(text) for text in SAMPLES]
    special = [id_ for id_ in range(2000) if ours.is_control(id_)]
    assert set(special) == theirs.special_ids
    assert ours.decode(special) == ""


@pytest.mark.parametrize("name", ["v3", "v7", "v3-tekken"])
def test_each_is_streamed_as_it_is_decoded(name: str) -> None:
    ours = load(name)
    letters = {byte: id_ for id_, byte in ours.byte_of.items()}
    words = ours.encode(" of caf\u00e9 \u6f22\u5b57\U0001f600\n")
    some = st.one_of(
        st.integers(0, 20),
        st.sampled_from(sorted(ours.byte_of)),
        st.sampled_from([letters[byte] for byte in "\U0001f600".encode()]),
        st.sampled_from(words),
        st.integers(0, ours.vocab_size - 1),
    )

    def check(ids: list[int], cut: int) -> None:
        stream, parts = StreamDecoder(ours), [ids[:cut], ids[cut:]]
        pushes = [stream.push(part) for part in parts]
        assert "".join([*pushes, stream.flush()]) == ours.decode(ids)
        after = StreamDecoder(ours, parts[0])
        assert after.push(parts[1]) == pushes[1]

    given(st.lists(some, max_size=12), st.integers(0, 12))(check)()


def test_a_text_may_have_a_run_of_blanks_of_any_length() -> None:
    long = 1_000_000  # more than tiktoken's regular expressions can look back over
    ours = load("v3-tekken")
    ids = ours.encode(f"a{' ' * long}b")
    assert ours.decode(ids) == f"a{' ' * long}b"
    assert ids[-1:] == ours.encode(" b"), "the last blank is the next word's"
    assert len(set(ids[1:-2])) <= 2, "the others are one word, merged as far as there are ids"


@pytest.mark.parametrize("text", [*SAMPLES, "it's 123 \n\n  A\u0301b\u2028 /x\r\n"])
def test_the_way_without_a_limit_finds_the_ids_of_the_quick_one(
    monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    ours = load("v3-tekken")
    quick, asked = ours.encode(text), Conversation(ours).ask(text)

    def limited(self: object, text: str) -> list[int]:
        raise ValueError("Max stack size exceeded for backtracking")

    monkeypatch.setattr("tiktoken.Encoding.encode", limited)
    assert ours.encode(text) == quick
    assert [ids.tolist() for ids in ours.encode_batch([text])] == [quick]
    assert Conversation(ours).ask(text) == asked, "in mistral-common's templates, too"


def test_tekken_holds_bytes_until_they_are_a_character() -> None:
    ours = load("v3-tekken")
    ids = {byte: id_ for id_, byte in ours.byte_of.items()}
    stream = StreamDecoder(ours)
    grin = [ids[byte] for byte in "\U0001f600".encode()]
    assert [stream.push([id_]) for id_ in grin] == ["", "", "", "\U0001f600"]
    assert stream.push([*grin[:2], ids[ord("a")]]) == "\ufffda"
    assert stream.push([*grin[:2], ours.eos_id]) == "\ufffd", "a control token ends a character"
    assert (stream.push(grin[:3]), stream.flush(), stream.flush()) == ("", "\ufffd", "")


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (["tokenizer.model", "tokenizer.model.v3"], "tokenizer.model.v3"),
        (["tokenizer.model.v3", "tokenizer.model.v11"], "tokenizer.model.v11"),
        (["tokenizer.model.v7m1", "tokenizer.model.v7"], "tokenizer.model.v7m1"),
        (["tekken.json", "tokenizer.model.v3"], "tekken.json"),
        (["tokenizer.model"], "tokenizer.model"),
        (["tokenizer.json", "tokenizer.model.old", "config.json"], None),
    ],
)
def test_of_several_the_newest_is_taken(names: list[str], best: str | None) -> None:
    for order in (names, names[::-1]):
        found = preferred(map(Path, order))
        assert (found and found.name) == best


# --- its file ---


def test_the_file_is_copied_whole_and_read_again(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model.v1").write_text("an older one")
    path = TOKENIZER.save(tmp_path)
    assert path == tmp_path / "tokenizer.model.v1"
    assert path.read_bytes() == TOKENIZER.path.read_bytes()
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"
    again = Tokenizer.from_file(path)
    assert (again.path, again.sha256) == (path, TOKENIZER.sha256)


def test_a_failed_copy_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "tokenizer.model.v1"
    old.write_text("an older one")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        TOKENIZER.save(tmp_path)
    assert old.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\n\x05hello" * 9])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.model").write_bytes(content)
    with pytest.raises(BadInput, match=r"t\.model is not a SentencePiece model"):
        Tokenizer.from_file(tmp_path / "t.model")


@pytest.mark.parametrize("content", ["", "version https://git-lfs", "{}", '{"config": {}}', "{[}"])
def test_a_broken_tekken_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "tekken.json").write_text(content)
    with pytest.raises(BadInput, match=r"tekken\.json is not a tekken tokenizer"):
        Tokenizer.from_file(tmp_path / "tekken.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cannot read the tokenizer .*gone: No such file"):
        Tokenizer.from_file(str(tmp_path / "gone"))


def test_a_model_that_would_lose_characters_is_refused(tmp_path: Path) -> None:
    """Bits per byte mean nothing when an unknown character costs one token of <unk>."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from"] * 9),
        model_prefix=str(tmp_path / "t"),
        vocab_size=18,
        minloglevel=2,
    )
    with pytest.raises(BadInput, match="has no byte fallback"):
        Tokenizer.from_file(tmp_path / "t.model")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install mistral-common"):
        Tokenizer.mistral_v1()


# Tokens that were added to a model.

CHATML = {"<|im_end|>": 32000, "<|im_start|>": 32001}
QUESTION = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"


def grown(folder: Path, vocab_size: int, files: dict[str, Any]) -> Tokenizer:
    """Mistral's first tokenizer in a model's folder with these files beside it."""
    folder.mkdir(exist_ok=True)
    Tokenizer.mistral_v1().save(folder)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    found = Tokenizer.beside(folder, vocab_size)
    assert found
    return found


def named(tokens: dict[str, int], **more: Any) -> list[dict[str, Any]]:
    return [{"id": id_, "content": text, **more} for text, id_ in tokens.items()]


@pytest.mark.parametrize(
    "files",
    [
        {"added_tokens.json": CHATML},
        {"tokenizer.json": {"added_tokens": named(CHATML, special=True), "model": {}}},
        {
            "tokenizer_config.json": {
                "added_tokens_decoder": {str(t["id"]): t for t in named(CHATML)},
            }
        },
        {  # what transformers believes of two that differ
            "added_tokens.json": {"<|old|>": 32000, "<|older|>": 32001},
            "tokenizer_config.json": {"added_tokens_decoder": {"32000": "<|im_end|>"}},
            "tokenizer.json": {"added_tokens": named(CHATML)},
        },
    ],
)
@pytest.mark.parametrize("vocab_size", [32002, 32064])
def test_added_tokens_are_found_in_whichever_file_says_them(
    files: dict[str, Any], vocab_size: int, tmp_path: Path
) -> None:
    found, plain = grown(tmp_path / "model", vocab_size, files), Tokenizer.mistral_v1()
    ids = [32001, *plain.encode("user\nHi there"), 32000, *plain.encode("\n"), 32001]
    ids += plain.encode("assistant\n")
    assert found.vocab_size == vocab_size
    assert found.encode(QUESTION) == ids
    assert [x.tolist() for x in found.encode_batch([QUESTION, "", "Hi"])] == [
        ids,
        [],
        plain.encode("Hi"),
    ]
    assert found.decode(ids) == QUESTION
    assert found.decode([32000, *range(32002, vocab_size)]) == "<|im_end|>"
    assert found.sha256 != plain.sha256


@pytest.mark.parametrize("legacy", [False, True])
def test_a_text_with_added_tokens_comes_back_whole_and_in_pieces(
    legacy: bool, tmp_path: Path
) -> None:
    files = {"added_tokens.json": CHATML, "tokenizer_config.json": {"legacy": legacy}}
    found = grown(tmp_path / "model", 32002, files)

    @given(st.lists(st.sampled_from([*CHATML, "<|im", "Hi", " there", "\n", "é", "😀", " "])))
    def check(words: list[str]) -> None:
        text = "".join(words)
        ids = found.encode(text)
        assert found.decode(ids) == text
        stream = StreamDecoder(found)
        assert "".join(stream.push([id_]) for id_ in ids) + stream.flush() == text
        assert [x.tolist() for x in found.encode_batch([text])] == [ids]

    check()


def test_a_token_that_the_model_has_no_row_for_is_text(tmp_path: Path) -> None:
    """A padding token is often added and the embedding left as it is."""
    found = grown(tmp_path / "model", 32001, {"added_tokens.json": CHATML})
    assert found.encode("<|im_start|>") == Tokenizer.mistral_v1().encode("<|im_start|>")
    assert found.encode("<|im_end|>") == [32000]
    assert grown(tmp_path / "same", 32000, {"added_tokens.json": {"[PAD]": 32000}}).vocab_size


@pytest.mark.parametrize(
    ("vocab_size", "files", "message"),
    [
        (31999, {}, "has 32000 tokens and the model 31999; use the tokenizer that the model was"),
        (32768, {}, "has 32000 tokens and the model 32768; use the tokenizer that the model was"),
        (32002, {"added_tokens.json": {"x": "y"}}, "has an added token 'x' with the id 'y'"),
        (32002, {"added_tokens.json": {"x": [1]}}, r"has an added token 'x' with the id \[1\]"),
        (32002, {"tokenizer.json": {"added_tokens": {}, "model": {}}}, None),
        (32002, {"tokenizer.json": {"added_tokens": {"a": 1}}}, "whose added tokens are none"),
        (32002, {"tokenizer.json": {"added_tokens": ["x"]}}, "added token 'x' with the id None"),
        (32002, {"tokenizer_config.json": {"added_tokens_decoder": {"a": {}}}}, "the id None"),
        (32002, {"tokenizer_config.json": []}, r"tokenizer_config\.json is not a JSON object"),
    ],
)
def test_a_tokenizer_that_is_another_models_is_refused(
    vocab_size: int, files: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    if message is None:
        assert grown(tmp_path / "model", vocab_size, files).vocab_size == vocab_size
        return
    with pytest.raises(BadInput, match=message):
        grown(tmp_path / "model", vocab_size, files)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"eos_token_id": 32000}, (32000,)),
        ({"eos_token_id": [2, 32000]}, (2, 32000)),
        ({"eos_token_id": None, "bos_token_id": None}, ()),
        ({"eos_token_id": []}, ()),
    ],
)
def test_what_ends_a_text_is_one_id_or_several(
    files: dict[str, Any], expected: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(files))
    assert ends(tmp_path) == expected


@pytest.mark.parametrize("value", ["2", [2, "</s>"], -1, 2.0, True, {"id": 2}])
def test_what_is_no_id_ends_nothing(value: object, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(BadInput, match=r"says eos_token_id .*, which is no id and no list of ids"):
        ends(tmp_path)
