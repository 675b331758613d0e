"""What can be asked of a generator, what it answers, and what that costs."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from jax import monitoring

from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.checkpoint.training_state import Checkpoints
from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import MistralConfig, preset
from lechat_jax.devices import memory as room
from lechat_jax.errors import BadInput
from lechat_jax.generate import continuous_batch
from lechat_jax.generate.continuation import Sample, join
from lechat_jax.generate.decode import decode
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import bind, weights_of
from lechat_jax.tokenizer.tokenizer import Tokenizer
from tests.support.models import random_model

ROOT = Path(__file__).parents[2]
GREEDY = Sampling(temperature=0)
PLAIN = Sampling(temperature=1.0, top_p=1.0)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([length, seed]).integers(97, size=length).tolist()


@pytest.fixture(scope="module")
def made(tiny: MistralConfig) -> Generator:
    return Generator(random_model(tiny), chunk=4)


def test_a_seed_gives_a_text_and_each_row_another(made: Generator) -> None:
    prompts = [prompt_of(5)] * 3

    def drawn(seed: int) -> list[list[int]]:
        return [sample.ids for sample in made.generate(prompts, 9, Sampling(seed=seed))]

    assert drawn(1) == drawn(1)
    assert len({tuple(ids) for ids in drawn(1) + drawn(2)}) == 6


@pytest.mark.parametrize("patience", [-1.0, 1e9])
def test_a_stream_is_the_text_in_pieces_however_they_are_cut(
    made: Generator, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    prompts = [prompt_of(5), prompt_of(8)]
    whole = made.generate(prompts, 40, PLAIN)
    monkeypatch.setattr(continuous_batch, "PATIENCE", patience)
    rounds = list(made.stream_batch(prompts, 40, PLAIN))
    sizes = [len(pieces[0].ids) for pieces in rounds]
    assert sizes == ([1] * 40 if patience < 0 else [1, 2, 4, 8, 16, 9])
    for row, sample in enumerate(whole):
        assert [id_ for pieces in rounds for id_ in pieces[row].ids] == sample.ids
    assert [pieces[0].stopped for pieces in rounds] == [None] * (len(rounds) - 1) + ["length"]


def test_no_tokens_are_made_when_none_are_asked_for(made: Generator) -> None:
    nothing = Sample(ids=[], logprobs=[], text="", stopped="length")
    assert made.generate([prompt_of(5), prompt_of(1)], max_tokens=0) == [nothing, nothing]


def test_a_text_ends_at_eos_and_the_others_go_on(made: Generator) -> None:
    prompts = [prompt_of(5), prompt_of(8)]
    first, second = made.generate(prompts, 12, GREEDY)
    eos = next(id_ for id_ in first.ids if id_ not in second.ids)
    ended, other = made.generate(prompts, 12, GREEDY, eos_ids=[eos, 96])
    assert ended.ids == first.ids[: first.ids.index(eos) + 1]
    assert (ended.stopped, other) == ("eos", second)
    assert made.generate(prompts, 12, GREEDY, eos_ids=[]) == [first, second]


def test_without_a_window_generation_stops_at_the_context_and_says_so(
    tiny: MistralConfig,
) -> None:
    model = random_model(dataclasses.replace(tiny, sliding_window=(7, None, None)))
    made = Generator(model, chunk=5, context=24)
    prompts = [prompt_of(11), prompt_of(1), prompt_of(24)]
    samples = made.generate(prompts, 20, PLAIN)
    assert [(len(s.ids), s.stopped) for s in samples] == [
        (13, "context"),
        (20, "length"),
        (0, "context"),
    ]
    with pytest.raises(BadInput, match="the prompt has 25 tokens and the context 24"):
        made.generate([prompt_of(25)])


def test_with_windows_the_context_is_no_limit(tiny: MistralConfig) -> None:
    (sample,) = Generator(random_model(tiny), chunk=4, context=8).generate(
        [prompt_of(9)], 30, GREEDY
    )
    assert (len(sample.ids), sample.stopped) == (30, "length")


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(tiny: MistralConfig) -> None:
    model = random_model(dataclasses.replace(tiny, sliding_window=None))
    # Keys and values of 3 layers, 2 heads and 8 lanes, positions, and one row of scores of 6 heads.
    with pytest.raises(BadInput, match=r"the cache takes 412\.00 GB .* shorter context"):
        Generator(model, chunk=4, context=10**9).stream_batch([prompt_of(5)])


def test_a_context_that_does_not_fit_is_refused_before_the_weights_are_read(
    tiny: MistralConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny, sliding_window=None)
    save_weights(tmp_path / "model", config, weights_of(random_model(config)), None)
    monkeypatch.setattr(SavedModel, "load", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(BadInput, match=r"the weights and a cache of .* shorter context"):
        Generator.from_checkpoint(tmp_path / "model", context=10**9)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the functions that are compiled meanwhile."""
    names: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs["fun_name"]))

    monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        monitoring.unregister_event_duration_listener(note)


