"""The check from the outside: what it compares, when it is content, and when it must not be."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch's")
pytest.importorskip("xformers", reason="the reference takes its masks from xformers")

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import Llama4Scaling, MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.source import Source
from parity.architectures import ARCHITECTURES
from parity.check import probes, run, whole_model
from parity.check import same_weights as against
from parity.check.command import main
from parity.check.oracles.lechat_jax import JaxOracle
from parity.check.oracles.lechat_torch import TorchOracle
from parity.check.probes import Inputs, Model, shortened
from parity.check.same_weights import same_weights
from parity.check.verdict import STAGES, Stage, Verdict
from parity.check.whole_model import Comparison
from parity.convert.open_source import open_source
from parity.random_models import random_weights

Output = pytest.CaptureFixture[str]


def saved(folder: Path, config: MistralConfig, weights: Mapping[str, np.ndarray]) -> str:
    """A folder in lechat's format with these weights in bfloat16."""
    arrays = {name: jnp.asarray(leaf, jnp.bfloat16) for name, leaf in weights.items()}
    save_weights(folder, config, arrays, None)
    return str(folder)


def verdict(capsys: Output, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """What the command found, its exit code among it."""
    report = tmp_path / "report.json"
    code = main([*flags, "--json", str(report)])
    capsys.readouterr()
    return json.loads(report.read_text()) | {"code": code}


@pytest.fixture
def one_pass_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and generation are not looked at."""
    monkeypatch.setattr(whole_model, "PROBES", (probes.forward,))


@pytest.fixture(scope="module")
def small(tiny: MistralConfig) -> MistralConfig:
    return dataclasses.replace(tiny, n_layers=2)


@pytest.fixture(scope="module")
def weights(small: MistralConfig) -> dict[str, np.ndarray]:
    return random_weights(small)


@pytest.fixture(scope="module")
def right(
    tmp_path_factory: pytest.TempPathFactory, small: MistralConfig, weights: dict[str, np.ndarray]
) -> str:
    return saved(tmp_path_factory.mktemp("right") / "model", small, weights)


@pytest.fixture
def against_wrong(
    small: MistralConfig,
    weights: dict[str, np.ndarray],
    right: str,
    tmp_path: Path,
    capsys: Output,
) -> Callable[..., dict[str, Any]]:
    """The verdict on the right weights in a folder `wrong`: other tensors, or another config."""

    def found(*flags: str, tensors: Mapping[str, np.ndarray] = {}, **config: Any) -> dict[str, Any]:
        wrong = saved(
            tmp_path / "wrong", dataclasses.replace(small, **config), {**weights, **tensors}
        )
        return verdict(capsys, tmp_path, "--checkpoint", right, "--against", wrong, *flags)

    return found


@pytest.mark.slow
def test_a_random_model_is_the_same_function_in_all_three(
    tiny: MistralConfig, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "mistral", dataclasses.replace(tiny, n_layers=1))
    found = verdict(capsys, tmp_path, "--dtypes", "float32", "--models", "mistral")
    assert (found["code"], found["equal"], found["first_divergence"]) == (0, True, None)
    assert {stage["stage"] for stage in found["stages"]} == set(STAGES)
    pairs = {(*stage["pair"], stage["dtype"]) for stage in found["stages"]}
    assert pairs == {
        ("jax", "torch", "float64"),
        ("transformers", "torch", "float64"),
        ("torch", "jax", "float32"),
        ("jax", "torch", "float32"),
        ("transformers", "torch", "float32"),
    }
    exact = [
        s for s in found["stages"] if s["pair"] == ["jax", "torch"] and s["dtype"] == "float64"
    ]
    assert all(stage["rel"] <= 1e-11 for stage in exact)
    assert any(stage["rel"] > 0 for stage in exact), "one function was compared with itself"


def test_one_function_compared_with_itself_proves_nothing() -> None:
    same = Stage("logits", None, "float64", ("jax", "torch"), 0.0, 1e-11)
    assert run.is_too_equal([same])
    assert not run.is_too_equal([same, dataclasses.replace(same, rel=1e-16)])
    assert not run.is_too_equal([dataclasses.replace(same, pair=("transformers", "torch"))])


def test_a_model_in_which_nothing_was_compared_spoils_the_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Output
) -> None:
    """Whatever was found of the others."""
    fine = (Stage("logits", None, "float64", ("jax", "torch"), 1e-16, 1e-15),)

    def whole(kind: str, *_: object) -> Verdict:
        return Verdict(kind, fine if kind == "mistral" else ())

    monkeypatch.setattr(run, "_whole", whole)
    assert verdict(capsys, tmp_path, "--models", "mistral")["code"] == 0
    assert verdict(capsys, tmp_path, "--models", "mistral", "mixtral")["code"] == 1


def test_the_first_verdict_comes_as_soon_as_a_pass_was_compared(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_model, "PROBES", (probes.forward, probes.prefill))
    main(["--models", "mistral", "--dtypes", "float64"])
    said = capsys.readouterr().out
    # The embedding, three layers of two stages, the norm and the logits of lechat_jax.
    assert re.search(r"first verdict, after \d+ s: one pass in float64 is equal in 9 comp", said)
    assert said.index("first verdict") < said.index("random models: mistral")


KINDS: dict[str, dict[str, Any]] = {
    "a window a layer": {"sliding_window": (7, None)},
    "no window, a kv head each": {"sliding_window": None, "n_kv_heads": 6, "n_layers": 1},
    "windows of two sizes": {"sliding_window": (7, 3)},
    **{
        kind: dataclasses.asdict(dataclasses.replace(config, n_layers=1))
        | {"yarn": config.yarn, "llama_4_scaling": config.llama_4_scaling}
        for kind, config in ARCHITECTURES.items()
        if config.yarn
    },
}


@pytest.mark.slow  # of the released ones `python -m parity.check` asks the same
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_is_the_same_function(small: MistralConfig, kind: str) -> None:
    config = dataclasses.replace(small, **KINDS[kind])
    model = Model(config, random_weights(config, seed=1))
    asked = Comparison(model, model, Inputs.of(config, seed=1))
    stages = list(asked.exact())
    assert [stage for stage in stages if not stage.ok] == []
    assert {stage.stage for stage in stages} == set(STAGES)
    has_peer = any(stage.pair[0] == "transformers" for stage in stages)
    assert has_peer == (not asked.without) == (kind != "windows of two sizes")


@pytest.mark.usefixtures("one_pass_only")
def test_each_kind_of_random_model_is_named(tmp_path: Path, capsys: Output) -> None:
    kinds = ["ministral", "devstral-2"]
    found = verdict(capsys, tmp_path, "--dtypes", "float64", "--models", *kinds)
    assert (found["code"], found["title"]) == (0, "random models: ministral, devstral-2")
    assert {stage["model"] for stage in found["stages"]} == set(kinds)


@pytest.mark.usefixtures("one_pass_only")
def test_a_checkpoint_is_checked_and_its_window_shortened(
    right: str, tmp_path: Path, capsys: Output
) -> None:
    found = verdict(capsys, tmp_path, "--checkpoint", right, "--window", "5", "--dtypes", "float64")
    assert found["code"] == 0
    assert found["notes"] == ["the sliding window of 7 was shortened to 5 for the check"]


@pytest.mark.usefixtures("one_pass_only")
def test_a_wrong_conversion_is_red_and_what_is_wrong_with_it_is_said(
    weights: dict[str, np.ndarray], against_wrong: Callable[..., dict[str, Any]]
) -> None:
    gate, up = "blocks.1.mlp.gate.kernel", "blocks.1.mlp.up.kernel"
    swapped = {gate: weights[up], up: weights[gate]}
    found = against_wrong("--dtypes", "float64", tensors=swapped)
    assert (found["code"], found["equal"]) == (1, False)
    first = found["first_divergence"]
    assert (first["stage"], first["layer"], first["dtype"]) == ("mlp", 1, "float64")
    assert found["hint"] == "lechat_jax computes as if gate and up are swapped"
    named = [stage["note"] for stage in found["stages"] if stage["dtype"] == "bfloat16"]
    assert not any(stage["ok"] for stage in found["stages"] if stage["note"] in named)
    assert [note.split(":")[0] for note in named] == [gate, up]
    assert found["notes"] == [f"other weights: {note}" for note in named]


@pytest.mark.usefixtures("one_pass_only")
def test_a_config_that_was_read_wrongly_is_recognised(
    right: str, tmp_path: Path, against_wrong: Callable[..., dict[str, Any]]
) -> None:
    found = against_wrong("--dtypes", "float64", sliding_window=8)
    assert found["code"] == 1
    assert found["first_divergence"]["stage"] == "attn"
    assert found["first_divergence"]["position"] == 7  # the first query that sees a key too many
    assert found["hint"] == "lechat_jax computes as if the window has one key more"
    assert f"sliding_window is 8 in {tmp_path / 'wrong'} and 7 in {right}" in found["notes"]


@pytest.mark.usefixtures("one_pass_only")
def test_a_flipped_bit_and_swapped_tensors_in_a_converted_folder_are_red(
    right: str, tmp_path: Path, capsys: Output
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in Path(right).iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-300] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    flags = ["--checkpoint", right, "--against", str(damaged), "--dtypes", "float64"]
    found = verdict(capsys, tmp_path, *flags)
    assert found["code"] == 1
    assert any("differs" in note and "SHA-256" in note for note in found["notes"])
    assert any("1 of" in stage["note"] for stage in found["stages"] if not stage["ok"])


@pytest.mark.usefixtures("one_pass_only")
def test_a_conversion_to_another_type_is_judged_by_what_rounding_makes_of_it(
    small: MistralConfig, tmp_path: Path, capsys: Output
) -> None:
    exact = {n: w + 1e-4 for n, w in random_weights(small).items()}  # no bfloat16 has these
    source = tmp_path / "exact"
    save_weights(source, small, {n: jnp.asarray(w, jnp.float32) for n, w in exact.items()}, None)
    rounded = saved(tmp_path / "rounded", small, exact)
    flags = ["--checkpoint", str(source), "--dtypes", "float64"]
    found = verdict(capsys, tmp_path, *flags, "--against", rounded)
    assert found["code"] == 0
    assert "rounded" in found["notes"][0]
    off = saved(tmp_path / "off", small, exact | {"norm.scale": 1.02 * exact["norm.scale"]})
    assert verdict(capsys, tmp_path, *flags, "--against", off)["code"] == 1


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.usefixtures("one_pass_only")
def test_equal_weights_are_said_to_be_equal_before_anything_is_computed(
    right: str, tmp_path: Path, capsys: Output, weights_only: bool
) -> None:
    flags = ["--checkpoint", right, "--against", right, "--dtypes", "float64"]
    code = main([*flags, *(["--weights-only"] if weights_only else [])])
    said = capsys.readouterr().out.splitlines()
    line = min(n for n, text in enumerate(said) if text.startswith("all 21 tensors are equal"))
    computed = [n for n, text in enumerate(said) if "one pass in float64 is equal" in text]
    assert code == 0
    assert computed == [] if weights_only else line < computed[0]


def test_weights_alone_are_compared_to_the_last_bit(
    weights: dict[str, np.ndarray], against_wrong: Callable[..., dict[str, Any]]
) -> None:
    up = "blocks.1.mlp.up.kernel"
    nearly = {up: weights[up].copy()}
    nearly[up][3, 5] *= 1 + 2**-7
    found = against_wrong("--weights-only", tensors=nearly)
    assert (found["code"], found["equal"]) == (1, False)
    assert [stage["note"] for stage in found["stages"] if not stage["ok"]] == [
        f"{up}: 1 of 2,240 differ, the first at [3, 5]"
    ]
    assert len(found["stages"]) == len(weights)


def test_equal_weights_of_another_config_are_another_model(
    right: str, tmp_path: Path, against_wrong: Callable[..., dict[str, Any]]
) -> None:
    found = against_wrong("--weights-only", norm_eps=1e-6)
    assert (found["code"], found["equal"]) == (1, False)
    assert f"norm_eps is 1e-06 in {tmp_path / 'wrong'} and 1e-05 in {right}" in found["notes"]


def one_weight(small: MistralConfig, folder: Path, value: float) -> Source:
    """The small model in float32 whose final norm begins with that number."""
    weights = {name: jnp.asarray(leaf) for name, leaf in random_weights(small).items()}
    weights["norm.scale"] = weights["norm.scale"].at[0].set(value)
    save_weights(folder, small, weights, None)
    return open_source(str(folder))


@pytest.mark.parametrize(
    ("ours", "theirs", "equal"),
    [
        (0.0, -0.0, False),
        (-0.0, -0.0, True),
        (1.0, 1.0 + 2**-23, False),
        (1e-45, 0.0, False),  # the least number that there is
    ],
)
def test_two_numbers_are_equal_if_their_bits_are(
    small: MistralConfig, tmp_path: Path, ours: float, theirs: float, equal: bool
) -> None:
    a, b = one_weight(small, tmp_path / "a", ours), one_weight(small, tmp_path / "b", theirs)
    different = [stage for stage in same_weights(a, b, lambda *_: None) if not stage.ok]
    assert [stage.note for stage in different] == (
        [] if equal else ["norm.scale: 1 of 40 differ, the first at [0]"]
    )


def test_the_same_nan_is_no_difference_and_another_is(small: MistralConfig, tmp_path: Path) -> None:
    """No weight should be one, but a copy of it is a copy."""
    a, b = (one_weight(small, tmp_path / name, 1.0) for name in "ab")

    def with_nan(source: Source, bits: int) -> Source:
        stored = dict(source.stored)
        scale = np.array(stored["norm.scale"].read())
        scale.view(np.uint32)[7] = bits
        stored["norm.scale"] = dataclasses.replace(stored["norm.scale"], read=lambda: scale)
        return dataclasses.replace(source, stored=stored)

    def equal(one: int, other: int) -> bool:
        pair = with_nan(a, one), with_nan(b, other)
        return all(stage.ok for stage in same_weights(*pair, lambda *_: None))

    assert equal(0x7FC00000, 0x7FC00000)
    assert not equal(0x7FC00000, 0x7FC00001)
    assert not equal(0x7FC00000, 0xFFC00000)


def test_a_difference_is_found_in_every_slab(
    small: MistralConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(against, "SLAB", 640)  # four rows of 40 numbers
    a, b = (one_weight(small, tmp_path / name, 1.0) for name in "ab")
    for row in (0, 3, 4, 96):
        embed = np.array(b.stored["embed.kernel"].read())
        embed[row, 1] += 1
        stored = dict(b.stored)
        stored["embed.kernel"] = dataclasses.replace(
            stored["embed.kernel"], read=lambda embed=embed: embed
        )
        other = dataclasses.replace(b, stored=stored)
        (wrong,) = (stage for stage in same_weights(a, other, lambda *_: None) if not stage.ok)
        assert wrong.note == f"embed.kernel: 1 of 3,880 differ, the first at [{row}, 1]"
        assert (wrong.stage, wrong.layer) == ("embed", None)


@pytest.mark.usefixtures("one_pass_only")
def test_models_that_differ_in_size_are_not_compared(
    small: MistralConfig, right: str, tmp_path: Path
) -> None:
    deeper = dataclasses.replace(small, n_layers=3)
    other = saved(tmp_path / "deeper", deeper, random_weights(deeper))
    with pytest.raises(BadInput, match=r"are of different models: only one has blocks\.2"):
        main(["--checkpoint", right, "--against", other])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--against", "x"], "--against needs the --checkpoint"),
        (["--faults", "--checkpoint", "x", "--against", "y"], "leave out --against"),
        (["--weights-only", "--checkpoint", "x"], "compares the weights of --against and"),
        (["--models", "mistral", "gpt"], "--models has gpt; there are mistral, ministral, "),
        (["--window", "1"], "--window must be at least 2, not 1"),
        (["--last-position", "9"], "--last-position must be at least --tokens"),
        (["--json", "/nowhere/x.json"], "there is no folder /nowhere to write x.json to"),
        (["--checkpoint", "/nowhere"], "/nowhere is not there"),
    ],
)
def test_bad_input_is_one_sentence(flags: list[str], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        main(flags)


@pytest.mark.usefixtures("one_pass_only")
def test_reports_of_every_kind_are_written(right: str, tmp_path: Path, capsys: Output) -> None:
    kinds = ["json", "junit", "markdown", "html"]
    files = [f"--{kind}={tmp_path / kind}" for kind in kinds]
    main(["--checkpoint", right, "--dtypes", "float64", *files])
    said = capsys.readouterr().out
    for kind in kinds:
        assert f"report: {tmp_path / kind}" in said
        assert (tmp_path / kind).stat().st_size > 100


def test_a_large_model_is_checked_a_layer_at_a_time(
    weights: dict[str, np.ndarray],
    right: str,
    tmp_path: Path,
    capsys: Output,
    against_wrong: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "WHOLE", 0)
    flags = ["--tokens", "24", "--window", "7"]
    found = verdict(capsys, tmp_path, "--checkpoint", right, *flags)
    assert found["code"] == 0
    assert {stage["dtype"] for stage in found["stages"]} == {"float32"}
    assert {stage["stage"] for stage in found["stages"]} == {*"embed attn mlp norm logits".split()}
    texts = {stage["note"] for stage in found["stages"] if stage["note"]}
    assert texts == {"positions 0 to 23", "positions 32744 to 32767"}

    q = "blocks.0.attn.q.kernel"
    found = against_wrong(*flags, tensors={q: np.roll(weights[q], 1, axis=0)})
    assert found["code"] == 1
    red = {(s["stage"], s["layer"]) for s in found["stages"] if not s["ok"]}
    assert red == {("attn", 0), ("mlp", 0)}, "the layers after it read what the right one made"


def test_latent_attention_behind_a_dense_layer_is_checked_a_layer_at_a_time(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ARCHITECTURES["mistral-small-4"]
    right = saved(tmp_path / "right", config, random_weights(config))
    monkeypatch.setattr(run, "WHOLE", 0)
    checkpoint = ["--checkpoint", right, "--tokens", "24", "--window", "9"]
    found = verdict(capsys, tmp_path, *checkpoint)
    assert found["code"] == 0
    assert {stage["pair"][0] for stage in found["stages"]} == {"jax", "torch", "transformers"}

    # With a window of 7 queries grow after other lengths than YaRN's, for which transformers has
    # no word.
    found = verdict(capsys, tmp_path, *checkpoint[:-1], "7")
    assert found["code"] == 0
    assert {stage["pair"][0] for stage in found["stages"]} == {"jax", "torch"}
    assert any("transformers is left out: yarn and" in note for note in found["notes"])


@pytest.mark.slow
def test_what_is_wrong_in_a_latent_model_is_found_in_its_layer(
    tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ARCHITECTURES["mistral-small-4"]
    weights = random_weights(config)
    up, shared = "blocks.1.attn.kv_b.kernel", "blocks.2.mlp.shared.up.kernel"
    wrong = weights | {up: np.roll(weights[up], 1, axis=1), shared: weights[shared][::-1]}
    right, other = saved(tmp_path / "r", config, weights), saved(tmp_path / "w", config, wrong)
    monkeypatch.setattr(run, "WHOLE", 0)
    flags = ["--against", other, "--tokens", "24", "--window", "9"]
    found = verdict(capsys, tmp_path, "--checkpoint", right, *flags)
    assert found["code"] == 1
    red = {(s["stage"], s["layer"]) for s in found["stages"] if not s["ok"]}
    assert red == {("attn", 1), ("mlp", 1), ("mlp", 2)}


@pytest.mark.parametrize("kind", ["mistral-small-3.1", "pixtral"])
def test_a_tower_is_checked_a_layer_at_a_time(
    kind: str, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ARCHITECTURES[kind]
    weights = random_weights(config)
    q, merge = "vision.blocks.1.attn.q.kernel", "projector.linear_1.kernel"
    wrong = weights | {q: np.roll(weights[q], 1, axis=0), merge: weights[merge][::-1]}
    right, other = saved(tmp_path / "r", config, weights), saved(tmp_path / "w", config, wrong)
    monkeypatch.setattr(run, "WHOLE", 0)
    checkpoint = ["--checkpoint", right, "--tokens", "24"]
    found = verdict(capsys, tmp_path, *checkpoint)
    assert found["code"] == 0
    towers = [(s["stage"], s["layer"]) for s in found["stages"] if s["pair"][0] == "transformers"]
    assert towers[:4] == [("patches", None), ("vision", 0), ("vision", 1), ("projector", None)]

    found = verdict(capsys, tmp_path, *checkpoint, "--against", other)
    assert found["code"] == 1
    red = {(s["stage"], s["layer"]) for s in found["stages"] if not s["ok"]}
    assert red == {("vision", 1), ("projector", None)}


def test_a_layer_on_its_own_is_that_layer_of_the_whole_model(
    small: MistralConfig, weights: dict[str, np.ndarray], right: str
) -> None:
    from parity.check.layer_by_layer import Streamed

    tokens = np.random.default_rng(3).integers(small.vocab_size, size=24)
    source = open_source(right)
    streamed = Streamed(source, source, tokens, (0,), window=7)
    whole = TorchOracle(small, weights, "float32").forward(tokens[None])
    stream = weights["embed.kernel"][tokens]
    for i in range(2):
        part = streamed.part_of_layer(i, stream)
        for oracle in (JaxOracle, TorchOracle):
            found = oracle(*part.ours, "float32").forward(streamed.ids)
            for inner, label in part.labels.items():
                np.testing.assert_allclose(found[inner], whole[label], rtol=0, atol=1e-5)
        stream = found["stream"][0].astype(np.float32)
    part = streamed.part_of_head(stream)
    found = JaxOracle(*part.ours, "float32").forward(streamed.ids)
    np.testing.assert_allclose(found["logits"], whole["logits"], rtol=0, atol=1e-5)


def test_windows_are_shortened_and_full_attention_is_not(tiny: MistralConfig) -> None:
    windows = dataclasses.replace(tiny, sliding_window=(4096, None, 5))
    others = dataclasses.replace(tiny, sliding_window=(4095, 4096, 5))
    assert shortened(others, 64, beside=windows).sliding_window == (63, 64, 5)
    assert shortened(windows, 64, beside=others).sliding_window == (65, None, 5)
    assert shortened(windows, 64).sliding_window == (64, None, 5)
    assert shortened(dataclasses.replace(tiny, sliding_window=None), 64).sliding_window is None


def test_the_steps_in_which_queries_grow_are_shortened(tiny: MistralConfig) -> None:
    def steps(config: MistralConfig) -> int:
        assert config.llama_4_scaling
        return config.llama_4_scaling.original_max_position_embeddings

    grows, later = (
        dataclasses.replace(tiny, llama_4_scaling=Llama4Scaling(0.1, n)) for n in (16384, 16385)
    )
    assert steps(shortened(grows, 64)) == 64
    assert steps(shortened(later, 64, beside=grows)) == 65
    assert steps(shortened(grows, 64, beside=tiny)) == 64
    text = Inputs.of(dataclasses.replace(shortened(grows, 9), sliding_window=None))
    assert text.tokens.shape[1] > 4 * 9
