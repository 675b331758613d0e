"""The command line: what it prints where, what it writes, and what it refuses."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.cli import flags as cli
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.generate import command as generate
from lechat_jax.generate.command import RULE, main
from lechat_jax.generate.continuation import Sample
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.prompt_files import read_prompts
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import weights_of
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.models import random_model

ROOT = Path(__file__).parents[2]
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def config(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, vocab_size=32000, n_layers=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: MistralConfig) -> str:
    """A training run with a tokenizer."""
    run = Run.create(tmp_path_factory.mktemp("runs") / "small")
    run.config = {"model": config.to_dict(), "train": {}}
    Tokenizer.mistral_v1().save(run.folder)
    Checkpoints(run.checkpoints).save(7, {"model": weights_of(random_model(config))}, {})
    return str(run.folder)


@pytest.fixture(autouse=True)
def settings_of_jax_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "enable_compilation_cache", lambda: None)


def said(capsys: Output, *argv: str) -> tuple[str, str]:
    assert main(argv) == 0
    return capsys.readouterr()


def test_a_prompt_and_its_continuation_are_printed(
    run: str, config: MistralConfig, capsys: Output
) -> None:
    out, err = said(capsys, run, "--prompt", "The cat", "--max-tokens", "20", "--seed", "3")
    tokenizer = Tokenizer.mistral_v1()
    prompt = [1, *tokenizer.encode("The cat")]
    made = Generator(random_model(config), tokenizer)
    (sample,) = made.generate([prompt], 20, Sampling(seed=3))
    assert out == "The cat" + sample.text + "\n"
    assert err.startswith("20 tokens: the first after ")
    assert err.rstrip().endswith(" tokens/s")


def test_each_flag_of_sampling_arrives(run: str, config: MistralConfig, capsys: Output) -> None:
    flags = "--temperature 1.5 --top-k 50 --top-p 0.8 --min-p 0.01 --seed 5 --max-tokens 25"
    out, _ = said(capsys, run, "--prompt-ids", "1,2", *flags.split())
    how = Sampling(temperature=1.5, top_k=50, top_p=0.8, min_p=0.01, seed=5)
    made = Generator(random_model(config), Tokenizer.mistral_v1())
    (sample,) = made.generate([[1, 2]], 25, how)
    assert out == sample.text + "\n"


def test_samples_are_printed_with_a_rule_between_and_written_as_json(
    run: str, tmp_path: Path, capsys: Output
) -> None:
    file = tmp_path / "out.json"
    out, err = said(
        capsys, run, "--prompt", "A", "--samples", "3", "--max-tokens", "9", "--json", str(file)
    )
    written = json.loads(file.read_text())
    assert set(written) == {"samples", "tokens_per_s"}
    assert written["tokens_per_s"] > 0
    keys = {"prompt", "index", "sample", "ids", "logprobs", "text", "stopped"}
    assert [set(sample) for sample in written["samples"]] == [keys] * 3
    assert [sample["sample"] for sample in written["samples"]] == [0, 1, 2]
    assert [len(sample["ids"]) for sample in written["samples"]] == [9, 9, 9]
    assert all(logprob < 0 for sample in written["samples"] for logprob in sample["logprobs"])
    assert len({sample["text"] for sample in written["samples"]}) == 3
    texts = ["A" + sample["text"] for sample in written["samples"]]
    assert out == f"\n{RULE}\n".join(texts) + "\n"
    assert err.startswith("27 tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_without_a_prompt_the_model_begins_by_itself(run: str, capsys: Output) -> None:
    empty, _ = said(capsys, run, "--max-tokens", "5", "--temperature", "0")
    from_bos, _ = said(capsys, run, "--max-tokens", "5", "--temperature", "0", "--prompt-ids", "1")
    assert empty == from_bos != "\n"


def test_no_tokens_are_no_speed(run: str, tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "out.json"
    out, err = said(capsys, run, "--prompt", "The cat", "--max-tokens", "0", "--json", str(file))
    assert (out, err[:9]) == ("The cat\n", "0 tokens:")
    assert json.loads(file.read_text()) == {
        "samples": [
            {
                "prompt": "The cat",
                "index": 0,
                "sample": 0,
                "ids": [],
                "logprobs": [],
                "text": "",
                "stopped": "length",
            }
        ],
        "tokens_per_s": None,
    }


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory, tiny: MistralConfig) -> str:
    """A run without a tokenizer or a window, whose likeliest next token is always 2: EOS."""
    config = dataclasses.replace(tiny, n_layers=1, sliding_window=None)
    weights = weights_of(random_model(config))
    weights["norm.scale"] = jnp.zeros_like(weights["norm.scale"])  # all logits equal
    run = Run.create(tmp_path_factory.mktemp("runs") / "mute")
    run.config = {"model": config.to_dict(), "train": {}}
    Checkpoints(run.checkpoints).save(1, {"model": weights}, {})
    return str(run.folder)


def test_without_a_tokenizer_there_are_ids(mute: str, tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "out.json"
    flags = ("--prompt-ids", "5, 6", "--max-tokens", "3", "--temperature", "0")
    out, _ = said(capsys, mute, *flags, "--json", str(file))
    assert out == "5 6 0 0 0 \n"  # all are equally likely, and 0 is the lowest
    assert json.loads(file.read_text())["samples"][0]["text"] == ""


def test_weights_in_the_format_of_lechat_are_continued_too(
    run: str, config: MistralConfig, tmp_path: Path, capsys: Output
) -> None:
    save_weights(
        tmp_path / "m", config, weights_of(random_model(config)), Tokenizer.mistral_v1().path
    )
    flags = ("--prompt", "The cat", "--max-tokens", "9")
    assert said(capsys, str(tmp_path / "m"), *flags)[0] == said(capsys, run, *flags)[0]


def test_weights_without_a_tokenizer_continue_ids_in_the_type_asked_for(
    tiny: MistralConfig, tmp_path: Path, capsys: Output
) -> None:
    save_weights(tmp_path / "m", tiny, weights_of(random_model(tiny)), None)
    file = tmp_path / "out.json"
    flags = ["--prompt-ids", "1,5", "--max-tokens", "9", "--temperature", "0", "--json", str(file)]
    for dtype, asked in (("float32", []), ("bfloat16", ["--dtype", "bfloat16"])):
        said(capsys, str(tmp_path / "m"), *flags, *asked)
        (sample,) = Generator(random_model(tiny, dtype)).generate(
            [[1, 5]], 9, Sampling(temperature=0)
        )
        (written,) = json.loads(file.read_text())["samples"]
        expected = {"prompt": [1, 5], "ids": sample.ids, "logprobs": sample.logprobs, "text": ""}
        assert {key: written[key] for key in expected} == expected
    with pytest.raises(SystemExit):
        main([str(tmp_path / "m"), "--dtype", "float16"])  # activations would overflow


def test_a_full_context_is_reported(mute: str, capsys: Output) -> None:
    _, err = said(capsys, mute, "--prompt-ids", "5,6", "--context", "8", "--samples", "2")
    assert "2 of 2 samples stopped at the context of 8 tokens; --context gives" in err


def test_eos_ends_a_text_unless_it_is_to_be_ignored(
    tmp_path: Path, config: MistralConfig, capsys: Output
) -> None:
    run = Run.create(tmp_path / "brief")
    run.config = {"model": config.to_dict(), "train": {}}
    Tokenizer.mistral_v1().save(run.folder)
    weights = weights_of(random_model(config))
    first = Generator(random_model(config)).generate([[1]], 1, Sampling(temperature=0))[0].ids[0]
    head = weights["head.kernel"]
    weights["head.kernel"] = head.at[2].set(head[first] * 2)  # EOS outbids the first choice
    Checkpoints(run.checkpoints).save(1, {"model": weights}, {})
    flags = (str(run.folder), "--temperature", "0", "--max-tokens", "6")
    assert said(capsys, *flags)[1].startswith("1 tokens")
    assert said(capsys, *flags, "--ignore-eos")[1].startswith("6 tokens")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prompt a --prompt-ids 1", "not both"),
        ("--prompt-ids 1,b", "must be numbers with commas between them, not '1,b'"),
        ("--prompt-ids 1,32000", "token 32000 is not an id"),
        ("--samples 0", "--samples must be at least 1"),
        ("--batch 0", "--batch must be at least 1"),
        ("--speculate --draft 0", "--draft must be at least 1"),
        ("--speculate --draft 99", "draft must be from 0"),
        ("--prompts-file a.txt --prompt b", "give --prompt or --prompts-file, not both"),
        ("--max-tokens -1", "max_tokens must be at least 0"),
        ("--temperature -1", "temperature must be"),
        ("--top-p 0", "top_p must be"),
        ("--context 0", "must be at least 1"),
        ("--stop=", "a stop text is empty"),
        ("--json nowhere/out.json", "there is no folder .*nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run: str, capsys: Output, flags: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([run, *flags.split()]))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(err)


def test_text_needs_a_tokenizer_and_a_folder_a_model(mute: str, tmp_path: Path) -> None:
    for argv, message in (
        ([mute, "--prompt", "The"], "has no tokenizer of Mistral's, so a prompt cannot be read"),
        ([str(tmp_path)], "holds no model"),
    ):
        with pytest.raises(generate.BadInput, match=message):
            main(argv)


def test_ctrl_c_ends_it_without_a_traceback(
    run: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream_batch", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([run]))
    assert stop.value.code == 130


def program(run: str, cache: Path, *flags: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lechat_jax.generate", run, "--prompt", "Hi", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "LECHAT_CACHE": str(cache)},
    )


def test_the_program_streams_until_nobody_reads_and_keeps_what_it_compiled(
    run: str, tmp_path: Path
) -> None:
    with program(run, tmp_path / "cache", "--max-tokens", "1000000", "--ignore-eos") as talking:
        assert talking.stdout is not None
        assert talking.stderr is not None
        assert talking.stdout.read(2) == b"Hi"
        assert len(talking.stdout.read(100)) == 100  # long before the end
        talking.stdout.close()
        assert talking.wait(timeout=240) == 141
        assert talking.stderr.read() == b""
    assert any((tmp_path / "cache" / "jax").iterdir())


def test_each_prompt_of_a_file_is_continued_as_if_alone(
    run: str, capsys: Output, tmp_path: Path
) -> None:
    lines, objects = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("The cat\r\nOnce upon a time\n", encoding="utf-8")
    ids = Tokenizer.mistral_v1().encode("Once upon a time")
    objects.write_text(
        json.dumps({"prompt": "The cat"}) + "\n" + json.dumps({"ids": [1, *ids]}), encoding="utf-8"
    )
    flags = (run, "--max-tokens", "8", "--temperature", "0")
    alone = [said(capsys, *flags, "--prompt", text)[0] for text in ("The cat", "Once upon a time")]
    for path in (lines, objects):
        together = said(capsys, *flags, "--prompts-file", str(path))[0]
        assert together == f"{RULE}\n".join(alone)


def test_several_prompts_are_given_one_by_one(run: str, capsys: Output, tmp_path: Path) -> None:
    flags, file = (run, "--max-tokens", "4", "--temperature", "0"), tmp_path / "out.json"
    texts = ["The cat", "", "Once"]
    alone = [said(capsys, *flags, "--prompt", text)[0] for text in texts]
    asked = [part for text in texts for part in ("--prompt", text)]
    assert said(capsys, *flags, *asked)[0] == f"{RULE}\n".join(alone)
    ids = ("--prompt-ids", "1,5", "--prompt-ids", "1")
    said(capsys, *flags, *ids, "--samples", "2", "--json", str(file))
    written = json.loads(file.read_text())["samples"]
    matched = [(sample["prompt"], sample["index"], sample["sample"]) for sample in written]
    assert matched == [([1, 5], 0, 0), ([1, 5], 0, 1), ([1], 1, 0), ([1], 1, 1)]


def test_samples_of_a_file_are_matched_by_its_lines(
    run: str, capsys: Output, tmp_path: Path
) -> None:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("The cat\n\n  a b\n", encoding="utf-8")
    flags = ("--max-tokens", "2", "--prompts-file", str(prompts), "--json", str(file))
    _, err = said(capsys, run, *flags)
    assert err.startswith(f"1 of 3 prompts in {prompts} are empty: there the model")
    written = json.loads(file.read_text())["samples"]
    assert [(sample["index"], sample["prompt"]) for sample in written] == [
        (0, "The cat"),
        (1, ""),
        (2, "  a b"),
    ]


def test_a_stop_text_ends_a_sample(run: str, capsys: Output, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    flags = (run, "--prompt", "The cat", "--max-tokens", "30", "--temperature", "0")
    whole = said(capsys, *flags)[0].removeprefix("The cat").removesuffix("\n")
    stop = whole[25:29]
    out, _ = said(capsys, *flags, "--stop", "not there", "--stop", stop, "--json", str(file))
    assert out == "The cat" + whole.partition(stop)[0] + "\n"
    (sample,) = json.loads(file.read_text())["samples"]
    assert (sample["text"], sample["stopped"]) == (whole.partition(stop)[0], "stop")


def test_what_was_made_until_ctrl_c_is_written(
    run: str, capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, file = Generator.stream_batch, tmp_path / "out.json"

    def interrupted(self: Generator, *args: Any, **asked: Any) -> Iterator[list[Sample]]:
        rounds = right(self, *args, **asked)
        yield next(rounds)
        if asked["first_row"]:
            raise KeyboardInterrupt
        yield from rounds

    monkeypatch.setattr(Generator, "stream_batch", interrupted)
    asked = [part for text in "abc" for part in ("--prompt", text)]
    with pytest.raises(KeyboardInterrupt):
        main([run, *asked, "--batch", "1", "--max-tokens", "3", "--json", str(file)])
    written = json.loads(file.read_text())["samples"]
    found = [(sample["index"], len(sample["ids"]), sample["stopped"]) for sample in written]
    assert found == [(0, 3, "length"), (1, 1, "interrupted"), (2, 0, "interrupted")]


def test_a_terminal_gets_line_ends_and_no_codes(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    main([run, "--prompt", "a\r\nb\rc\x1b[2J", "--max-tokens", "0"])
    assert screen.getvalue() == "a\nb\nc\ufffd[2J\n"


def test_batches_do_not_change_what_is_drawn(run: str, capsys: Output, tmp_path: Path) -> None:
    flags = (run, "--max-tokens", "8", "--samples", "5", "--prompt", "The", "--batch")
    assert said(capsys, *flags, "5")[0] == said(capsys, *flags, "2")[0]


def test_guessing_ahead_says_the_same(run: str, capsys: Output) -> None:
    flags = (run, "--max-tokens", "40", "--prompt", "a b a b a b a b")
    assert said(capsys, *flags, "--speculate")[0] == said(capsys, *flags)[0]


def test_weights_can_be_kept_in_int8(run: str, capsys: Output) -> None:
    out = said(capsys, run, "--max-tokens", "5", "--prompt", "The cat", "--quantize", "int8")[0]
    assert out.startswith("The cat")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "there is no prompt in"),
        ("p.jsonl", '{"prompt": 3}', "line 1, has no text in `prompt`, nor integers in `ids`"),
        ("p.jsonl", '{"ids": [1]}\n{"ids": [true]}', "line 2, has no text in `prompt`"),
        ("p.jsonl", "{", "line 1, is not JSON"),
        ("p.jsonl", "[" * 9999, "line 1, is not JSON: it is nested too deeply"),
        ("p.txt", None, "cannot read .*: No such file"),
    ],
)
def test_a_file_that_holds_no_prompts_is_refused(
    tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=message):
        read_prompts(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_prompts_are_the_same_in_any_encoding_with_any_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, end: str
) -> None:
    raw = end.join(["caf\u00e9", "", "a\u2028b ", ""]).encode(encoding)
    (tmp_path / "p.txt").write_bytes(raw)
    assert read_prompts(tmp_path / "p.txt") == ["caf\u00e9", "", "a\u2028b "]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), "ascii"))
    assert read_prompts(Path("-")) == ["caf\u00e9", "", "a\u2028b "]
    objects = end.join(['{"prompt": "caf\u00e9", "ids": null}', '{"prompt": null, "ids": [1]}'])
    (tmp_path / "p.NDJSON").write_bytes(objects.encode(encoding))
    assert read_prompts(tmp_path / "p.NDJSON") == ["caf\u00e9", [1]]


def test_prompts_that_are_not_utf8_are_refused_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInput, match=r"p\.txt is not UTF-8 text: byte 3 .*iconv -f latin1"):
        read_prompts(tmp_path / "p.txt")
