"""Teaches a small model to see: drawings of shapes, a model to begin with, and a score.

    python -m parity.drawings shapes
    python -m lechat_jax.train --init-from shapes/model --data shapes/train.jsonl \
        --vision-tower trained --block 48 --batch 32 --learning-rate 100 --name eyes
    python -m parity.drawings shapes --score runs/eyes

The drawings that are scored are none of those that were learned from: each is of another place,
size and shade.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tyro
from flax import nnx
from PIL import Image, ImageDraw

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.cli import flags
from lechat_jax.cli.display import Display
from lechat_jax.config import preset
from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import check_new_folder
from lechat_jax.generate.generator import load
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import weights_of
from lechat_jax.model.mistral import Mistral
from lechat_jax.tokenizer.tokenizer import Tokenizer

PRESET = "lechat-sees-3m"
TEKKEN = "tekken_240911.json"  # of Pixtral 12B
SIDE = 64  # pixels
QUESTION = "What is drawn?"
COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 150, 60),
    "blue": (45, 80, 200),
    "yellow": (230, 200, 40),
    "purple": (130, 60, 170),
    "black": (25, 25, 25),
}
# Corners on a circle of radius 1, by angle in turns and distance.
CORNERS = {
    "triangle": [(i / 3, 1.0) for i in range(3)],
    "square": [(i / 4 + 1 / 8, 1.0) for i in range(4)],
}
SHAPES = ("circle", *CORNERS, "cross")


@dataclasses.dataclass(frozen=True)
class Drawings:
    """The flags of `python -m parity.drawings`.

    Attributes:
        folder: Folder of the drawings; to make, or with --score to look at again.
        score: Training run or weights: how many of the held-out drawings it names rightly.
        n_train: Drawings to learn from.
        n_held_out: Drawings that are scored.
        seed: Of the drawings, and of the model's weights.
    """

    folder: tyro.conf.Positional[Path]
    score: Path | None = None
    n_train: int = 12000
    n_held_out: int = 300
    seed: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; see `--help`."""
    options = flags.parse(Drawings, "parity.drawings", __doc__ or "", argv)
    if options.score:
        right, n = score(options.folder, options.score)
        print(f"{options.score} names colour and shape of {right} in {n} held-out drawings")
        return 0
    make(options)
    return 0


def make(options: Drawings) -> None:
    """Writes drawings, their questions and answers, and a model with random weights.

    Raises:
        BadInput: the folder exists, or cannot be written.
    """
    folder = options.folder
    if folder.exists():
        raise BadInput(f"{folder} exists; name another folder")
    check_new_folder(folder)
    draw = np.random.default_rng(options.seed)
    (folder / "images").mkdir(parents=True)
    for name, n in (("train", options.n_train), ("held-out", options.n_held_out)):
        lines = []
        for number in range(n):
            said, image = drawing(draw)
            path = f"images/{name}-{number:05}.png"
            image.save(folder / path)
            lines.append(json.dumps({"messages": conversation(path, said)}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = preset(PRESET)
    weights = weights_of(Mistral(config, rngs=nnx.Rngs(options.seed)))
    (folder / "tekken.json").write_text(few_ids(config.vocab_size), encoding="utf-8")
    save_weights(folder / "model", config, weights, folder / "tekken.json")
    print(f"{folder}: {options.n_train} drawings to learn from, {options.n_held_out} held out")


def few_ids(vocab_size: int) -> str:
    """The first ids of Pixtral's tokenizer, so that the head of the model takes little time."""
    fields = json.loads(Tokenizer.shipped(TEKKEN).path.read_text(encoding="utf-8"))
    n_special = fields["config"]["default_num_special_tokens"]
    fields["config"]["default_vocab_size"] = vocab_size
    return json.dumps(fields | {"vocab": fields["vocab"][: vocab_size - n_special]})


def conversation(path: str, said: str) -> list[dict[str, object]]:
    """A question about an image, and its answer."""
    parts = [{"type": "image_url", "image_url": path}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]


def drawing(draw: np.random.Generator) -> tuple[str, Image.Image]:
    """A shape of some colour, size, place and tilt on a light ground, and what it is."""
    colour, shape = draw.choice([*COLOURS]), draw.choice(SHAPES)
    ground = tuple(int(x) for x in draw.integers(215, 256, 3))
    paint = tuple(int(np.clip(x + draw.integers(-22, 23), 0, 255)) for x in COLOURS[colour])
    image = Image.new("RGB", (SIDE, SIDE), ground)
    pen = ImageDraw.Draw(image)
    radius = draw.uniform(14, 26)
    x, y = draw.uniform(radius, SIDE - radius, 2)
    for corners in polygons(str(shape), draw.uniform(-0.03, 0.03)):
        pen.polygon([(x + radius * a, y + radius * b) for a, b in corners], fill=paint)
    if shape == "circle":
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=paint)
    return f"a {colour} {shape}", image


def polygons(shape: str, turn: float) -> Iterator[list[tuple[float, float]]]:
    """The polygons of a shape around the origin, turned by a part of a whole turn."""
    if shape == "cross":
        for bar in (0.0, 0.25):
            yield [at(turn + bar + side, 1.0) for side in (-0.045, 0.045, 0.455, 0.545)]
    elif shape in CORNERS:
        yield [at(turn + angle, distance) for angle, distance in CORNERS[shape]]


def at(turn: float, distance: float) -> tuple[float, float]:
    """A point at an angle, in whole turns."""
    return distance * math.cos(2 * math.pi * turn), distance * math.sin(2 * math.pi * turn)


def score(folder: Path, model: Path) -> tuple[int, int]:
    """Of how many held-out drawings a model names colour and shape, and how many there are."""
    path = folder / "held-out.jsonl"
    if not path.is_file():
        raise BadInput(f"{path} is not there; make it with python -m parity.drawings {folder}")
    loaded = load(model)
    right, asked = 0, path.read_text(encoding="utf-8").splitlines()
    with Display(len(asked)) as display:
        for number, line in enumerate(asked, start=1):
            question, answer = json.loads(line)["messages"]
            chat = loaded.chat(max_tokens=16, sampling=Sampling(temperature=0))
            said = chat.say(QUESTION, [folder / question["content"][0]["image_url"]])
            right += said.strip() == answer["content"]
            display.work("drawings", number, len(asked), f" · {right} right")
    return right, len(asked)


if __name__ == "__main__":
    flags.run(main)
