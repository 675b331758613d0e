"""The walk of one token that the model's README shows, run as it stands there."""

import re
from pathlib import Path

import lechat_jax.model

README = Path(lechat_jax.model.__file__).with_name("README.md")


def test_the_walk_by_hand_is_the_model() -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    assert "assert_allclose(logits, model(tokens)" in snippet  # so it fails if they differ
    exec(compile(snippet, str(README), "exec"), {})


def test_what_it_points_to_is_there() -> None:
    for file, name in re.findall(r"`(\w+)\.(\w+)[\w.]*`", README.read_text("utf-8")):
        path = README.with_name(f"{file}.py")
        if file not in ("q", "blocks", "Mistral"):  # weights, methods
            assert re.search(rf"^(class|def) {name}\b", path.read_text("utf-8"), re.M), (file, name)