def test_two_functions_are_compiled_whatever_is_asked_for(tiny: MistralConfig) -> None:
    config = dataclasses.replace(tiny, n_layers=1, sliding_window=5)  # a shape of its own
    made = Generator(random_model(config), chunk=4)
    with compilations() as first:
        made.generate([prompt_of(9)], 3)
    assert [name for name in first if "prefill" in name or "decode" in name] == [
        "jit(prefill)",
        "jit(decode)",
    ]
    with compilations() as later:
        for length, n, how in [
            (1, 1, GREEDY),
            (2, 70, Sampling(temperature=2.0, top_k=5, top_p=0.5, min_p=0.1, seed=9)),
            (33, 200, PLAIN),
            (150, 0, PLAIN),
        ]:
            made.generate([prompt_of(length)], n, how, eos_ids=[n])
        Generator(random_model(config, seed=5), chunk=4).generate([prompt_of(3)], 2)
    assert later == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": [[1], []]}, "a prompt has no tokens"),
        ({"prompts": [[1, 97]]}, "token 97 .* 0 to 96"),
        ({"prompts": [[-1]]}, "token -1"),
        ({"prompts": [[1]], "max_tokens": -1}, "max_tokens must be at least 0"),
        ({"prompts": [[1]], "max_tokens": 2**31}, "max_tokens must be .* below"),
    ],
)
def test_what_cannot_be_continued_is_refused_at_once(
    made: Generator, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        made.stream_batch(**arguments)


def test_settings_without_sense_are_refused(tiny: MistralConfig) -> None:
    model = random_model(tiny)
    for chunk, context in ((0, 1), (1, 0)):
        with pytest.raises(BadInput, match="must be at least 1"):
            Generator(model, chunk=chunk, context=context)
    with pytest.raises(BadInput, match="has 32000 tokens and the model 97"):
        Generator(model, Tokenizer.mistral_v1())
    with pytest.raises(BadInput, match="no tokenizer"):
        Generator(model).encode("The")


def test_broken_weights_are_reported_and_not_babbled_with(tiny: MistralConfig) -> None:
    model = random_model(tiny)
    model.norm.scale[...] = jnp.full_like(model.norm.scale[...], jnp.nan)
    with pytest.raises(BadInput, match="not finite"):
        Generator(model).generate([prompt_of(3)], 2)


@pytest.fixture
def run(tmp_path: Path, tiny: MistralConfig) -> Run:
    """A run with two checkpoints, as training leaves it."""
    config = dataclasses.replace(tiny, vocab_size=32000, n_layers=1)
    run = Run.create(tmp_path / "run")
    run.config = {"model": config.to_dict(), "train": {}}
    Tokenizer.mistral_v1().save(run.folder)
    for step in (3, 5):
        weights = weights_of(random_model(config, seed=step))
        Checkpoints(run.checkpoints).save(step, {"model": weights, "other": [jnp.ones(2)]}, {})
    return run


def test_a_run_is_continued_with_its_newest_weights(run: Run) -> None:
    made = Generator.from_checkpoint(run.folder)
    prompt = made.encode("The cat")
    assert prompt == [1, 415, 5255]
    (sample,) = made.generate([prompt], 30, Sampling(seed=2))
    (same,) = Generator(random_model(made.config, seed=5)).generate([prompt], 30, Sampling(seed=2))
    assert sample.ids == same.ids
    tokenizer = Tokenizer.mistral_v1()
    assert "The cat" + sample.text == tokenizer.decode(prompt + sample.ids)
    pieces = made.stream_batch([prompt], 30, Sampling(seed=2))
    assert "".join(piece.text for (piece,) in pieces) == sample.text


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    files = (path for path in (run.checkpoints / "5" / "model").rglob("*") if path.is_file())
    damaged = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    made = Generator.from_checkpoint(run.folder)
    assert "warning: checkpoint 5" in capsys.readouterr().err
    assert made.generate([[1]], 4, GREEDY) == Generator(
        random_model(made.config, seed=3), Tokenizer.mistral_v1()
    ).generate([[1]], 4, GREEDY)


def test_a_run_without_a_tokenizer_speaks_in_ids(run: Run) -> None:
    (run.folder / "tokenizer.model.v1").unlink()
    made = Generator.from_checkpoint(run.folder)
    (sample,) = made.generate([[1, 2]], 5)
    assert (len(sample.ids), sample.text) == (5, "")


@pytest.fixture
def folder(tmp_path: Path, tiny: MistralConfig) -> Path:
    """Weights in lechat's format, stored in bfloat16 and with a tokenizer."""
    config = dataclasses.replace(tiny, vocab_size=32000, n_layers=1)
    weights = weights_of(random_model(config, jnp.bfloat16))
    save_weights(tmp_path / "model", config, weights, Tokenizer.mistral_v1().path)
    return tmp_path / "model"


def test_weights_alone_are_continued_as_a_run_is(folder: Path) -> None:
    made = Generator.from_checkpoint(folder)
    model = random_model(made.config, jnp.bfloat16)
    wide = {name: leaf.astype(jnp.float32) for name, leaf in weights_of(model).items()}
    by_hand = Generator(bind(made.config, wide), Tokenizer.mistral_v1())
    prompt = made.encode("The cat")
    assert made.generate([prompt], 9, PLAIN) == by_hand.generate([prompt], 9, PLAIN)


def test_a_cpu_computes_in_float32_unless_told_otherwise(folder: Path, run: Run) -> None:
    def types(folder: Path, **asked: Any) -> set[str]:
        made = Generator.from_checkpoint(folder, **asked)
        return {str(leaf.dtype) for leaf in made.weights.values()}

    assert types(folder) == types(run.folder) == {"float32"}
    assert types(folder, dtype="bfloat16") == {"bfloat16"}
    assert types(run.folder, dtype=jnp.bfloat16) == {"bfloat16"}


def test_elsewhere_it_computes_in_the_type_that_is_stored(
    folder: Path, tiny: MistralConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    made = Generator.from_checkpoint(folder)
    assert {str(leaf.dtype) for leaf in made.weights.values()} == {"bfloat16"}
    mixed = weights_of(random_model(tiny))
    mixed["head.kernel"] = mixed["head.kernel"].astype(jnp.bfloat16)
    save_weights(folder.with_name("mixed"), tiny, mixed, None)
    with pytest.raises(BadInput, match="several types, bfloat16 and float32; choose the one"):
        Generator.from_checkpoint(folder.with_name("mixed"))
    made = Generator.from_checkpoint(folder.with_name("mixed"), dtype="float32")
    assert made.weights["head.kernel"].dtype == jnp.float32


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = psutil.virtual_memory()._replace(available=16 * 10**9)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: memory)
    (folder / "config.json").write_text(json.dumps(preset("mistral-7b-v0.1").to_dict()))
    with pytest.raises(BadInput, match=r"take 28\.97 GB in float32 and 16\.00 GB are free; choose"):
        Generator.from_checkpoint(folder, dtype="float32")
    with pytest.raises(BadInput, match=r"config\.json is not what was saved"):
        Generator.from_checkpoint(folder, dtype="bfloat16")  # goes on, since 14.48 GB would fit


def test_weights_stay_as_they_are_stored_where_float32_would_not_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    memory = psutil.virtual_memory()._replace(available=int(1.5 * stored))
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: memory)
    made = Generator.from_checkpoint(folder)
    assert {str(leaf.dtype) for leaf in made.weights.values()} == {"bfloat16"}
    assert "so they stay in the type that is stored" in capsys.readouterr().err


