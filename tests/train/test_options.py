"""What can be asked of the main job: each flag explained, each bad value named, all of it kept."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lechat_jax.cli import flags as cli
from lechat_jax.config import PRESETS, preset
from lechat_jax.errors import BadInput
from lechat_jax.train.options import TrainConfig

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
FLAGS = {f"--{name.replace('_', '-')}": name for name in FIELDS}


def parse(*argv: str) -> TrainConfig:
    return cli.parse(TrainConfig, "train", "Trains.", argv)


@pytest.fixture
def help_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """All of `--help` in one line, without its frame."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", capsys.readouterr().out).split())


@pytest.fixture
def help_of(help_text: str) -> dict[str, str]:
    """What `--help` says after each flag."""
    starts = [re.search(rf" {flag}[ ,]", help_text) for flag in FLAGS]
    places = [start.start() for start in starts if start]
    assert len(places) == len(FLAGS)
    assert places == sorted(places)
    pairs = zip(places, [*places[1:], len(help_text)], strict=True)
    return dict(zip(FLAGS, (help_text[a:b] for a, b in pairs), strict=True))


# --- the help ---


def test_every_flag_says_what_it_does(help_of: dict[str, str]) -> None:
    for flag, text in help_of.items():
        sentence = re.search(r"[A-Z][a-z].*\.", text)
        assert sentence, f"{flag}: {text}"
        assert len(sentence[0].split()) >= 4, f"{flag}: {text}"


def test_every_flag_says_its_default(help_of: dict[str, str]) -> None:
    for flag, text in help_of.items():
        default = FIELDS[FLAGS[flag]].default
        if default is None and flag != "--resume":
            assert re.search("By default|instead of", text), f"{flag}: {text}"
        elif isinstance(default, (str, float, int)) and not isinstance(default, bool):
            assert f"default: {default}" in text, f"{flag}: {text}"


def test_every_preset_is_named(help_of: dict[str, str]) -> None:
    assert [name for name in PRESETS if name not in help_of["--preset"]] == []


@pytest.mark.parametrize(
    ("flag", "unit"),
    [
        ("--minutes", "in minutes"),
        ("--steps", "steps"),
        ("--max-epochs", "passes over"),
        ("--batch", "Rows"),
        ("--block", "Tokens"),
        ("--sliding-window", "in tokens"),
        ("--eval-every", "Steps"),
        ("--sample-every", "Steps"),
        ("--checkpoint-every", "Steps"),
        ("--max-tokens", "Tokens"),
    ],
)
def test_a_quantity_has_a_unit(help_of: dict[str, str], flag: str, unit: str) -> None:
    assert unit in help_of[flag]


# --- reading flags ---


def test_without_flags_the_default_model_is_trained_for_five_minutes() -> None:
    assert parse() == TrainConfig()
    assert (TrainConfig().usual_minutes, TrainConfig().model_name) == (5.0, "lechat-15m")
    assert TrainConfig().model() == preset("lechat-15m")


def test_flags_become_fields() -> None:
    argv = "--data x.txt --steps 3 --minutes 0.5 --dtype bfloat16 --out run --tensorboard"
    asked = parse(*argv.split(), "--sliding-window", "full", "--prompt", "To be", "Or not")
    assert asked == TrainConfig(
        data="x.txt",
        steps=3,
        minutes=0.5,
        dtype="bfloat16",
        out=Path("run"),
        tensorboard=True,
        sliding_window="full",
        prompt=("To be", "Or not"),
    )


# --- bad values ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        ("batch", -8),
        ("block", 1),
        ("accumulate", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("max_tokens", 0),
        ("eval_every", 0),
        ("sample_every", 0),
        ("checkpoint_every", -1),
        ("minutes", 0.0),
        ("minutes", math.inf),
        ("minutes", math.nan),
        ("max_epochs", -1.0),
        ("max_epochs", math.inf),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.5),
    ],
)
def test_a_bad_value_is_refused_before_anything_is_done(name: str, value: Any) -> None:
    with pytest.raises(BadInput) as error:
        TrainConfig(**{name: value})
    flag = f"--{name.replace('_', '-')}"
    sentence = re.escape(flag) + r" must be .+, not " + re.escape(str(value))
    assert re.fullmatch(sentence, str(error.value))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/x", "a\\b", "C:x", "x\0", "x\n", "nul", "x " * 99, "x."],
)
def test_a_name_is_one_folder_of_runs_and_no_path(name: str) -> None:
    assert TrainConfig(name="lechat-15m v1.2").name == "lechat-15m v1.2"
    with pytest.raises(
        BadInput, match=r"^--name '.*' .*; choose a plain name .* say --out FOLDER$"
    ):
        TrainConfig(name=name)


