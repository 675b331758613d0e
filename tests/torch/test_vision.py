"""The vision tower and projector in PyTorch, against their definition and transformers.

Two images of noise, neither square, in one call: on a square or constant one, a swap of rows and
columns, the order inside a merged square or a missing mask could not be seen.
"""

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

from lechat_jax.config import VisionConfig
from lechat_torch.attention import dense_attention
from lechat_torch.vision import (
    Projector,
    VisionTower,
    attend_within_images,
    grid_rotations,
    merge_patches,
    splice,
)

# No two sizes agree, and a base as small as this has every pair of lanes turn visibly.
MERGING = VisionConfig(
    dim=48,
    n_layers=3,
    n_heads=3,
    hidden_dim=56,
    patch_size=5,
    max_image_size=100,
    rope_theta=30.0,
    spatial_merge_size=2,
    projector_norm=True,
    projector_bias=False,
)
PIXTRAL_12B = dataclasses.replace(
    MERGING, spatial_merge_size=1, projector_norm=False, projector_bias=True
)
FORMS = {"merging": MERGING, "Pixtral 12B": PIXTRAL_12B}
VARIANTS = {
    **FORMS,
    "merging three by three": dataclasses.replace(MERGING, spatial_merge_size=3),
    "one head": dataclasses.replace(MERGING, n_heads=1),
    "another theta": dataclasses.replace(MERGING, rope_theta=1e4),
}
D, NORM_EPS = 40, 1e-3  # of the decoder; not the tower's epsilon
GRIDS = [(6, 12), (12, 6), (6, 6)]  # the first two are as long as each other

# Differences relative to the largest number.
EXACT = 1e-13  # in float64; measured 2e-15
FLOAT32 = 1e-5  # in float32; measured 9e-7
# A model of transformers in float64 still rounds to float32 what it normalises, all angles with
# their cosines and sines, and the softmax of its eager attention. Measured 4e-7, and 2e-15 with
# norms and angles that are not rounded, if its attention is sdpa.
ROUNDED = 2e-6