def test_what_is_no_model_is_refused(tmp_path: Path, tiny: MistralConfig) -> None:
    with pytest.raises(BadInput, match=r"nowhere is not there"):
        Generator.from_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral", "dim": 1}))
    with pytest.raises(BadInput, match=r"config\.json lacks hidden_size, num_hidden_layers"):
        Generator.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": tiny.to_dict(), "train": {}}))
    with pytest.raises(BadInput, match="there is no checkpoint"):
        Generator.from_checkpoint(tmp_path)


PEAKS = """
import sys
from pathlib import Path
from lechat_jax.config import MistralConfig, preset
from lechat_jax.generate.generator import Generator
from tests.support.models import random_model

config = MistralConfig(
    dim=16, n_layers=2, n_heads=8, n_kv_heads=8, head_dim=128, hidden_dim=16, vocab_size=97,
    norm_eps=1e-5, rope_theta=1e4, sliding_window=8 if sys.argv[1] == "window" else None,
)
made = Generator(random_model(config), chunk=8, context=10_100)
made.generate([[1, 2, 3]], 1)
for n in map(int, sys.argv[2:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
    (sample,) = made.generate([[1, 2, 3]], n)
    assert len(sample.ids) == n
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def peak_memory(attention: str, *lengths: int) -> list[int]:
    """The most memory, in kB, that a process takes to generate so many tokens, one after another.

    Compiling is over by then: it takes 400 to 460 MB of the same program, by the luck of its
    threads. The kernel counts the peak, since `ru_maxrss` cannot be set back.
    """
    command = [sys.executable, "-c", PEAKS, attention, *map(str, lengths)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert run.returncode == 0, run.stderr
    return [int(line) for line in run.stdout.split()]


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)
@pytest.mark.slow
def test_ten_thousand_tokens_take_the_memory_of_a_hundred() -> None:
    """Each token has 16 kB of keys and values; 10,000 of them would be 165 MB."""
    few, many = peak_memory("window", 100, 10_000)
    assert abs(many - few) < 0.05 * few
    (room,) = peak_memory("full", 2)
    assert room > few + 150_000  # room for all of them would be seen


@pytest.mark.parametrize(
    ("temperature", "window"),
    [
        (0.0, None),
        (0.7, 7),
        (0.7, (7, None, 3)),
        *(pytest.param(0.0, w, marks=pytest.mark.slow) for w in (7, (7, None, 3))),
        pytest.param(0.7, None, marks=pytest.mark.slow),
    ],
)
def test_guessing_ahead_changes_nothing_but_the_time(
    tiny: MistralConfig, window: Any, temperature: float
) -> None:
    """Whatever is guessed, rows of their own pace, past every window and up to the context."""
    config = dataclasses.replace(tiny, sliding_window=window)
    made = Generator(random_model(config), chunk=5, context=90)
    sampling = Sampling(temperature=temperature, top_p=1.0, seed=5)
    prompts = [[3, 4, 5] * 6, prompt_of(9), [8], [1, 2] * 20]
    plain = made.generate(prompts, 80, sampling)
    for draft in (1, 4, 9) if isinstance(window, tuple) else (4,):
        ahead = made.generate(prompts, 80, sampling, draft=draft)
        assert [sample.ids for sample in ahead] == [sample.ids for sample in plain]
        assert [sample.stopped for sample in ahead] == [sample.stopped for sample in plain]
        for one, other in zip(ahead, plain, strict=True):
            np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-4)


def test_a_guess_stops_where_the_text_does(made: Generator) -> None:
    (whole,) = made.generate([prompt_of(6)], 30, GREEDY, ())
    end = whole.ids[12]
    (plain,) = made.generate([prompt_of(6)], 30, GREEDY, [end])
    (ahead,) = made.generate([prompt_of(6)], 30, GREEDY, [end], draft=6)
    assert ahead.ids == plain.ids == whole.ids[: whole.ids.index(end) + 1]
    assert ahead.stopped == "eos"


@pytest.fixture(scope="module")
def counting(tiny: MistralConfig) -> Generator:
    """Says after each id the next one, whatever came before."""
    weights = weights_of(random_model(tiny))
    for name, leaf in weights.items():
        if name.endswith(("o.kernel", "down.kernel")):
            weights[name] = jnp.zeros_like(leaf)
    weights["norm.scale"] = jnp.ones_like(weights["norm.scale"])
    embedding = weights["embed.kernel"]
    lengths = jnp.linalg.norm(embedding, axis=1, keepdims=True)
    weights["embed.kernel"] = 3 * embedding / lengths
    weights["head.kernel"] = jnp.roll(embedding / lengths, 1, axis=0)
    return Generator(bind(tiny, weights), chunk=4)


@pytest.mark.parametrize("draft", [0, 5])
def test_an_eos_among_right_guesses_is_the_last_token(
    counting: Generator, monkeypatch: pytest.MonkeyPatch, draft: int
) -> None:
    """Two prompts count to 19 again and again, so all guesses are right, the EOS 8 among them."""
    known = [*range(20)] * 4 + [*range(5)]
    rows = [known, [*known, 5, 6, 7], [9, 10, 11]]

    def counted(n: int) -> list[tuple[list[int], str | None]]:
        samples = counting.generate(rows, n, GREEDY, [8, 96], draft=draft)
        return [(sample.ids, sample.stopped) for sample in samples]

    assert counted(9) == [([5, 6, 7, 8], "eos"), ([8], "eos"), ([*range(12, 21)], "length")]
    assert counted(4) == [([5, 6, 7, 8], "eos"), ([8], "eos"), ([*range(12, 16)], "length")]
    assert counted(3) == [([5, 6, 7], "length"), ([8], "eos"), ([*range(12, 15)], "length")]
    calls = drafts_of(counting, monkeypatch, rows, 9, GREEDY, [8, 96], draft=draft)
    assert {guessed for _, guessed in calls} >= {draft}, "no guess was made"


def drafts_of(made: Generator, monkeypatch: pytest.MonkeyPatch, *asked: Any, **how: Any) -> list:
    """The number of steps of each call, and of the tokens that it guessed at a time."""
    calls = []

    def noted(*arguments: Any) -> Any:
        found = decode(*arguments)
        calls.append((int(found[1].steps), arguments[5]))
        return found

    monkeypatch.setattr(continuous_batch, "decode", noted)
    made.generate(*asked, **how)
    return calls


def test_guesses_are_made_only_where_they_have_been_right(
    counting: Generator, made: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text that counts around repeats itself after 97 tokens, and any other model's does not."""
    monkeypatch.setattr(continuous_batch, "PATIENCE", 1e9)
    ordinary = drafts_of(made, monkeypatch, [prompt_of(30)], 60, PLAIN, [], draft=5)
    assert {draft for _, draft in ordinary} == {0}
    around = drafts_of(counting, monkeypatch, [[1]], 400, GREEDY, [], draft=5)
    assert [draft for _, draft in around] == [0] * 7 + [5]
    assert sum(steps for steps, _ in around) == 127 + 46  # of 273 tokens, six at a time


