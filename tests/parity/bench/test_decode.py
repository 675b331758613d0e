"""Decoding and reading are measured with everyone doing the same work, and shares add up."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from lechat_jax.config import PRESETS, MistralConfig
from lechat_jax.errors import BadInput
from parity.bench import isolated
from parity.bench.card import Card, Process
from parity.bench.command import main
from parity.bench.decode import agreement
from parity.bench.decoders import start_and_memory
from parity.bench.decoders.contestants import (
    SEED,
    Contestant,
    Models,
    compare,
    contestants,
    tail,
)
from parity.bench.decoders.lechat import IMPLS, Decoder, DtypeName, Impl, random_prompts
from parity.bench.decoders.llama_cpp import PACKAGES
from parity.bench.decoders.start_and_memory import Folders, first_tokens, peak_bytes
from parity.bench.decoders.torch import LechatTorch, Mode, Transformers, settle
from parity.report import Row
from tests.support import npm

Bench = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parity.peers.pytorch.cores", lambda: 1)


@pytest.fixture
def config(tiny: MistralConfig, monkeypatch: pytest.MonkeyPatch) -> MistralConfig:
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    return tiny


@pytest.fixture
def bench(config: MistralConfig, tmp_path: Path) -> Bench:
    """Runs the command on the tiny model; gives the report it wrote."""

    def run(work: str, *flags: str) -> dict[str, Any]:
        report = tmp_path / "report.json"
        common = ["--preset", "tiny", "--read-gb", "0.001", "--json", str(report)]
        assert main([work, *common, "--repetitions", "2", *flags]) == 0
        return json.loads(report.read_text(encoding="utf-8"))

    return run


def row(impl: Impl, dtype: DtypeName, *rates: float) -> Row:
    return Row("decode", impl, dtype, 1, 9, float(np.median(rates)), None, details={"rates": rates})


def test_all_decode_the_same_tokens_and_tell_their_share(bench: Bench, tmp_path: Path) -> None:
    plot = tmp_path / "bars.png"
    flags = "--batch 2 --context 20 --tokens 6 --no-compile --dtype float32 int8".split()
    report = bench("decode", *flags, "--plot", str(plot))
    found = [(row["impl"], row["dtype"]) for row in report["rows"]]
    assert found == [*((impl, "float32") for impl in IMPLS), ("lechat_jax", "int8")]
    for one in report["rows"]:
        assert (one["work"], one["batch"], one["context"]) == ("decode", 2, 20)
        assert one["tokens_per_s"] > 0
        assert 0 < one["share_of_read"]
        assert one["ratio"] > 0
        if one["dtype"] == "float32":
            assert one["same_ids"] >= 1 + 3 * 6  # the first, and what came in all repetitions
    assert report["rows"][0]["limit_tokens_per_s"] < report["rows"][3]["limit_tokens_per_s"]
    tried = report["rows"][2]["tried_s_per_token"]
    assert report["rows"][2]["note"] == min(tried, key=tried.__getitem__)
    assert len(tried) == 4
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_skipped_of_a_context_leaves_the_rest_where_it_was(
    config: MistralConfig, impl: Impl
) -> None:
    assert tail(config, 300) == 263  # the window of 7, and 256
    decoder = Models(config).decoder(Contestant(impl, "float32"))
    prompts = random_prompts(config, 2, 300, seed=1)
    texts = []
    for skip in (0, 300 - 263):  # three layers of windows reach back 18 tokens
        decoder.start(prompts, 20, skip)
        decoder.advance(19)
        texts.append([ids[:20] for ids in decoder.ids])
    assert texts[0] == texts[1]
    assert len({*texts[0][0], *texts[0][1]}) > 5  # no two models agree on that by chance


@pytest.mark.node
def test_llama_cpp_decodes_the_same(tiny: MistralConfig, pytestconfig: pytest.Config) -> None:
    packages = npm.packages(pytestconfig, *PACKAGES)
    config = dataclasses.replace(tiny, vocab_size=32000, dim=64, hidden_dim=96)
    models = Models(config, packages)
    prompts = random_prompts(config, 2, 30, SEED)
    decoders = [models.decoder(Contestant(impl, "float32")) for impl in ("lechat_jax", "llama.cpp")]
    for _ in range(2):  # the second time from nothing again
        for decoder in decoders:
            decoder.start(prompts, 20)
            assert decoder.advance(15) >= 15
        assert agreement(*decoders) >= 16


def test_what_llama_cpp_lacks_is_told(tiny: MistralConfig, tmp_path: Path) -> None:
    models = Models(dataclasses.replace(tiny, vocab_size=32000), tmp_path)
    who = Contestant("llama.cpp", "float32")
    with pytest.raises(BadInput, match=r"runs in Node\.js|npm install --prefix .* node-llama-cpp"):
        models.decoder(who)
    with pytest.raises(BadInput, match="none has 97 ids"):
        Models(tiny, tmp_path).decoder(who)


def test_a_model_without_windows_is_given_all_of_the_context(tiny: MistralConfig) -> None:
    ragged = dataclasses.replace(tiny, sliding_window=(7, None, 7))
    assert tail(ragged, 3000) == 3000


@pytest.mark.parametrize("mode", [Mode("static", "sdpa", False), Mode("dynamic", "eager", False)])
def test_each_mode_of_transformers_decodes_the_same(config: MistralConfig, mode: Mode) -> None:
    models = Models(config)
    ours = models.decoder(Contestant("lechat_jax", "float32"))
    theirs = models.decoder(Contestant("transformers", "float32"))
    assert isinstance(theirs, Transformers)
    theirs.mode = mode
    prompts = random_prompts(config, 2, 5, seed=0)  # the window is full on the way
    for decoder in (ours, theirs):
        decoder.start(prompts, 20)
        decoder.advance(15)
    assert agreement(ours, theirs) == 16


def test_a_step_reads_all_weights_but_the_embedding_and_the_window(config: MistralConfig) -> None:
    models = Models(config)
    weights = 4 * (3 * (5120 + 6720 + 80) + 97 * 40 + 40)
    key_and_value = 2 * 2 * 8 * 4
    assert models.bytes_a_step("float32", 1, 3) == weights + 3 * 3 * key_and_value
    assert models.bytes_a_step("float32", 2, 100) == weights + 2 * 3 * 7 * key_and_value
    scales = 3 * (48 + 16 + 16 + 40 + 56 + 56 + 40) + 97
    int8 = 3 * (5120 + 6720) + 97 * 40 + 4 * (scales + 7 * 40)
    assert models.bytes_a_step("int8", 1, 100) == int8 + 3 * 7 * key_and_value


def test_a_ratio_is_to_transformers_in_the_same_type_and_turn() -> None:
    rows = [
        row("lechat_jax", "float32", 20.0, 60.0, 30.0),
        row("transformers", "float32", 10.0, 20.0, 30.0),
        row("transformers", "bfloat16", 1.0, 1.0, 1.0),
        row("lechat_jax", "int8", 40.0, 80.0, 120.0),
    ]
    compare(rows, "rates")
    assert [one.details["ratio"] for one in rows] == [2.0, 1.0, 1.0, 4.0]
    alone = [row("lechat_jax", "float32", 1.0)]
    compare(alone, "rates")
    assert "ratio" not in alone[0].details


class Spoken:
    note = ""

    def __init__(self, *ids: list[int]) -> None:
        self.ids = list(ids)


def test_agreement_ends_where_any_row_differs() -> None:
    def agreed(one: Spoken, other: Spoken) -> int:
        return agreement(cast(Decoder, one), cast(Decoder, other))

    assert agreed(Spoken([1, 2, 3], [4, 5, 6]), Spoken([1, 2, 3], [4, 5, 6, 7])) == 3
    assert agreed(Spoken([1, 2, 3], [4, 5, 6]), Spoken([1, 2, 3], [4, 0, 6])) == 1


def test_only_lechat_is_measured_in_int8_and_int4() -> None:
    assert contestants(IMPLS, ("int4",)) == [Contestant("lechat_jax", "int4")]
    assert contestants(IMPLS, ("int8", "bfloat16"))[:2] == [
        Contestant("lechat_jax", "int8"),
        Contestant("lechat_jax", "bfloat16"),
    ]


@pytest.mark.slow
def test_guessing_ahead_is_compared_with_not_guessing(bench: Bench) -> None:
    flags = "--impl lechat_jax --tokens 4 --speculate 3".split()
    plain, none, some = bench("decode", *flags)["rows"]
    assert "draft" not in plain
    assert (none["draft"], some["draft"]) == (0, 3)
    assert none["speedup"] == 1
    assert none["context"] == some["context"] == 100
    assert some["identical"], some["note"]
    assert some["same_ids"] >= 12


def test_where_torch_cannot_compile_a_note_says_so(
    config: MistralConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler was found\nlong advice follows")

    monkeypatch.setattr(torch, "compile", fails)
    model = Models(config).decoder(Contestant("transformers", "float32"))
    assert isinstance(model, Transformers)
    settle(model, random_prompts(config, 1, 9, seed=0), may_compile=True)
    assert not model.mode.compiled
    said = "torch.compile with a static cache does not work here: no C++ compiler was found"
    assert said in model.note


@pytest.mark.slow
def test_the_compiled_peer_decodes_the_same(config: MistralConfig) -> None:
    models = Models(config)
    ours = models.decoder(Contestant("lechat_jax", "float32"))
    theirs = models.decoder(Contestant("transformers", "float32"))
    assert isinstance(theirs, Transformers)
    for cache in ("static", "dynamic"):
        theirs.mode = Mode(cache, "sdpa", compiled=True)
        for decoder in (ours, theirs):
            decoder.start(random_prompts(config, 1, 5, seed=0), 20)
            decoder.advance(15)
        assert agreement(ours, theirs) == 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folders_of_all_formats_hold_the_same_model(
    config: MistralConfig, tmp_path: Path, dtype: DtypeName
) -> None:
    models = Models(config)
    folders = Folders(tmp_path, models)
    prompts = random_prompts(config, 1, 9, seed=0)
    kinds: dict[Impl, type[LechatTorch] | type[Transformers]] = {
        "lechat_torch": LechatTorch,
        "transformers": Transformers,
    }
    for impl, kind in kinds.items():
        who = Contestant(impl, dtype)
        there, here = kind.load(folders.of(who), dtype), models.decoder(who)
        for decoder in (there, here):
            decoder.start(prompts, 9)
            decoder.advance(8)
        assert agreement(there, here) == 9


@pytest.mark.slow
def test_an_isolated_process_tells_its_memory(config: MistralConfig, tmp_path: Path) -> None:
    folders = Folders(tmp_path, Models(config))
    peak = peak_bytes(folders, Contestant("lechat_jax", "int8"), 1, 20, 2)
    assert peak is None or 1e6 < peak < 500e6
    assert folders.weight_bytes("int8") == 39400 + 97 * 40 + 4 * (2 * 97 + 816 + 7 * 40)


@pytest.mark.slow
def test_a_start_with_compiled_programs_is_told_beside_one_without(
    config: MistralConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_and_memory, "WARM", 1)
    found = first_tokens(Folders(tmp_path, Models(config)), "float32", 9)
    cold, warm = found["first_token_cold_s"], found["first_token_warm_s"]
    assert cold is not None
    assert warm is not None
    assert min(cold, warm) > 0.3  # a process starts in no less
    after = found["first_token_warm_after_load_s"]
    assert after is not None
    assert after < warm


def test_reading_is_timed_for_everyone(bench: Bench) -> None:
    rows = bench("prefill", "--tokens", "20", "300", "--batch", "2")["rows"]
    assert [(one["impl"], one["context"]) for one in rows] == [
        (impl, tokens) for tokens in (20, 300) for impl in IMPLS
    ]
    for one in rows:
        assert one["work"] == "prefill"
        assert one["tokens_per_s"] == pytest.approx(2 * one["context"] / one["seconds"])


@pytest.mark.slow
def test_a_card_is_measured_part_by_part(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    flags = "--preset lechat-15m --minutes 2 --context 16 --prompt 64 --rows 2 --tokens 2"
    alone = "--impl lechat_jax --no-int8 --read-gb 0.001"
    assert main(["card", *flags.split(), *alone.split(), "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [(r["work"], r["batch"], r["context"]) for r in report["rows"]] == [
        ("decode", 1, 16),
        ("prefill", 1, 64),
        ("decode", 2, 16),
    ]
    assert all(r["tokens_per_s"] > 0 for r in report["rows"]), report["rows"]
    assert report["rows"][0]["share_of_read"] > 0
    assert report["not_measured"] == []


def test_what_fails_on_a_card_is_a_row_and_not_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(
        failure: str, job: object, card: Card, process: Process, *_: object, until: float
    ) -> Any:
        """One that lacks memory for a part, one that dies, one that is stopped, one well."""

        def rows(*notes: str) -> list[Row]:
            return [
                Row(*part[:1], *process.who, *part[1:], None if note else 7.0, None, note=note)
                for part, note in zip(process.parts, notes, strict=False)
            ]

        match process.who:
            case ("transformers", _):
                yield from rows("")
                raise BadInput(f"{failure}: killed")
            case ("lechat_jax", "int8"):
                yield from rows("not measured: out of memory", "")
            case ("lechat_torch", _):
                raise BadInput(f"{failure}: there was no time left")
            case _:
                yield from rows("", "", "")

    monkeypatch.setattr(isolated, "run", run)
    path = tmp_path / "card.json"
    flags = "--context 8 --prompt 9 --rows 2"
    assert main(["card", *flags.split(), "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    told = [(r["impl"], r["dtype"], r["tokens_per_s"], r["note"]) for r in report["rows"]]
    late = "not measured: there was no time left"
    assert told == [
        *[("lechat_jax", "bfloat16", 7.0, "")] * 3,
        ("transformers", "bfloat16", 7.0, ""),
        *[("transformers", "bfloat16", None, "not measured: killed")] * 2,
        ("lechat_jax", "int8", None, "not measured: out of memory"),
        ("lechat_jax", "int8", 7.0, ""),
        *[("lechat_torch", "bfloat16", None, late)] * 3,
    ]
    assert len(report["not_measured"]) == 6


def test_the_most_important_comes_first_on_a_card() -> None:
    first, *others = Card().processes()
    assert (first.who, first.parts[0][:2]) == (Contestant("lechat_jax", "bfloat16"), ("decode", 1))
    assert [process.share for process in others] == sorted(process.share for process in others)
    assert others[-1].share == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("decode --batch 0", "--batch must be at least 1, not 0"),
        ("decode --context 100 0", "--context must be at least 1, not 100, 0"),
        ("decode --tokens 0", "--tokens must be at least 1"),
        ("decode --repetitions 0", "--repetitions must be at least 1"),
        ("decode --read-gb 0", "--read-gb must be more than 0"),
        ("decode --speculate 99", "--speculate must be from 0"),
        ("decode --speculate 2 --impl transformers", "name it in --impl"),
        (
            "decode --dtype int8 --impl transformers",
            "int8 and int4 are lechat's and llama.cpp's alone",
        ),
        ("decode --plot /nowhere/at/all/x.png", "there is no folder /nowhere/at/all"),
        ("decode --preset lechat-15b", "unknown preset 'lechat-15b'"),
        ("prefill --tokens 0", "--tokens must be at least 1"),
        (
            "prefill --dtype int8 --impl lechat_torch",
            "int8 and int4 are lechat's and llama.cpp's alone",
        ),
        ("card --minutes 0", "--minutes must be more than 0"),
        ("card --rows 0", "--rows must be at least 1"),
        ("card --preset lechat-15b", "unknown preset 'lechat-15b'"),
    ],
)
def test_bad_flags_are_one_clear_line(argv: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        main(argv.split())


@pytest.mark.parametrize("work", ["decode", "prefill"])
@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_peer_is_one_clear_line(
    work: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=r"not installed.*alone with --impl lechat_jax") as error:
        main([work])
    assert missing in str(error.value)
