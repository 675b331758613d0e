"""Weights of one byte with scales are read as PyTorch would multiply them out, or refused."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lechat_jax.checkpoint.weights import load_weights
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_map
from lechat_jax.errors import BadInput
from lechat_jax.formats.names import names
from lechat_jax.generate.generator import Generator
from lechat_jax.quantize.scheme import quantized
from parity.convert.command import main
from parity.convert.open_source import open_source
from tests.parity.checkpoints import random_weights, write_torch
from tests.support.models import logits_of

State = dict[str, torch.Tensor]


class Way(NamedTuple):
    """One of the ways in which bytes and scales are stored.

    Attributes:
        config: what `config.json` or `params.json` says of it.
        sizes: rows and columns that share a scale; 0 is all.
        scale: what stands for `weight` in the key of a scale.
        activation: and in that of an activation's.
        dtype: of the bytes.
        of_scales: type and shape of the scales on the disk.
    """

    config: dict[str, Any]
    sizes: tuple[int, int]
    scale: str
    activation: str = ""
    dtype: torch.dtype = torch.float8_e4m3fn
    of_scales: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale


def groups(**weights: Any) -> dict[str, Any]:
    wanted = {"num_bits": 8, "type": "float", "symmetric": True, **weights}
    method = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}
    method["config_groups"]["group_0"] = {"targets": ["Linear"], "weights": wanted}
    return {"quantization_config": method}


WAYS = {
    "ministral-3": Way(
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}},
        (0, 0),
        "weight_scale_inv",
        "activation_scale",
        of_scales=lambda scale: scale.reshape(()).bfloat16(),
    ),
    "blocks": Way(
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 24]}},
        (16, 24),
        "weight_scale_inv",
    ),
    "a tensor": Way(groups(strategy="tensor"), (0, 0), "weight_scale", "input_scale"),
    "rows": Way(groups(strategy="channel"), (1, 0), "weight_scale", "input_scale"),
    "int8": Way(groups(type="int"), (1, 0), "weight_scale", dtype=torch.int8),
    "int8 in groups": Way(
        groups(type="int", strategy="group", group_size=8), (1, 8), "weight_scale", dtype=torch.int8
    ),
    "mistral": Way(
        {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}},
        (0, 0),
        "qscale_weight",
        "qscale_act",
        of_scales=lambda scale: scale.reshape(()),
    ),
}


def spread(scale: torch.Tensor, sizes: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    rows, columns = (size or n for size, n in zip(sizes, shape, strict=True))
    return scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def write(folder: Path, config: MistralConfig, way: Way) -> State:
    """A checkpoint stored in that way; what it stands for by PyTorch's arithmetic, in float32.

    A vision tower stays in floats.
    """
    fmt = "mistral" if "quantization" in way.config else "hf"
    start = write_torch(folder.with_name("start"), config, random_weights(config))
    assert main([str(start), str(folder), "--to", fmt]) == 0
    (path,) = folder.glob("*.safetensors")
    text = folder / ("params.json" if fmt == "mistral" else "config.json")
    text.write_text(json.dumps(json.loads(text.read_text()) | way.config))
    stored, meant = {}, {}
    maps = [key for ours, key in names(config, fmt).items() if is_map(ours)]
    for key, weight in load_file(path).items():
        if key not in maps:
            stored[key], meant[key] = weight, weight.float()
            continue
        rows, columns = (size or n for size, n in zip(way.sizes, weight.shape, strict=True))
        grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
        scale = torch.rand(grid, generator=torch.Generator().manual_seed(len(stored))) + 0.5
        scale = way.of_scales(scale / (200 if way.dtype == torch.float8_e4m3fn else 70))
        wide = spread(scale.float().reshape(grid), way.sizes, weight.shape)
        coded = (weight.float() / wide).clamp(-127, 127)
        stored[key] = (coded.round() if way.dtype == torch.int8 else coded).to(way.dtype)
        stored[key.replace("weight", way.scale)] = scale
        if way.activation:
            stored[key.replace("weight", way.activation)] = torch.tensor(0.25)
        meant[key] = stored[key].float() * wide
    save_file(stored, path)
    return meant


def convert(src: Path, dst: Path, *flags: str) -> Path:
    assert main([str(src), str(dst), "--to", "lechat", *flags]) == 0
    return dst


@pytest.mark.parametrize("way", WAYS)
def test_the_numbers_are_those_of_pytorch_in_every_type(
    way: str, tiny: MistralConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = tmp_path / "src"
    meant = write(src, tiny, WAYS[way])
    out = convert(src, tmp_path / "bf16")
    _, direct = load_weights(src)
    for key, weight in load_weights(out)[1].items():
        np.testing.assert_array_equal(direct[key], weight, strict=True)
    said = capsys.readouterr().out
    kind = "int8 of compressed-tensors" if WAYS[way].dtype == torch.int8 else "FP8"
    assert f"{src} is {kind}: these are the numbers it stands for" in said
    assert ("activations are left out" in said) == bool(WAYS[way].activation)
    fmt = open_source(src, dequantize=True).format
    for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32)):
        if name == "float32":
            out = convert(src, tmp_path / name, "--dtype", name)
        back = tmp_path / f"{name}-{fmt}"
        assert main([str(out), str(back), "--to", fmt]) == 0
        (path,) = back.glob("*.safetensors")
        found = load_file(path)
        assert set(found) == set(meant)
        for key, weight in meant.items():
            assert found[key].dtype == dtype
            assert torch.equal(found[key], weight.to(dtype)), key


def test_fp8_becomes_int8_of_the_numbers_it_stands_for(tiny: MistralConfig, tmp_path: Path) -> None:
    meant = write(tmp_path / "src", tiny, WAYS["blocks"])
    _, found = load_weights(convert(tmp_path / "src", tmp_path / "int8", "--quantize", "int8"))
    for ours, key in names(tiny, "hf").items():
        weight = meant[key].numpy().reshape(found[ours].shape)
        if not ours.endswith("kernel"):
            np.testing.assert_array_equal(found[ours], weight.astype(ml_dtypes.bfloat16))
            continue
        expected = quantized(ours, weight)
        np.testing.assert_array_equal(found[ours], expected.kernel, strict=True)
        np.testing.assert_array_equal(found[f"{ours}.scale"], expected.scale, strict=True)


def test_an_fp8_model_computes_what_its_numbers_do(tiny: MistralConfig, tmp_path: Path) -> None:
    tiny = dataclasses.replace(tiny, n_layers=1)
    meant = write(tmp_path / "src", tiny, WAYS["ministral-3"])
    made = convert(tmp_path / "src", tmp_path / "out", "--dtype", "float32")
    shapes = load_weights(made)[1]
    weights = {
        ours: jnp.asarray(meant[key].numpy()).reshape(shapes[ours].shape)
        for ours, key in names(tiny, "hf").items()
    }
    tokens = jax.random.randint(jax.random.key(0), (1, 9), 0, 97)
    expected = jax.nn.log_softmax(logits_of(tiny, weights, tokens)[0, -1])
    (sample,) = Generator.from_checkpoint(made).generate([tokens[0].tolist()], max_tokens=1)
    assert sample.logprobs[0] == pytest.approx(float(expected[sample.ids[0]]), abs=1e-5)


def no_scale(state: State) -> None:
    del state["model.layers.1.mlp.up_proj.weight_scale_inv"]


def strange_scale(state: State) -> None:
    state["model.layers.1.mlp.up_proj.weight_scale_inv"] = torch.ones(3, 1)


def not_a_number(state: State) -> None:
    weight = state["model.layers.1.mlp.up_proj.weight"].view(torch.uint8)
    weight[2, 3] = 0x7F


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_scale, r"up_proj\.weight in .* is float8_e4m3fn and none of .*weight_scale_inv, "),
        (strange_scale, r"up_proj\.weight_scale_inv in .* has the shape \[3, 1\], which is nei"),
        (not_a_number, r"^model\.layers\.1\.mlp\.up_proj\.weight in .* is not finite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    spoil: Callable[[State], None], message: str, tiny: MistralConfig, tmp_path: Path
) -> None:
    write(tmp_path / "src", tiny, WAYS["ministral-3"])
    path = tmp_path / "src" / "model.safetensors"
    state = load_file(path)
    spoil(state)
    save_file(state, path)
    with pytest.raises(BadInput, match=message):
        convert(tmp_path / "src", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["src", "start"]


def test_the_check_takes_fp8_for_what_it_was_not_made_from(
    tiny: MistralConfig, tmp_path: Path
) -> None:
    write(tmp_path / "src", tiny, WAYS["mistral"])
    with pytest.raises(BadInput, match=r"src is FP8, which differs from what it was made from"):
        open_source(tmp_path / "src")
