"""Text of any size is tokenised in shards: by several processes, in flat memory, resumably."""

import hashlib
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

from lechat_jax.data import parallel_encoding, token_shards
from lechat_jax.data.sources import Document
from lechat_jax.data.token_shards import Processes, ShardedTokens
from lechat_jax.data.tokens import Tokens, load_tokens
from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.texts import TEXTS, TOKENIZER, jsonl, same


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many groups and shards of a small text, in this process."""
    monkeypatch.setattr(token_shards, "cores", lambda: 1)
    monkeypatch.setattr(token_shards, "GROUP", 200)
    monkeypatch.setattr(token_shards, "SHARD", 900)


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
    monkeypatch.setattr(token_shards, "cores", lambda: 3)
    monkeypatch.setattr(token_shards, "FEW_BYTES", 0)
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

    def stopping(self: Tokenizer, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        said.extend(texts)
        return encode(self, texts, num_threads)

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
        "import sys; from pathlib import Path; from lechat_jax.data import token_shards, tokens; "
        "from lechat_jax.tokenizer.tokenizer import Tokenizer; "
        "token_shards.GROUP, token_shards.SHARD, token_shards.FEW_BYTES = 400, 2000, 0; "
        "write, written = token_shards.write_arrays, []; "
        "token_shards.write_arrays = lambda *of: written.append(of[0]) or write(*of); "
        "made = tokens.load_tokens(sys.argv[1], Tokenizer.mistral_v1(), Path(sys.argv[2])); "
        "print(len(made.train), made.sha256, *(path.name for path in written))"
    )
    command = [sys.executable, "-c", program, str(file), str(tmp_path / "cache")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    while len([*tmp_path.glob("cache/*.shards/0*")]) < 5:
        assert process.poll() is None, "it was stopped while it tokenised"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {path.name for path in tmp_path.glob("cache/*.shards/0*")}
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    expected = load_tokens(str(file), TOKENIZER, tmp_path / "other")
    n_train, sha256, *written = run.stdout.split()
    assert (n_train, sha256) == (str(len(expected.train)), expected.sha256)
    assert not kept & {*written}, "what was in a shard was not tokenised again"
    assert len(kept) + len(written) > 30


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

    def listened(self: Tokenizer, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
        said[int(threading.current_thread().name)] += texts
        return encode(self, texts, num_threads)

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
        processes = Processes(index, 2, anywhere)
        found[index] = load_tokens(data, TOKENIZER, folder, processes=processes)

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
        from lechat_jax.data import token_shards, tokens
        from lechat_jax.tokenizer import sentencepiece
        from lechat_jax.tokenizer.tokenizer import Tokenizer
        peak = 0
        def measure(*_):
            global peak
            status = Path("/proc/self/status").read_text()
            peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        token_shards.SHARD, sentencepiece.MOST_WORDS = 1 << 20, 1000
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


@pytest.mark.usefixtures("small")
def test_a_damaged_shard_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, cache = str(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache"
    expected = load_tokens(text, TOKENIZER, tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(ShardedTokens, "_join", lambda self: 1 / 0)
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
    join, n_lost = ShardedTokens._join, 0

    def losing(self: ShardedTokens) -> None:
        nonlocal n_lost
        if not n_lost:
            n_lost += 1
            (cache / self._units[0].folder / name).unlink()
        join(self)

    monkeypatch.setattr(ShardedTokens, "_join", losing)
    found = load_tokens(file, TOKENIZER, cache)
    assert n_lost == 1
    assert same(found, load_tokens(file, TOKENIZER, tmp_path / "other"))


@pytest.mark.usefixtures("small")
def test_a_start_that_another_one_overtakes_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = str(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache"
    write, others = token_shards.write_arrays, list[Tokens]()

    def overtaken(path: Path, arrays: dict[str, Sequence[np.ndarray]]) -> None:
        write(path, arrays)
        if path.name == "00002" and not others:
            monkeypatch.setattr(token_shards, "write_arrays", write)
            others.append(load_tokens(file, TOKENIZER, cache))

    monkeypatch.setattr(token_shards, "write_arrays", overtaken)
    assert same(load_tokens(file, TOKENIZER, cache), others[0])
    assert [path.suffix for path in cache.iterdir()] == [".tokens"]


@pytest.mark.usefixtures("small")
def test_a_killed_worker_costs_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, cache = str(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache"
    monkeypatch.setattr(token_shards, "cores", lambda: 2)
    monkeypatch.setattr(token_shards, "FEW_BYTES", 0)
    write = token_shards.write_arrays

    def killing(path: Path, arrays: dict[str, Sequence[np.ndarray]]) -> None:
        write(path, arrays)
        if path.name == "00003":
            for child in psutil.Process().children():
                child.kill()

    monkeypatch.setattr(token_shards, "write_arrays", killing)
    with pytest.raises(BadInput, match="a process that tokenised ended with code -9"):
        load_tokens(file, TOKENIZER, cache)
    assert len([*cache.glob("*.shards/0*")]) == 4
    monkeypatch.setattr(token_shards, "write_arrays", write)
    assert same(
        load_tokens(file, TOKENIZER, cache), load_tokens(file, TOKENIZER, tmp_path / "other")
    )


@pytest.mark.usefixtures("small")
def test_a_full_disk_is_told_and_what_was_done_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = str(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "cache"
    write, left = token_shards.write_arrays, 5

    def filling(path: Path, arrays: dict[str, Sequence[np.ndarray]]) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise OSError(28, "No space left on device")
        write(path, arrays)

    monkeypatch.setattr(token_shards, "write_arrays", filling)
    with pytest.raises(
        BadInput, match=r"No space left on device\); the next start goes on from what"
    ):
        load_tokens(file, TOKENIZER, cache)
    assert len([*cache.glob("*.shards/0*")]) == 4
    left = 1000
    assert same(
        load_tokens(file, TOKENIZER, cache), load_tokens(file, TOKENIZER, tmp_path / "other")
    )