class Model(torch.nn.Module):
    """Both parts, under the names of their weights in a model."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision = VisionTower(config)
        self.projector = Projector(config, D, NORM_EPS)


def images(grids: list[tuple[int, int]] = GRIDS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p = MERGING.patch_size
    sizes = [(3, rows * p, columns * p) for rows, columns in grids]
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def random_model(config: VisionConfig, dtype: torch.dtype = torch.float64) -> Model:
    """Tower and projector whose attention is sharp and whose norms are uneven.

    As PyTorch draws them, a wrong rotation would hardly be seen.
    """
    generator = torch.Generator().manual_seed(0)
    model = Model(config).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                inputs = weight[0].numel() if weight.ndim > 1 else 1
                weight.normal_(0, inputs**-0.5, generator=generator)
            if name.endswith((".q.weight", ".k.weight")):
                weight *= 1.5
    return model.to(dtype)


def run(
    model: Model, pixels: list[Tensor], grids: list[tuple[int, int]] = GRIDS
) -> tuple[Tensor, Tensor]:
    """Features of the patches, and the embeddings made of them."""
    with torch.no_grad():
        patches = model.vision(pixels)
        return patches, model.projector(patches, grids)


def by_definition(config: VisionConfig, w: dict[str, Any], image: Tensor) -> tuple[Any, Any]:
    """Features and embeddings of one image, alone, by NumPy: angles, not complex numbers."""

    def normed(x: Any, name: str, eps: float = 1e-5) -> Any:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    p, n, h = config.patch_size, config.n_heads, config.head_dim
    rows, columns = image.shape[1] // p, image.shape[2] // p
    where = [(row, column) for row in range(rows) for column in range(columns)]
    cuts = [image.numpy()[:, r * p : (r + 1) * p, c * p : (c + 1) * p].ravel() for r, c in where]
    x = np.stack(cuts) @ w["vision.patch.weight"].reshape(config.dim, -1).T
    x = normed(x, "vision.norm")
    speeds = [config.rope_theta ** (-2 * i / h) for i in range(h // 2)]
    angles = np.array(
        [[r * f for f in speeds[::2]] + [c * f for f in speeds[1::2]] for r, c in where]
    )
    cos, sin = np.cos(angles), np.sin(angles)
    for i in range(config.n_layers):
        block = f"vision.blocks.{i}"
        y, gathered = normed(x, f"{block}.attn_norm"), []
        q, k, v = ((y @ w[f"{block}.attn.{part}.weight"].T).reshape(-1, n, h) for part in "qkv")
        for head in range(n):
            turned = []
            for lanes in (q[:, head], k[:, head]):
                a, b = lanes[:, : h // 2], lanes[:, h // 2 :]
                turned.append(np.hstack([a * cos - b * sin, a * sin + b * cos]))
            powers = np.exp(turned[0] @ turned[1].T / math.sqrt(h))
            gathered.append(powers / powers.sum(1, keepdims=True) @ v[:, head])
        x = x + np.hstack(gathered) @ w[f"{block}.attn.o.weight"].T
        y = normed(x, f"{block}.mlp_norm")
        gate, up = (y @ w[f"{block}.mlp.{part}.weight"].T for part in ("gate", "up"))
        x = x + gate / (1 + np.exp(-gate)) * up @ w[f"{block}.mlp.down.weight"].T
    tokens = normed(x, "projector.norm", NORM_EPS) if config.projector_norm else x
    if (m := config.spatial_merge_size) > 1:
        merged = []
        for row, column in [(r, c) for r in range(rows // m) for c in range(columns // m)]:
            square = [
                (row * m + dy) * columns + column * m + dx for dy in range(m) for dx in range(m)
            ]
            merged.append([tokens[i, lane] for lane in range(config.dim) for i in square])
        tokens = np.array(merged) @ w["projector.merge.weight"].T
    tokens = tokens @ w["projector.linear_1.weight"].T + w.get("projector.linear_1.bias", 0)
    tokens = tokens * (1 + np.vectorize(math.erf)(tokens / math.sqrt(2))) / 2
    return x, tokens @ w["projector.linear_2.weight"].T + w.get("projector.linear_2.bias", 0)


def difference(ours: Any, expected: Any) -> float:
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def numpy_weights(model: Model) -> dict[str, np.ndarray]:
    return {name: weight.numpy() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_features_and_embeddings_are_what_the_definitions_say(config: VisionConfig) -> None:
    model, pixels = random_model(config), images()
    expected = [by_definition(config, numpy_weights(model), image) for image in pixels]
    for ours, of_images in zip(run(model, pixels), zip(*expected, strict=True), strict=True):
        assert difference(ours, np.concatenate(of_images)) < EXACT
        assert 0.5 < ours.std() < 5


FAULTS: dict[str, dict[str, Any]] = {
    "another theta": {"rope_theta": 29.0},
    "a layer too few": {"n_layers": 2},
    "other heads": {"n_heads": 4},
    "no norm of the projector": {"projector_norm": False},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_model_that_differs_in_one_thing_is_seen(fault: dict[str, Any]) -> None:
    model, pixels = random_model(MERGING), images()
    wrong = random_model(dataclasses.replace(MERGING, **fault))
    wrong.load_state_dict(model.state_dict(), strict=False)
    assert difference(run(wrong, pixels)[1], run(model, pixels)[1]) > 1e3 * ROUNDED


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", FORMS.values(), ids=FORMS.keys())
def test_transformers_computes_the_same(config: VisionConfig, attention: str) -> None:
    model, pixels = random_model(config), images()
    tower, projector = in_transformers(model, config, attention)
    sizes = [tuple(image.shape[1:]) for image in pixels]
    largest = [max(lengths) for lengths in zip(*sizes, strict=True)]
    batch = torch.full((len(pixels), 3, *largest), 99.0, dtype=torch.float64)  # padding, not read
    for room, image in zip(batch, pixels, strict=True):
        room[:, : image.shape[1], : image.shape[2]] = image
    with torch.no_grad():
        patches = tower(batch, image_sizes=torch.tensor(sizes)).last_hidden_state[0]
        more = (sizes,) if config.spatial_merge_size > 1 else ()
        expected = patches, projector(patches, *more)
    for ours, theirs in zip(run(model, pixels), expected, strict=True):
        assert theirs.dtype == torch.float64
        assert difference(ours, theirs) < ROUNDED


def in_transformers(
    model: Model, config: VisionConfig, attention: str
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Both parts with the same weights; of Mistral Small 3.1 and later, or of Pixtral 12B."""
    vision = transformers.PixtralVisionConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        image_size=config.max_image_size,
        patch_size=config.patch_size,
        hidden_act="silu",  # not the default, but what is released
        rope_parameters={"rope_type": "axial", "rope_theta": config.rope_theta},
    )
    text = transformers.MistralConfig(hidden_size=D, rms_norm_eps=NORM_EPS)
    shared: dict[str, Any] = {"multimodal_projector_bias": config.projector_bias}
    if config.spatial_merge_size > 1:
        shared["spatial_merge_size"] = config.spatial_merge_size
        both = transformers.Mistral3Config(vision_config=vision, text_config=text, **shared)
        projector: torch.nn.Module = Mistral3MultiModalProjector(both)
    else:
        one_layer = {"vision_feature_layer": -1, **shared}
        both = transformers.LlavaConfig(vision_config=vision, text_config=text, **one_layer)
        projector = LlavaMultiModalProjector(both)
    tower = transformers.PixtralVisionModel(vision)
    tower.set_attn_implementation(attention)
    weights = {their_name(name): weight for name, weight in model.state_dict().items()}
    for part, prefix in ((tower, "vision."), (projector, "projector.")):
        chosen = {n: w for n, w in weights.items() if n.startswith(prefix)}
        part.double().load_state_dict({n.removeprefix(prefix): w for n, w in chosen.items()})
    return tower, projector


