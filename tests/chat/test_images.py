"""Images in a chat: a saved conversation has them where the training reader looks for them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lechat_jax.chat.command import talk
from lechat_jax.data.dataset import open_dataset
from lechat_jax.errors import BadInput
from lechat_jax.generate.dialogue import Dialogue
from lechat_jax.tokenizer.images import Image, ImageSource, image_of, read_image
from tests.chat.test_chat import Script
from tests.support.images import TOWER, data_url, noise, png
from tests.support.tokenizers import tokenizer

V7 = tokenizer("v7m1")
TALKS = 20  # of which some are held out


def typed(monkeypatch: pytest.MonkeyPatch, dialogue: Dialogue, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert talk(dialogue, False) == 0


def trained_on(data: str) -> Any:
    return open_dataset(data, V7, 255, 1, 0, "auto", lambda done, of: None, vision=TOWER)


def test_saved_conversations_are_examples_of_what_was_said_and_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From another folder than the one whose files were named, and with each kind of source."""
    picture = noise(16, 8)
    picture.save(tmp_path / "cat.png")
    monkeypatch.chdir(tmp_path)
    talks: dict[tuple[int, ...], list[Image]] = {}
    for number in range(TALKS):
        text = Script(V7, "A cat", "Three")
        dialogue = Dialogue(text, V7, vision=TOWER)
        typed(monkeypatch, dialogue, "/image cat.png", f"What is {number:02}?")
        dialogue.say("", [data_url(png(noise(8, 24))), png(noise(8, 8)), noise(24, 8)])
        typed(monkeypatch, dialogue, f"/save talk-{number}.json")
        talks[tuple(text.ids)] = text.images
    monkeypatch.chdir(tmp_path.parent)
    dataset = trained_on(str(tmp_path / "talk-*.json"))
    assert dataset.chat
    rows = dataset.rows(0, 4)
    [length] = {len(ids) for ids in talks}
    for step, row in enumerate(rows.tokens[:, 0]):
        for slot, image in enumerate(talks[tuple(row[:length].tolist())]):
            shown = rows.images.images.patches[step, 0, slot]
            np.testing.assert_array_equal(shown[: len(image.patches)], image.patches)


def test_a_question_without_a_text_has_no_part_of_it(tmp_path: Path) -> None:
    dialogue = Dialogue(Script(V7, "A cat"), V7, vision=TOWER)
    dialogue.say("", [data_url(png(noise(8, 8)))])
    [asked, _] = dialogue.conversation.messages
    assert [part["type"] for part in asked["content"]] == ["image_url"]
    assert json.dumps(asked)


def test_pixels_alone_have_no_address() -> None:
    pixels = np.zeros((3, 8, 8), np.float32)
    with pytest.raises(BadInput, match="have no address; give its file"):
        _ = image_of(pixels, TOWER).address
    sources: list[ImageSource] = [noise(8, 8), png(noise(8, 8))]
    for source in sources:
        again = read_image(read_image(source, TOWER).address, TOWER)
        assert again.digest == read_image(source, TOWER).digest
