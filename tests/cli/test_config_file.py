"""A YAML file says what flags say, is checked as they are, and can be given back."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lechat_jax.cli import flags
from lechat_jax.cli.config_file import to_yaml
from lechat_jax.errors import BadInput
from lechat_jax.train.options import TrainConfig

WORDS = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


def parse(*argv: object) -> TrainConfig:
    return flags.parse(TrainConfig, "train", "Trains.", [*map(str, argv)])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "# in either case\n"
        "data: chats.jsonl\nmax-tokens: 9\nlearning_rate: 1e-3\nsliding_window: full\n"
        "prompt:\n- To be\n- -1\ntensorboard: true\npacking: on\nsteps:\n"
    )
    return path


def test_a_file_stands_for_flags(recipe: Path) -> None:
    assert parse("--config", recipe) == TrainConfig(
        config=recipe,
        data="chats.jsonl",
        max_tokens=9,
        learning_rate=1e-3,
        sliding_window="full",
        prompt=("To be", "-1"),
        tensorboard=True,
        packing="on",
    )


def test_flags_win(recipe: Path) -> None:
    asked = parse("--max-tokens", 3, f"--config={recipe}", "--prompt", "Or not", "--packing=off")
    assert (asked.max_tokens, asked.prompt, asked.packing) == (3, ("Or not",), "off")
    assert asked.data == "chats.jsonl"


@settings(max_examples=30)
@given(
    data=st.none() | WORDS,
    sliding_window=st.none() | st.integers(1, 99) | st.just("full"),
    minutes=st.floats(1e-6, 1e6),
    steps=st.none() | st.integers(1, 10**6),
    packing=st.sampled_from(["auto", "on", "off"]),
    init_from=st.none() | WORDS.map(Path),
    tensorboard=st.booleans(),
    wandb=st.none() | WORDS,
    prompt=st.lists(WORDS, max_size=3).map(tuple),
)
def test_what_a_run_wrote_starts_such_a_run_again(
    tmp_path_factory: pytest.TempPathFactory, **asked: Any
) -> None:
    options = TrainConfig(out=Path("runs/x"), **asked)
    path = tmp_path_factory.mktemp("recipe") / "config.yaml"
    path.write_text(to_yaml(options.recipe("cpu")), encoding="utf-8")
    again = parse("--config", path)
    resolved = options.shape("cpu")._asdict()
    assert again == dataclasses.replace(options, config=path, out=None, **resolved)
    assert again.recipe("gpu") == options.recipe("cpu")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("step: 3", "has 'step', which is no option; did you mean 'steps'?"),
        ("learning-rat: 3", "has 'learning-rat', which is no option; did you mean 'learning-rate'"),
        ("zzz: 3", "has .zzz., which is no option$"),
        ("config: other.yaml", "has 'config', which is no option"),
        ("- steps", "is no list of options such as"),
        ("steps: [1", "is not YAML: while parsing"),
        ("[" * 9999, "is nested too deeply"),
        ("steps: 2024-02-31", "is not YAML: day is out of range"),
        ("block: 1", "--block must be at least 2, not 1"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    tmp_path: Path, text: str, sentence: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=sentence):
        parse("--config", path)


def test_a_value_of_the_wrong_type_ends_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: many")
    with pytest.raises(SystemExit) as stop:
        parse("--config", path)
    assert stop.value.code == 2
    assert "--steps" in capsys.readouterr().err


def test_a_missing_file_is_named() -> None:
    with pytest.raises(BadInput, match=r"cannot read nowhere\.yaml: No such file"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_file_is_the_same_in_any_encoding_with_any_ends(
    tmp_path: Path, encoding: str, end: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(end.join(["data: caf\u00e9.txt", "steps: 3", ""]).encode(encoding))
    assert parse("--config", path) == TrainConfig(config=path, data="caf\u00e9.txt", steps=3)


def test_a_file_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"data: caf\xe9.txt")
    with pytest.raises(BadInput, match=r"run\.yaml is not UTF-8 text: byte 9 .*iconv -f latin1"):
        parse("--config", path)
    with pytest.raises(BadInput, match="is a folder, where a file is needed"):
        parse("--config", tmp_path)