def test_on_the_command_line_a_bad_value_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: parse("--block", "1") and None)
    assert stop.value.code == 2
    assert capsys.readouterr() == ("", "error: --block must be at least 2, not 1\n")


# --- what is trained ---


def test_flags_change_the_preset() -> None:
    asked = TrainConfig(
        dim=40, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=8, hidden_dim=56, sliding_window=7
    )
    expected = dataclasses.replace(
        preset("lechat-15m"),
        dim=40,
        n_layers=3,
        n_heads=6,
        n_kv_heads=2,
        head_dim=8,
        hidden_dim=56,
        sliding_window=7,
    )
    assert asked.model() == expected


def test_full_attention_has_a_word() -> None:
    asked = TrainConfig(sliding_window="full")
    assert asked.model() == dataclasses.replace(preset("lechat-15m"), sliding_window=None)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (TrainConfig(preset="mistral"), "unknown preset 'mistral'"),
        (TrainConfig(n_heads=7), r"n_heads \(7\) must be divisible by n_kv_heads \(2\)"),
        (TrainConfig(head_dim=5), "head_dim must be even"),
        (TrainConfig(sliding_window=0), "sliding_window must be at least 1"),
        (TrainConfig(dim=0), "dim must be positive"),
    ],
)
def test_a_model_that_cannot_be_is_refused(asked: TrainConfig, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        asked.model()


@pytest.mark.parametrize(
    ("platform", "shape"),
    [
        ("cpu", (12, 128, "float32")),
        ("gpu", (256, 256, "bfloat16")),
        ("tpu", (256, 256, "bfloat16")),
    ],
)
def test_the_batch_suits_the_platform(platform: str, shape: tuple) -> None:
    assert TrainConfig().shape(platform) == shape
    assert TrainConfig(batch=2).shape(platform) == (2, *shape[1:])
    assert TrainConfig(batch=6, accumulate=3).shape(platform) == (6, *shape[1:])
    assert TrainConfig(block=16).shape(platform) == (shape[0], 16, shape[2])
    assert TrainConfig(dtype="bfloat16").shape(platform) == (*shape[:2], "bfloat16")


@pytest.mark.parametrize(
    "several",
    [
        {"mesh": "fsdp=8"},
        {"distributed": True},
        {"coordinator": "host:1", "num_processes": 8, "process_id": 0},
    ],
)
def test_eight_devices_divide_the_usual_batch(several: dict[str, Any]) -> None:
    assert TrainConfig(**several).shape("cpu").batch % 8 == 0


def test_a_batch_is_cut_into_equal_parts() -> None:
    with pytest.raises(BadInput, match="--accumulate must divide the 12 rows of a batch"):
        TrainConfig(accumulate=5).shape("cpu")


# --- weights to start from ---


def test_a_run_is_called_after_the_folder_that_it_starts_from() -> None:
    assert TrainConfig(preset="bench-284m").model_name == "bench-284m"
    assert TrainConfig(init_from=Path("models/../models/7b-lechat")).model_name == "7b-lechat"
    assert TrainConfig(init_from=Path(".")).model_name == Path.cwd().name


def test_flags_may_repeat_the_model_of_the_weights_but_not_change_it() -> None:
    model = dataclasses.replace(preset("lechat-15m"), dim=40, sliding_window=None)
    agreeing = TrainConfig(preset="lechat-15m", dim=40, n_layers=6, sliding_window="full")
    assert agreeing.contradictions_to(model) == []
    assert TrainConfig().contradictions_to(model) == []
    assert TrainConfig(preset="lechat-15m", dim=41).contradictions_to(model) == [
        *("--preset", "--dim"),
    ]
    changing = TrainConfig(dim=40, n_layers=2, sliding_window=7, learning_rate=2.0)
    assert changing.contradictions_to(model) == ["--n-layers", "--sliding-window"]
    assert TrainConfig(preset="mixtral-8x7b-v0.1").contradictions_to(model) == ["--preset"]
    assert TrainConfig(sliding_window="full").contradictions_to(preset("lechat-15m")) == [
        "--sliding-window"
    ]
    with pytest.raises(BadInput, match="unknown preset 'mistral'"):
        TrainConfig(preset="mistral").contradictions_to(model)


# --- keeping them ---

COUNTS = st.none() | st.integers(2, 10**6)
POSITIVE = st.floats(1e-6, 1e6)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PATHS = st.none() | st.sampled_from(["runs/a", "/tmp/b c", "."]).map(Path)


@given(
    data=st.none() | TEXTS,
    sliding_window=COUNTS | st.just("full"),
    n_heads=COUNTS,
    minutes=POSITIVE,
    steps=COUNTS,
    learning_rate=POSITIVE,
    dtype=st.sampled_from([None, "float32", "bfloat16"]),
    out=PATHS,
    resume=PATHS,
    init_from=PATHS,
    preset=st.none() | TEXTS,
    tensorboard=st.booleans(),
    prompt=st.lists(TEXTS, max_size=3).map(tuple),
    temperature=st.floats(0, 10),
)
def test_json_and_back_are_the_same_options(**asked: Any) -> None:
    options = TrainConfig(**asked)
    stored = json.loads(json.dumps(options.to_dict()))
    assert stored.keys() == FIELDS.keys()
    assert TrainConfig.from_dict(stored) == options


def test_what_a_run_stores_beside_its_options_is_left_aside() -> None:
    stored = TrainConfig(steps=5).to_dict() | {"corpus": "sotu", "corpus_bytes": 7}
    assert TrainConfig.from_dict(stored) == TrainConfig(steps=5)


# --- beside --resume ---


def test_a_resumed_run_can_be_asked_for_other_samples_and_told_where_things_are() -> None:
    free = TrainConfig(resume=Path("run"), prompt=("To be",), max_tokens=9, temperature=0.0)
    assert free.contradictions() == []
    asked = dataclasses.replace(free, steps=9, n_layers=2, out=Path("x"), learning_rate=2.0)
    assert asked.contradictions() == ["--n-layers", "--learning-rate", "--out"]
    asked = dataclasses.replace(free, preset="lechat-15m", init_from=Path("x"))
    assert asked.contradictions() == ["--preset"]
    moved = TrainConfig(resume=Path("run"), data="there.txt", init_from=Path("/there"))
    assert moved.contradictions() == []
    run = TrainConfig(data="here.txt", steps=3)
    assert run.with_changes_of(moved) == dataclasses.replace(
        run, data="there.txt", init_from=Path("/there")
    )


# --- adapters ---


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"lora_rank": 8}, "say --init-from FOLDER"),
        ({"init_from": Path("x"), "lora_alpha": 8.0}, "--lora-alpha is of adapters"),
        ({"init_from": Path("x"), "lora_targets": ("q",)}, "--lora-targets is of adapters"),
        (
            {"init_from": Path("x"), "lora_rank": 8, "lora_from": Path("y")},
            "--lora-from says rank, alpha and targets; leave out --lora-rank",
        ),
        ({"init_from": Path("x"), "lora_rank": 8, "optimizer": "muon"}, "leave out --optimizer"),
        ({"init_from": Path("x"), "quantize": "int8"}, "int8 weights cannot learn"),
        ({"weight_decay": -1.0}, "--weight-decay must be 0 or more"),
    ],
)
def test_flags_about_adapters_must_agree(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        TrainConfig(**flags)


def test_the_usual_optimizer_follows_from_what_learns() -> None:
    asked = {"init_from": Path("x"), "lora_rank": 8}
    found = [TrainConfig(), TrainConfig(init_from=Path("x")), TrainConfig(**asked)]
    assert [options.usual_optimizer for options in found] == ["muon", "adamw", "adamw"]
    assert [options.start for options in found] == ["random", "trained", "adapters"]
    assert TrainConfig(init_from=Path("x"), optimizer="muon").usual_optimizer == "muon"
