"""The benchmark measures what it says: the same model on both sides, in turn, in one format."""

import dataclasses
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Bool, Integer

from lechat_jax.config import PRESETS, MistralConfig
from lechat_jax.data.batches import Batches
from lechat_jax.data.held_out import HeldOut
from lechat_jax.data.rows import Rows
from lechat_jax.errors import BadInput
from lechat_jax.model.attention import dense_attention
from lechat_jax.model.binding import bind
from lechat_jax.train.unused_ids import UnusedIds
from parity.bench.command import main
from parity.bench.learners import torch as torch_learners
from parity.bench.learners.lechat import AdamW, Setup, first_weights
from parity.bench.learners.race import Point, Runner, race
from parity.bench.train import Train
from parity.measure import PeakMemory, machine_line, read_speed, wait_until_idle
from parity.peers.transformers import build, drawn, sdpa

ROW = "work impl dtype batch context tokens_per_s peak_bytes losses".split()

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def config(tiny: MistralConfig, monkeypatch: pytest.MonkeyPatch) -> MistralConfig:
    """A layer of the tiny model with an id for each of the tokenizer's, as the preset `tiny`."""
    config = dataclasses.replace(tiny, n_layers=1, vocab_size=32000)
    monkeypatch.setitem(PRESETS, "tiny", config)
    torch.set_num_threads(1)
    return config