def their_name(name: str) -> str:
    for ours, theirs in (
        ("vision.patch.", "vision.patch_conv."),
        ("vision.norm.", "vision.ln_pre."),
        ("blocks.", "transformer.layers."),
        ("attn_norm.", "attention_norm."),
        ("mlp_norm.", "ffn_norm."),
        ("projector.merge.", "projector.patch_merger.merging_layer."),
        ("projector.linear_1.", "projector.linear_1."),
        ("projector.linear_2.", "projector.linear_2."),
    ):
        name = name.replace(ours, theirs)
    for part in "qkvo":
        name = name.replace(f".attn.{part}.", f".attention.{part}_proj.")
    for part in ("gate", "up", "down"):
        name = name.replace(f".mlp.{part}.", f".feed_forward.{part}_proj.")
    return name


def test_an_image_does_not_depend_on_the_others() -> None:
    model, pixels = random_model(MERGING), images()
    features = run(model, pixels)[0].split([rows * columns for rows, columns in GRIDS])
    for image, grid, expected in zip(pixels, GRIDS, features, strict=True):
        assert difference(run(model, [image], [grid])[0], expected) < EXACT
    others = [images(seed=1)[0], pixels[1], images(seed=1)[2]]
    changed = run(model, others)[0].split([rows * columns for rows, columns in GRIDS])
    assert torch.equal(changed[1], features[1])
    assert difference(changed[0], features[0]) > 0.1


