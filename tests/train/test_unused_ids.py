"""Ids that a text never has share one row of the tables, and nothing else changes.

Loss, gradient and training are those of whole tables whose unused rows start equal.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import EMBEDDING, HEAD
from lechat_jax.data.held_out import HeldOut
from lechat_jax.data.rows import Rows
from lechat_jax.data.tokens import load_tokens
from lechat_jax.devices.mesh import make_mesh, settled
from lechat_jax.errors import BadInput
from lechat_jax.eval.score import Validator
from lechat_jax.model.binding import Weights, weights_of
from lechat_jax.model.scoring import Forward, total_nats
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.train import command, options
from lechat_jax.train.options import TrainConfig
from lechat_jax.train.step import StepOptions, TrainState, gradient, state_of, train_steps
from lechat_jax.train.unused_ids import ROWS, UnusedIds, count_ids
from tests.support.models import random_model

V = 300
STREAM = np.random.default_rng(0).integers(0, V, 400) // 3 * 3  # a third of the ids
UNUSED = UnusedIds.of(count_ids(STREAM, V))
OPTIONS = StepOptions(dtype="float64", chunk=20)
SMALL = "--dim 16 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 8 --hidden-dim 32".split()
SHORT = "--steps 6 --batch 2 --block 16 --max-tokens 2 --eval-every 3 --checkpoint-every 3".split()


@pytest.fixture(scope="module")
def small(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=1, vocab_size=V)


def weights(config: MistralConfig) -> Weights:
    """Whole tables in float64, whose unused rows are equal."""
    drawn = UNUSED.widened(UNUSED.narrowed(weights_of(random_model(config))))
    return {name: leaf.astype(jnp.float64) for name, leaf in drawn.items()}


def batches(n: int) -> Rows:
    starts = np.random.default_rng(1).integers(len(STREAM) - 17, size=(n, 3, 1))
    return Rows(STREAM[starts + np.arange(17)].astype(np.int32))


def sharing(options: StepOptions) -> StepOptions:
    return dataclasses.replace(options, n_sharing=UNUSED.n_sharing)


def test_as_many_rows_as_devices_like_and_one_for_all_that_are_tied() -> None:
    assert len(UNUSED.id_of_row) == ROWS
    assert UNUSED.n_sharing == V - ROWS + 1
    assert UNUSED.has_own[STREAM].all()
    assert (UNUSED.row_of_id[~UNUSED.has_own] == ROWS - 1).all()
    np.testing.assert_array_equal(UNUSED.row_of_id[UNUSED.id_of_row], np.arange(ROWS))


@pytest.mark.parametrize("n_unused", [0, 1])
def test_where_nothing_can_be_tied_the_tables_stay_as_they_are(n_unused: int) -> None:
    unused = UnusedIds.of(count_ids(np.arange(V - n_unused), V))
    table = jnp.arange(V)[:, None]
    assert unused.n_sharing == 1
    assert unused.narrowed({EMBEDDING: table})[EMBEDDING] is table


def test_tables_come_back_whole_and_nothing_else_is_touched(small: MistralConfig) -> None:
    whole = weights_of(random_model(small))
    again = UNUSED.widened(UNUSED.narrowed(whole))
    for name, leaf in whole.items():
        own = UNUSED.has_own if name in (EMBEDDING, HEAD) else slice(None)
        np.testing.assert_array_equal(again[name][own], leaf[own])
    for name in (EMBEDDING, HEAD):
        assert again[name].shape == whole[name].shape
        assert (again[name][~UNUSED.has_own] == again[name][~UNUSED.has_own][0]).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("tied_embeddings", [False, True])
def test_loss_and_gradient_are_those_of_the_whole_tables(
    tied_embeddings: bool, small: MistralConfig
) -> None:
    """Of unused ids as inputs and targets too, as held-out text has them."""
    config = dataclasses.replace(small, tied_embeddings=tied_embeddings)
    whole = weights(config)
    tokens = np.random.default_rng(2).integers(V, size=(2, 17))
    assert 0 < UNUSED.has_own[tokens].mean() < 1
    batch = Rows(tokens.astype(np.int32))
    slope = jax.jit(gradient, static_argnums=(0, 1))
    loss, grads = slope(config, OPTIONS, whole, {}, batch)
    of_few = UNUSED.narrow_config(config), sharing(OPTIONS), UNUSED.narrowed(whole)
    narrow = slope(*of_few, {}, UNUSED.renumbered(batch))
    assert float(narrow[0]) == pytest.approx(float(loss), rel=1e-12)
    for name, leaf in narrow[1].items():
        expected = np.asarray(grads[name])
        if name in (EMBEDDING, HEAD):  # what moves the one row is what moves all of them
            expected = np.stack([expected[UNUSED.row_of_id == row].sum(0) for row in range(ROWS)])
        np.testing.assert_allclose(leaf, expected, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.usefixtures("x64")
def test_training_is_that_of_whole_tables_whose_unused_rows_start_equal(
    small: MistralConfig,
) -> None:
    """Equal rows have equal gradients, whose size Adam does not see, but for its epsilon."""
    whole = weights(small)

    def trained(
        config: MistralConfig, options: StepOptions, rows: Rows, first: Weights
    ) -> tuple[TrainState, jax.Array]:
        state = state_of(jax.tree.map(jnp.array, first), options)
        return train_steps(config, options, state, {}, rows, jnp.int32(6), jnp.int32(20))

    rows = batches(6)
    state, losses = trained(small, OPTIONS, rows, whole)
    of_few = UNUSED.narrow_config(small), sharing(OPTIONS)
    one, others = trained(*of_few, UNUSED.renumbered(rows), UNUSED.narrowed(whole))
    np.testing.assert_allclose(others, losses, rtol=1e-8)  # measured: 1.5e-9
    for name, leaf in UNUSED.widened(one.weights).items():
        np.testing.assert_allclose(leaf, state.weights[name], rtol=0, atol=1e-6, err_msg=name)
    moved = np.abs(state.weights[HEAD] - whole[HEAD])[~UNUSED.has_own]
    assert moved.mean() > 1e-3


@pytest.mark.usefixtures("x64")
def test_several_devices_compute_the_same(small: MistralConfig) -> None:
    config, narrow = UNUSED.narrow_config(small), UNUSED.narrowed(weights(small))
    tokens = UNUSED.renumbered(batches(4)).tokens[:, 0]
    inputs, targets, share = tokens[:, :-1], tokens[:, 1:], jnp.ones((4, 16))
    nats = jax.jit(total_nats, static_argnums=(0, 1))
    alone = nats(config, sharing(OPTIONS), narrow, inputs, targets, share)
    mesh = make_mesh("fsdp=4,tp=2")
    shared = dataclasses.replace(sharing(OPTIONS), mesh=mesh)
    together = nats(config, shared, settled(mesh, narrow), inputs, targets, share)
    assert float(together) == pytest.approx(float(alone), rel=1e-12)


# --- a run ---


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text("".join(f"The square of {i} is {i * i}.\n" for i in range(400)), "utf-8")
    return path


def stored(folder: Path) -> Weights:
    return SavedModel.open(folder).load("float32").weights


def test_a_run_stores_whole_tables_and_their_score_is_the_one_it_told(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert command.main(["--out", str(run), "--data", str(text), *SHORT, *SMALL]) == 0
    assert "of 32,000 ids" in capsys.readouterr().out
    tables = [np.asarray(stored(run)[name]) for name in (EMBEDDING, HEAD)]
    for table in tables:
        _, counts = np.unique(table, axis=0, return_counts=True)
        assert table.shape == (32_000, 16)
        assert counts.max() == 32_000 - ROWS + 1
    last = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    tokenizer = Tokenizer.mistral_v1()
    held_out = HeldOut.of_text(load_tokens(str(text), tokenizer), tokenizer)
    whole = Validator(SavedModel.open(run).config, Forward(), held_out)
    score = whole.full(stored(run), lambda done, of: None)
    assert last["val/bpb"] == pytest.approx(score.bits_per_byte, rel=1e-6)


def test_rows_are_separate_where_it_is_asked_or_the_text_is_large(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(data=str(text))
    assert config.usual_unused_ids == "shared"
    assert TrainConfig(data=str(text), unused_ids="separate").usual_unused_ids == "separate"
    assert TrainConfig(data="owner/dataset").usual_unused_ids == "separate"
    assert TrainConfig(data=str(text), init_from=Path("runs/a")).usual_unused_ids == "separate"
    monkeypatch.setattr(options, "LITTLE_TEXT", text.stat().st_size - 1)
    assert config.usual_unused_ids == "separate"


def test_trained_rows_are_not_made_equal() -> None:
    with pytest.raises(BadInput, match="have each its own"):
        TrainConfig(init_from=Path("runs/a"), unused_ids="shared")


def test_a_run_of_before_has_separate_rows() -> None:
    fields = TrainConfig().to_dict()
    del fields["unused_ids"]
    assert TrainConfig.from_dict(fields).unused_ids == "separate"