@pytest.fixture
def bench(config: MistralConfig, tmp_path: Path) -> Bench:
    """Runs the command on the tiny model and a short text; gives the report it wrote."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The cat sat on mat {i}, and slept.\n" for i in range(150)))

    def run(work: str, *flags: str) -> dict[str, Any]:
        report = tmp_path / "report.json"
        shape = "--batch 2 --block 16 --steps-per-call 2 --peer-attention sdpa".split()
        given = [*shape, "--data", str(text)] if work == "train" else []
        model = [] if work == "moe" else ["--preset", "tiny"]
        common = [*model, "--read-gb", "0.001", "--json", str(report)]
        assert main([work, *common, *given, *flags]) == 0
        return json.loads(report.read_text(encoding="utf-8"))

    return run


def training_setup(config: MistralConfig) -> Setup:
    stream = np.random.default_rng(0).integers(config.vocab_size, size=400).astype(np.uint16)
    unused = UnusedIds.none(config.vocab_size)
    weights = first_weights(config, 0, unused)
    return Setup(config, Batches(len(stream), 16, 2, seed=0), stream, 0, weights, unused, 2)


def test_from_the_same_model_the_same_optimizer_gives_the_same_losses(bench: Bench) -> None:
    """And the report has the keys that scripts read."""
    report = bench("train", "--no-compile", "--steps", "12", "--same-optimizer")
    assert report["machine"] == machine_line()
    assert report["read_gb_s"] > 0
    impls = ["lechat_jax", "lechat_torch", "transformers-eager"]
    assert [row["impl"] for row in report["rows"]] == impls
    for row in report["rows"]:
        assert row.keys() >= set(ROW)
        assert (row["work"], row["dtype"], row["batch"], row["context"]) == (
            "train",
            "float32",
            2,
            16,
        )
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / row["step_s"])
        assert row["mfu"] > 0
        assert len(row["losses"]) == 12
    ours, *others = (row["losses"] for row in report["rows"])
    assert ours[0] - min(ours) > 0.1  # it learns, so the rate is not zero on all sides
    told = report["largest_relative_difference"]
    assert list(told) == ["lechat_torch", "transformers-eager"]
    for theirs, difference in zip(others, told.values(), strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        assert ours == pytest.approx(theirs, rel=1e-4)
        largest = max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
        assert difference == pytest.approx(largest)


@pytest.mark.slow
def test_several_lengths_have_the_same_tokens_in_a_step(bench: Bench) -> None:
    flags = "--block 8 16 32 --batch 4 --window 5 --steps 3 --no-eager --no-compile --no-torch"
    report = bench("train", *flags.split())
    assert [(row["batch"], row["context"]) for row in report["rows"]] == [(4, 8), (2, 16), (1, 32)]
    assert len({row["losses"][0] for row in report["rows"]}) == 3  # of other windows of the text


@pytest.mark.slow
def test_a_window_and_an_attention_that_are_asked_for_are_used(bench: Bench) -> None:
    """One key for each query: what is read of a token is what is read of it alone."""
    flags = "--steps 3 --no-eager --no-compile --no-torch --attention dense banded --same-optimizer"
    one, again = bench("train", "--window", "1", *flags.split())["rows"]
    more, _ = bench("train", "--window", "5", *flags.split())["rows"]
    assert [one["impl"], again["impl"]] == ["lechat_jax-dense", "lechat_jax-banded"]
    assert one["losses"] == pytest.approx(again["losses"], rel=1e-5)
    assert one["losses"] != pytest.approx(more["losses"], rel=1e-5)


@pytest.mark.slow
def test_half_precision_is_that_of_both_sides(bench: Bench) -> None:
    flags = "--steps 3 --no-torch --no-compile --same-optimizer".split()
    single, half = (bench("train", *flags, "--dtype", d)["rows"] for d in ("float32", "bfloat16"))
    for one, other in zip(single, half, strict=True):
        assert other["dtype"] == "bfloat16"
        assert 0 < abs(one["losses"][0] - other["losses"][0]) < 0.05


def test_apart_is_the_same_measurement_of_each() -> None:
    asked = Train(block=(8, 16), batch=4, attention=("cudnn", "dense"), eager=False, apart=True)
    names, found = zip(*asked.alone(), strict=True)
    kinds = ["lechat_jax-cudnn", "lechat_jax-dense", "lechat_torch", "transformers-compiled"]
    assert [*names] == [*kinds, *kinds]
    assert [(t.lechat, t.attention[0], t.torch, t.compile) for t in found[:4]] == [
        (True, "cudnn", False, False),
        (True, "dense", False, False),
        (False, "cudnn", True, False),
        (False, "cudnn", False, True),
    ]
    assert [(t.batch, t.block) for t in found] == [(4, (8,))] * 4 + [(2, (16,))] * 4
    alike = dataclasses.replace(asked, apart=False, attention=("cudnn",), block=(8,))
    assert found[0] == dataclasses.replace(alike, torch=False, compile=False)


@pytest.mark.slow
def test_apart_gives_the_rows_of_all(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    flags = "--preset lechat-15m --batch 1 --block 16 --steps 2 --steps-per-call 1 --apart"
    flags += f" --no-compile --no-eager --read-gb 0.001 --json {report}"
    assert main(["train", *flags.split()]) == 0
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"]
    assert [row["impl"] for row in rows] == ["lechat_jax", "lechat_torch"]
    assert all(row["tokens_per_s"] > 0 for row in rows)


def test_converted_weights_compute_the_same_logits(config: MistralConfig) -> None:
    rng = np.random.default_rng(1)
    weights = {  # norms of one would hide a norm in the wrong place
        name: leaf + 0.3 * rng.standard_normal(leaf.shape, np.float32)
        for name, leaf in first_weights(config, 0, UnusedIds.none(config.vocab_size)).items()
    }
    ids = rng.integers(config.vocab_size, size=(2, 33))
    ours = jax.jit(lambda weights: bind(config, weights)(jnp.asarray(ids)))(weights)
    with torch.no_grad():
        theirs = build(config, weights)(input_ids=torch.from_numpy(ids)).logits
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(np.std(ours)))  # measured: 1e-5


def test_windows_of_several_sizes_are_refused(config: MistralConfig) -> None:
    ragged = dataclasses.replace(config, n_layers=3, sliding_window=(7, None, 9))
    with pytest.raises(BadInput, match="windows of 2 sizes"):
        drawn(ragged)


def test_the_faster_attention_is_named_with_its_reason(config: MistralConfig) -> None:
    chosen = torch_learners.fastest_attention(training_setup(config))
    assert chosen.name in ("eager", "sdpa")
    assert chosen.why.startswith(f"{chosen.name} attention takes")


@pytest.mark.slow
def test_a_mixture_is_the_same_whoever_trains_it(bench: Bench) -> None:
    flags = "--dim 64 --hidden-dim 24 --n-layers 1 --batch 2 --block 16 --turns 1 --others 4"
    rows = bench("moe", *flags.split())["rows"]
    ours, eager, grouped, again, fewer = (row["losses"] for row in rows)
    assert [row["n_experts"] for row in rows] == [8, 8, 8, 8, 4]
    assert ours == pytest.approx(eager, rel=1e-5)
    assert ours == pytest.approx(grouped, rel=1e-5)
    assert ours == again
    assert ours[0] != fewer[0]
    assert [row["ratio"] is None for row in rows] == [False, False, False, True, True]
    assert all(0 < row["mfu"] < 1 for row in rows)


@pytest.mark.slow
def test_where_torch_cannot_compile_a_row_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        def fails(*args: Any) -> Any:
            raise RuntimeError("no C++ compiler was found\nlong advice follows")

        return fails

    monkeypatch.setattr(torch, "compile", without_compiler)
    flags = "--no-torch --no-eager --steps 3 --same-optimizer".split()
    rows = bench("train", *flags)["rows"]
    assert [row["impl"] for row in rows] == ["lechat_jax", "transformers-compiled"]
    assert (rows[1]["tokens_per_s"], rows[1]["losses"]) == (None, [])
    assert rows[1]["note"] == "torch.compile does not work here: no C++ compiler was found"


def test_an_error_in_the_eager_peer_is_not_taken_for_a_missing_compiler(
    config: MistralConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = torch_learners.transformers(training_setup(config), AdamW(1e-3), "sdpa")
    monkeypatch.setattr(peer, "loss", lambda rows: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        peer.advance(1, 10)


@pytest.mark.slow
def test_the_compiled_peer_computes_the_same(bench: Bench) -> None:
    rows = bench("train", "--no-torch", "--steps", "4", "--same-optimizer")["rows"]
    assert [row["impl"] for row in rows][1:] == ["transformers-eager", "transformers-compiled"]
    for row in rows[1:]:
        assert row["losses"] == pytest.approx(rows[0]["losses"], rel=1e-4)


@pytest.mark.parametrize(
    ("argv", "instead"),
    [(["train"], "--no-torch --no-eager --no-compile"), (["attention"], "--no-sdpa")],
)
@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_a_missing_peer_is_one_clear_line(
    argv: list[str], instead: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=r'needs \w+, which.*pip install -e "\.\[torch\]"') as error:
        main(argv)
    assert missing in str(error.value)
    assert instead in str(error.value)


def test_lechat_alone_needs_no_torch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    flags = "--no-torch --no-eager --no-compile --steps 3".split()
    assert [row["impl"] for row in bench("train", *flags)["rows"]] == ["lechat_jax"]


@pytest.mark.slow
def test_minutes_give_a_curve_of_both(bench: Bench, tmp_path: Path) -> None:
    plot = tmp_path / "curve.png"
    times = "--minutes 0.02 --slice 0.2 --eval-every 0.5 --eval-rows 1".split()
    report = bench("train", "--no-torch", "--no-compile", *times, "--plot", str(plot))
    for impl in ("lechat_jax", "transformers-eager"):
        own = [point for point in report["curve"] if point["impl"] == impl]
        assert own[-1]["seconds"] >= 1.2  # a first call that took longer is still scored
        assert [point["seconds"] for point in own] == sorted(point["seconds"] for point in own)
        assert all(0 < point["bpb"] < 20 and point["tokens"] % 32 == 0 for point in own)
    assert plot.read_bytes().startswith(b"\x89PNG")


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Walker:
    """Takes a step in so many seconds of a clock; remembers the run's length it was told."""

    config = PRESETS["lechat-15m"]

    def __init__(self, seconds: float, clock: Clock) -> None:
        self.seconds, self.clock = seconds, clock
        self.step, self.note = 0, ""
        self.totals: list[int] = []

    def advance(self, n: int, total: int) -> list[float]:
        self.clock.now += n * self.seconds
        self.step += n
        self.totals.append(total)
        return [1.0] * n

    def nats(
        self,
        inputs: Integer[np.ndarray, "B T"],
        targets: Integer[np.ndarray, "B T"],
        counted: Bool[np.ndarray, "B T"],
    ) -> float:
        self.clock.now += 100.0  # which must be on nobody's clock
        return float(np.log(2) * counted.sum() * 8)

    def device_bytes(self) -> int | None:
        return None