def test_the_order_of_images_is_that_of_their_features() -> None:
    model, pixels = random_model(MERGING), images()
    forth, back = run(model, pixels), run(model, pixels[::-1], GRIDS[::-1])
    for ours, other, m in zip(forth, back, (1, 4), strict=True):
        lengths = [rows * columns // m for rows, columns in GRIDS]
        assert difference(torch.cat(other.split(lengths[::-1])[::-1]), ours) < EXACT


def test_attention_is_that_of_the_block_diagonal_mask_of_xformers() -> None:
    biases = pytest.importorskip("xformers.ops.fmha.attn_bias")
    generator = torch.Generator().manual_seed(0)
    shape, lengths = (3, 1, 12, 2, 8), [3, 1, 8]
    q, k, v = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = biases.BlockDiagonalMask.from_seqlens(lengths, device=torch.device("cpu"))
    bias = mask.materialize((12, 12), torch.float64)
    expected = dense_attention(q, k, v, bias)
    assert difference(attend_within_images(q, k, v, lengths), expected) < EXACT
    assert difference(attend_within_images(q, k, v, [12]), expected) > 0.1


def test_rows_and_columns_are_turned_by_frequencies_of_their_own() -> None:
    """Of 16 ** (-2 i / 16), which are 1, 0.71, 0.5, ...: the even ones by row."""
    turns = grid_rotations([(2, 3), (1, 2)], 16, 16.0, torch.ones(1, dtype=torch.float64))
    assert turns.shape == (1, 8, 1, 8)
    s = math.sqrt(0.5)
    by_row, by_column = np.array([1, 0.5, 0.25, 0.125]), np.array([s, s / 2, s / 4, s / 8])
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 0), (0, 1)]
    expected = [[*(row * by_row), *(column * by_column)] for row, column in places]
    np.testing.assert_allclose(turns.angle()[0, :, 0], expected, rtol=0, atol=1e-15)
    np.testing.assert_allclose(turns.abs(), 1, rtol=0, atol=1e-15)


def test_a_swap_of_rows_and_columns_would_be_seen() -> None:
    """An image on its side, with kernels on their side: the same patches in other places."""
    model, pixels = random_model(MERGING), images()
    on_its_side = copy.deepcopy(model)
    kernel = on_its_side.vision.patch.weight
    with torch.no_grad():
        kernel.copy_(kernel.mT.clone())
    (rows, columns), image = GRIDS[0], pixels[0]
    upright = run(model, [image], [(rows, columns)])[0]
    other = run(on_its_side, [image.mT], [(columns, rows)])[0]
    other = other.unflatten(0, (columns, rows)).transpose(0, 1).flatten(0, 1)
    assert difference(other, upright) > 1e-2


def test_patches_are_merged_channel_major() -> None:
    """Number 10 a + b is channel a of patch b, in a grid of 2 x 4 and in one of 2 x 2."""
    patches = torch.arange(8.0)[:, None] + torch.tensor([0.0, 10.0, 20.0])
    assert merge_patches(torch.cat([patches, patches[:4]]), [(2, 4), (2, 2)], 2).tolist() == [
        [0, 1, 4, 5, 10, 11, 14, 15, 20, 21, 24, 25],
        [2, 3, 6, 7, 12, 13, 16, 17, 22, 23, 26, 27],
        [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23],
    ]
    assert torch.equal(merge_patches(patches, [(4, 2)], 1), patches)


def test_the_merging_map_reads_what_unfold_makes() -> None:
    projector = random_model(MERGING).projector
    read: list[Tensor] = []
    projector.merge.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0]))
    patches = torch.randn(2 * 6, MERGING.dim, dtype=torch.float64)
    projector(patches, [(2, 6)])
    scale = projector.state_dict()["norm.weight"]
    patches = F.rms_norm(patches, (MERGING.dim,), scale, NORM_EPS)
    unfolded = F.unfold(patches.T.reshape(1, -1, 2, 6), kernel_size=2, stride=2)[0].T
    assert difference(read[0].detach(), unfolded.detach()) < EXACT