def test_guesses_end_where_they_are_no_longer_right(
    counting: Generator, made: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt repeats itself and the model does not go on with it."""
    monkeypatch.setattr(continuous_batch, "PATIENCE", 1e9)
    calls = drafts_of(made, monkeypatch, [prompt_of(20) * 5], 60, PLAIN, [], draft=5)
    guessing = [steps for steps, draft in calls if draft]
    assert 0 < sum(guessing) < 12
    assert calls[-1][1] == 0


def test_rows_end_at_their_own_stop_texts(run: Run) -> None:
    made = Generator.from_checkpoint(str(run.folder))
    prompts = ["The cat", "Once upon a time", "x"]
    whole = made.generate(prompts, 40, GREEDY)
    stop = [whole[0].text[20:24], whole[1].text[50:55]]
    cut = made.generate(prompts, 40, GREEDY, stop=stop)
    assert {sample.stopped for sample in cut} <= {"stop", "length"}
    for one, all_ in zip(cut, whole, strict=True):
        places = [all_.text.find(text) for text in stop if text in all_.text]
        assert one.text == all_.text[: min(places)] if places else all_.text
        assert one.ids == all_.ids[: len(one.ids)]
        assert one.logprobs == all_.logprobs[: len(one.ids)]
    pieces = made.stream_batch(prompts[:1], 40, GREEDY, stop=stop[0])
    assert "".join(piece.text for (piece,) in pieces) == whole[0].text.partition(stop[0])[0]


def test_a_prompt_may_be_a_text_and_one_alone_is_one(run: Run) -> None:
    made = Generator.from_checkpoint(run.folder)
    both = made.generate(["The cat", [1, 415, 5255]], 5, GREEDY)
    assert both[0].ids == both[1].ids
    for alone in ("The cat", [1, 415, 5255]):
        assert made.generate(alone, 5, GREEDY).ids == both[0].ids
        assert join([*made.stream(alone, 5, GREEDY)]) == made.generate(alone, 5, GREEDY)
    with pytest.raises(BadInput, match="a stop text is empty"):
        made.generate("The cat", stop=["a", ""])


def test_whoever_asks_is_told_how_far_the_prompts_are_read(tiny: MistralConfig) -> None:
    told: list[tuple[int, int]] = []
    made = Generator(random_model(tiny), chunk=4, on_read=lambda *place: told.append(place))
    made.generate([prompt_of(11), prompt_of(2)], 1)
    # In turn the prompt that came first, and the one with the fewest tokens left.
    assert told == [(0, 11), (4, 11), (5, 11), (9, 11), (11, 11)]


@pytest.mark.parametrize("draft", [-1, 33])
def test_a_draft_out_of_range_is_refused(made: Generator, draft: int) -> None:
    with pytest.raises(BadInput, match=f"draft must be from 0 .off. to 32 tokens, not {draft}"):
        made.generate([[1]], 4, draft=draft)


def test_rows_of_a_later_batch_are_drawn_as_if_all_had_been_one(made: Generator) -> None:
    prompts = [prompt_of(5)] * 4
    together = made.generate(prompts, 9, PLAIN)
    later = made.generate(prompts[2:], 9, PLAIN, first_row=2)
    assert [sample.ids for sample in later] == [sample.ids for sample in together[2:]]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        pytest.param({"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"quantize": "int8"}, marks=pytest.mark.slow),
        pytest.param({"draft": 3}, marks=pytest.mark.slow),
    ],
)
def test_what_was_compiled_while_the_weights_were_read_is_used(
    folder: Path, asked: dict[str, Any]
) -> None:
    made, draft = Generator.from_checkpoint(folder, batch=2, **asked), asked.get("draft", 0)

    def hot() -> list[str]:
        with compilations() as names:
            made.generate([[1, 5, 6]] * 2, 4, GREEDY, draft=draft)
        return [name for name in names if "prefill" in name or "decode" in name]

    assert hot() == []
    jax.clear_caches()
    assert "jit(decode)" in hot()