def test_in_a_race_each_clock_runs_alone_and_the_length_is_foreseen(
    config: MistralConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("parity.bench.learners.race.time", clock)
    walkers = [Walker(1.0, clock), Walker(3.0, clock)]
    runners = [
        Runner(impl, lambda walker=walker: walker, training_setup(config))
        for impl, walker in zip("AB", walkers, strict=True)
    ]
    rows = Rows(np.ones((1, 5), np.int64), np.ones((1, 5), bool))
    held_out = HeldOut(rows, 16, np.array([0]), bytes_of=lambda chosen: 16)
    told: list[Point] = []
    points, _ = race(
        runners, held_out, seconds=60, slice_seconds=8, eval_seconds=20, on_point=told.append
    )
    bits = 2.0  # 8 a token, 4 tokens, 16 bytes
    assert points == [
        *(Point("A", s, s * 32, bits) for s in (20, 40, 60)),
        *(Point("B", s, s // 3 * 32, bits) for s in (24, 42, 60)),
    ]
    assert "".join(point.impl for point in told) == "BAABBA"  # abreast, not one by one
    for walker in walkers:
        assert set(walker.totals[2:]) == {walker.step}  # the two before found out the speed
    assert [runner.tokens_per_s for runner in runners] == pytest.approx([32, 32 / 3])


def test_a_loss_that_is_no_number_stops_the_race(config: MistralConfig) -> None:
    class Diverging(Walker):
        def advance(self, n: int, total: int) -> list[float]:
            return [float("nan")] * n

    runner = Runner("A", lambda: Diverging(1.0, Clock()), training_setup(config))
    with pytest.raises(BadInput, match="loss of A is not finite after step 2"):
        runner.call(2, 10)


def test_the_rate_rises_then_falls_to_zero() -> None:
    shares = [AdamW(rate=1.0, warmup=10).share_of_rate(step, 50) for step in range(50)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[8] == pytest.approx(42 / 50)
    assert shares[-1] == pytest.approx(1 / 50)


@pytest.mark.slow
def test_attention_is_timed_at_every_length(bench: Bench) -> None:
    report = bench("attention", "--windows", "4", "--repetitions", "1")
    seen = {(r["kernel"], r["impl"], r["pass"], r["context"]) for r in report["rows"]}
    kernels = [("banded", "lechat_jax"), ("dense", "lechat_jax"), ("sdpa", "transformers")]
    assert seen == {
        (*kernel, passes, context)
        for kernel in kernels
        for passes in ("forward", "forward+backward")
        for context in (8, 16, 32, 64)
    }
    for row in report["rows"]:
        assert row.keys() >= set(ROW)
        assert row["tokens_per_s"] == pytest.approx(row["context"] / row["seconds"])
        assert (row["doubling"] is None) == (row["context"] == 8)
    assert report["largest_doubling"].keys() == {"banded", "dense", "sdpa"}


@pytest.mark.parametrize("window", [1, 4, 100])
def test_the_timed_peer_attention_is_the_same_attention(window: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 19, n, 8), np.float32) for n in (6, 2, 2))
    out = sdpa(q, k, v, window, is_both=False)()
    ours = dense_attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), window)
    assert isinstance(out, torch.Tensor)
    np.testing.assert_allclose(out.numpy(), ours, atol=1e-6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train --steps 5 --steps-per-call 5", "--steps must be more than --steps-per-call"),
        ("train --batch 0", "--batch must be at least 1, not 0"),
        ("train --slice 0", "--slice must be more than 0"),
        ("train --minutes 0", "--minutes must be more than 0"),
        ("train --block 128 100", "--block must be numbers that divide the 1536 tokens of a step"),
        ("train --block 64 128 --minutes 1", "--minutes takes one --block"),
        ("train --apart --minutes 1", "leave out --apart"),
        ("train --no-lechat --same-optimizer", "leave out --no-lechat"),
        ("train --no-lechat --no-torch --no-eager --no-compile", "nothing is measured"),
        ("train --plot x.png", "--plot draws the curves of --minutes"),
        ("train --same-optimizer --minutes 1", "leave out --minutes"),
        ("train --preset lechat-15b", "unknown preset 'lechat-15b'"),
        ("train --json /nowhere/at/all/report.json", "there is no folder /nowhere/at/all"),
        ("attention --windows 0", "--windows must be"),
        ("attention --repetitions 0", "--repetitions must be at least 1"),
    ],
)
def test_bad_flags_are_one_clear_line(argv: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        main(argv.split())


@pytest.mark.parametrize("work", ["train", "attention"])
def test_help_describes_each_flag(work: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([work, "--help"])
    assert end.value.code == 0
    assert "Size of the array whose reading measures" in capsys.readouterr().out


def test_peak_memory_sees_what_was_there_and_is_gone() -> None:
    with PeakMemory() as memory:
        np.ones(25_000_000)  # 200 MB
    assert memory.bytes is None or 190e6 < memory.bytes < 400e6


def test_a_busy_thread_is_noticed() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        assert not wait_until_idle(limit_s=0.2)
    finally:
        stop.set()
        thread.join()
    assert wait_until_idle(limit_s=10.0)


def test_the_read_says_how_it_was_made() -> None:
    read = read_speed(gigabytes=0.001)
    assert read.gb_s > 0
    assert "of 0.001 GB" in read.how