def test_weights_have_the_names_and_shapes_that_converters_rely_on() -> None:
    config = dataclasses.replace(MERGING, n_layers=1)
    shapes = {name: tuple(leaf.shape) for name, leaf in random_model(config).state_dict().items()}
    assert shapes == {
        "vision.patch.weight": (48, 3, 5, 5),
        "vision.norm.weight": (48,),
        "vision.blocks.0.attn_norm.weight": (48,),
        "vision.blocks.0.attn.q.weight": (48, 48),
        "vision.blocks.0.attn.k.weight": (48, 48),
        "vision.blocks.0.attn.v.weight": (48, 48),
        "vision.blocks.0.attn.o.weight": (48, 48),
        "vision.blocks.0.mlp_norm.weight": (48,),
        "vision.blocks.0.mlp.gate.weight": (56, 48),
        "vision.blocks.0.mlp.up.weight": (56, 48),
        "vision.blocks.0.mlp.down.weight": (48, 56),
        "projector.norm.weight": (48,),
        "projector.merge.weight": (48, 192),
        "projector.linear_1.weight": (40, 48),
        "projector.linear_2.weight": (40, 40),
    }
    of_12b = Projector(PIXTRAL_12B, D, NORM_EPS).state_dict()
    assert {name: tuple(leaf.shape) for name, leaf in of_12b.items()} == {
        "linear_1.weight": (40, 48),
        "linear_1.bias": (40,),
        "linear_2.weight": (40, 40),
        "linear_2.bias": (40,),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_computes_in_the_dtype_of_its_weights(dtype: torch.dtype) -> None:
    rounded = random_model(MERGING, dtype)
    exact, pixels = copy.deepcopy(rounded).double(), [image.to(dtype) for image in images()]
    dtypes: set[torch.dtype] = set()
    for part in rounded.modules():
        part.register_forward_hook(lambda _module, _inputs, output: dtypes.add(output.dtype))
    made, truth = run(rounded, pixels)[1], run(exact, pixels)[1]
    assert dtypes == {dtype}
    error = (made - truth).square().mean().sqrt() / truth.std()
    if dtype == torch.float32:
        assert 1e-8 < error < FLOAT32
    else:
        assert 1e-3 < error < 5e-2  # measured 2e-2


def test_positions_are_not_rounded_to_bfloat16() -> None:
    """Of 257 columns, the last would be the one before it."""
    turns = grid_rotations([(1, 258)], 8, 1e4, torch.ones(1, dtype=torch.bfloat16))
    assert turns.dtype == torch.complex64
    assert not torch.equal(turns[0, 256], turns[0, 257])


def test_features_take_the_places_of_image_tokens_in_order() -> None:
    x = torch.arange(12.0).reshape(1, 6, 2)
    tokens = torch.tensor([[10, 10, 12, 3, 10, 13]])
    features = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]], dtype=torch.float64)
    spliced = splice(x, tokens, features, image_token_id=10)
    assert spliced.tolist() == [[[-1, -2], [-3, -4], [4, 5], [6, 7], [-5, -6], [10, 11]]]
    assert spliced.dtype == x.dtype
    assert torch.equal(x, torch.arange(12.0).reshape(1, 6, 2))
    nothing = splice(x, torch.zeros_like(tokens), features[:0], image_token_id=10)
    assert torch.equal(nothing, x)


@pytest.mark.parametrize("n_features", [0, 1, 3])
def test_features_must_be_as_many_as_image_tokens(n_features: int) -> None:
    x, tokens = torch.zeros(1, 3, 2), torch.tensor([[10, 3, 10]])
    with pytest.raises(ValueError, match=f"2 image tokens, but {n_features} features of images"):
        splice(x, tokens, torch.ones(n_features, 2), image_token_id=10)


@pytest.mark.parametrize(("height", "width"), [(29, 10), (10, 29), (4, 10)])
def test_an_image_that_is_not_of_whole_patches_is_refused(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"{height} x {width} pixels are no patches of 5"):
        VisionTower(MERGING)([torch.zeros(3, height, width)])


@pytest.mark.parametrize("grids", [[(3, 4)], [(4, 3)], [(2, 4)], [(2, 4), (2, 4)]])
def test_grids_that_do_not_fit_are_refused(grids: list[tuple[int, int]]) -> None:
    with pytest.raises(RuntimeError):
        Projector(MERGING, D, NORM_EPS)(torch.zeros(12, MERGING.dim), grids)
