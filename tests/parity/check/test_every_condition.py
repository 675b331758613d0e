"""The check on models that are drawn, trained and badly conditioned: green, and it can still fail.

All are transformers' own, as its initialiser draws them or as they became, in files that it wrote.
Budgets are taken from rounding, so the programs are optimised as a user's are (an hour on a core):
`LECHAT_TEST_OPTIMIZED=1 pytest -m slow tests/parity/check/test_every_condition.py`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the models are PyTorch's")
pytest.importorskip("transformers", reason="and transformers'")
pytest.importorskip("xformers", reason="the reference takes its masks from xformers")

import torch
import transformers

from parity.check.command import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

# Ids, width, that of the feed-forward, layers, heads, kv heads, window, and whether it is tied.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int | None, bool]] = {
    "97 ids": (97, 40, 56, 2, 4, 2, 7, False),
    "2,000 ids": (2000, 128, 256, 3, 8, 2, 32, False),
    "24 layers": (512, 64, 128, 24, 8, 4, 16, False),
    "32,000 ids": (32000, 64, 128, 2, 4, 2, 32, False),
    "one kv head, tied": (1000, 96, 192, 8, 6, 1, None, True),
    # Heads as narrow as those of the smallest models that write stories.
    "narrow heads, tied": (512, 64, 172, 5, 8, 4, None, True),
}


def drawn(shape: str, deviation: float = 0.02) -> Any:
    """As transformers draws it: norms are one, all else has that deviation."""
    torch.manual_seed(0)
    V, D, F, L, N, K, W, is_tied = SHAPES[shape]
    config = transformers.MistralConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        sliding_window=W,
        tie_word_embeddings=is_tied,
        initializer_range=deviation,
    )
    return transformers.MistralForCausalLM(config)


def with_norms(size: float) -> Any:
    model = drawn("2,000 ids")
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data *= size
    return model


def with_large_channels() -> Any:
    """Three channels of the stream are a hundred times the others, as in many released models."""
    model, large = drawn("2,000 ids", 0.05), [3, 50, 77]
    model.model.embed_tokens.weight.data[:, large] *= 100
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[large] *= 100
        layer.mlp.down_proj.weight.data[large] *= 100
    return model


def trained(shape: str, rate: float, steps: int = 200) -> Any:
    """Some steps of AdamW on a text in which each id follows from the one before it."""
    model = drawn(shape)
    V = SHAPES[shape][0]
    draw = np.random.default_rng(0)
    follows = draw.integers(V, size=(V, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1)
    for _ in range(steps):
        rows = np.empty((8, 64), np.int64)
        rows[:, 0] = draw.integers(V, size=8)
        for t in range(1, 64):
            rows[:, t] = follows[rows[:, t - 1], draw.integers(4, size=8)]
        ids = torch.from_numpy(rows)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model


CONDITIONS: dict[str, Callable[[], Any]] = {
    "trained, narrow heads, tied": lambda: trained("narrow heads, tied", 2e-3),
    "trained, 24 layers": lambda: trained("24 layers", 1e-3),
    "trained at a rate too high": lambda: trained("2,000 ids", 3e-2),
    "norms of ten": lambda: with_norms(10.0),
    "norms of a tenth": lambda: with_norms(0.1),
    "large channels": with_large_channels,
}
DRAWN = {
    f"{shape}, deviation {deviation}": lambda shape=shape, deviation=deviation: drawn(
        shape, deviation
    )
    for shape in list(SHAPES)[:5]
    for deviation in (0.02, 0.05, 0.1, 0.15)
}


def checked(model: Any, folder: Path, *flags: str) -> dict[str, Any]:
    model.save_pretrained(folder / "model")
    report = folder / "report.json"
    code = main(["--checkpoint", str(folder / "model"), "--json", str(report), *flags])
    return json.loads(report.read_text()) | {"code": code}


@pytest.mark.parametrize("name", [*DRAWN, *CONDITIONS])
def test_a_right_model_is_green_however_it_is_conditioned(name: str, tmp_path: Path) -> None:
    found = checked((DRAWN | CONDITIONS)[name](), tmp_path)
    assert [stage for stage in found["stages"] if not stage["ok"]] == []
    assert found["code"] == 0


@pytest.mark.parametrize("name", CONDITIONS)
def test_every_fault_that_it_can_have_is_found_in_it(name: str, tmp_path: Path) -> None:
    found = checked(CONDITIONS[name](), tmp_path, "--faults")
    assert [fault for fault in found["faults"] if not fault["detected"]] == []
    assert (found["code"], len(found["faults"]) > 40) == (0, True)
