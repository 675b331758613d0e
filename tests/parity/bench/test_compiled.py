"""The compiler of a TPU makes programs of lechat that move little more than they must.

It needs libtpu, the extra `aot`, and no TPU.
"""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lechat_jax.devices import topologies
from lechat_jax.devices.topologies import CARDS, CHIPS, chip, target_config
from lechat_jax.errors import BadInput
from parity.bench.command import main

needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="libtpu is not installed: lechat-jax[aot]"
)
SEVEN = ("--preset", "mistral-7b-v0.1", "--layers", "2")
KEYS = """platform topology preset work weights mesh batch context chunk bytes_moved bytes_least
    bytes_per_call ring_copies scratch_bytes device_bytes fits flops model_flops collectives
    lower_s compile_s roofline_s""".split()

Compiled = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Runs the command, as XLA optimises for a user; gives the rows of its report."""
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)

    def run(*flags: str) -> list[dict[str, Any]]:
        report = tmp_path / "report.json"
        assert main(["compiled", *flags, "--json", str(report)]) == 0
        return json.loads(report.read_text(encoding="utf-8"))["rows"]

    return run


@needs_libtpu
@pytest.mark.timeout(900)  # a compiler beside other work
def test_decoding_reads_weights_and_ring_once_in_every_form(compiled: Compiled) -> None:
    rows = compiled(*SEVEN, "--work", "decode", "--weights", "bfloat16", "int8", "int4")
    for row in rows:
        assert set(KEYS) <= row.keys(), row["note"]
        assert row["bytes_moved"] < 1.1 * row["bytes_least"]
        assert row["bytes_per_call"] < 0.01 * row["bytes_least"]
        assert row["scratch_bytes"] < 1e8
        assert (row["ring_copies"], row["fits"], row["platform"]) == (0, True, "tpu")
    bfloat16, int8, int4 = (row["bytes_moved"] for row in rows)
    assert int8 < 0.55 * bfloat16
    assert int4 < 0.7 * int8


@needs_libtpu
@pytest.mark.timeout(900)  # a compiler beside other work
def test_the_scores_of_a_prompt_stay_on_the_chip(compiled: Compiled) -> None:
    (row,) = compiled(*SEVEN, "--work", "prefill")
    assert row["chunk"] == 512
    assert row["bytes_moved"] < 1.5 * row["bytes_least"]
    assert row["scratch_bytes"] < 1e8  # all scores of a layer would take 0.3 GB


@needs_libtpu
@pytest.mark.timeout(900)  # a compiler beside other work
def test_on_eight_chips_a_layer_reduces_twice_and_gathers_nothing(compiled: Compiled) -> None:
    (row,) = compiled(*SEVEN, "--work", "decode", "--topology", "v6e:2x4", "--mesh", "tp=8")
    assert row["device_bytes"] < 0.25e9
    assert "all-gather" not in row["collectives"]
    assert row["collectives"]["all-reduce"]["n"] >= 2 * 2


@needs_libtpu
@pytest.mark.timeout(900)  # a compiler beside other work
def test_a_training_step_compiles_with_splash_attention(compiled: Compiled) -> None:
    flags = ("--preset", "lechat-15m", "--layers", "2", "--work", "train")
    (row,) = compiled(*flags, "--batch", "8", "--context", "256")
    assert row["fits"], row["note"]
    assert row["program_bytes"] < 60e6


@needs_libtpu
@pytest.mark.timeout(900)  # a compiler beside other work
def test_the_scores_of_the_largest_image_stay_on_the_chip(compiled: Compiled) -> None:
    flags = ("--preset", "mistral-small-24b-2503", "--layers", "2", "--work", "vision")
    (row,) = compiled(*flags)
    assert row["fits"], row["note"]
    assert row["scratch_bytes"] < 0.8e9  # all scores of a layer would take 4.8 GB
    assert row["bytes_moved"] < 4.8e9
    assert row["model_flops"] == pytest.approx(2.3e12, rel=0.1)  # 12,288 patches


@needs_libtpu
@pytest.mark.timeout(900)  # a compiler beside other work
def test_what_does_not_fit_is_told(compiled: Compiled) -> None:
    flags = ("--preset", "mistral-7b-v0.1", "--layers", "3", "--work", "decode")
    (row,) = compiled(*flags, "--batch", "512", "--topology", "v5e:1x1")
    assert row.get("fits") is False or "exceeds available HBM" in row["note"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--topology", "v9:1x1"], "chips are v4, v5e, v5p, v6e, tpu7x"),
        (["--topology", "v6e:2 by 4"], "its number or grid, such as v6e:2x4"),
        (["--topology", "v6e:1x1", "--mesh", "eight"], "--mesh is, for example, fsdp=4,tp=2"),
        (["--topology", "v6e:1x1", "--preset", "mistral"], "mistral"),
        (["--work", "vision"], "mistral-7b-v0.1 has no vision tower"),
        (["--work", "vision", "--preset", "pixtral-12b-2409", "--mesh", "tp=8"], "one device"),
    ],
)
def test_what_nobody_can_compile_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], reason: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(BadInput, match=reason):
        main(["compiled", *flags])


def test_a_compiler_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match=r"pip install 'lechat-jax\[aot\]'"):
        chip("v6e:1x1")
    with pytest.raises(BadInput, match=r"pip install 'lechat-jax\[cuda12\]'"):
        chip("h100")


def test_every_card_is_described_to_xla() -> None:
    assert CARDS.keys() == {name for name, chip in CHIPS.items() if chip.platform == "gpu"}
    for name, card in CARDS.items():
        told = target_config(name)
        assert f"core_count: {card.cores} " in told
        assert told.count("{") == told.count("}")
