"""GPTQ, AWQ and compressed-tensors: the numbers that their formats define, bit for bit.

The checkpoints are packed here number by number, from the definitions of the formats, and what
they stand for is worked out before anything is packed.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lechat_jax.checkpoint.weights import load_weights
from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.names import names, parts, shapes
from lechat_jax.generate.generator import Generator
from parity.architectures import SMALL, SMALL_MIXTURE
from parity.convert.command import main
from parity.convert.open_source import open_source
from tests.parity.checkpoints import random_weights, write_torch
from tests.support.models import logits_of

Arrays = dict[str, np.ndarray]


class Kernel(NamedTuple):
    """Whole numbers, scales and zeros of a kernel, [F, D] and [F, groups], and groups [D]."""

    q: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group: np.ndarray

    def numbers(self) -> np.ndarray:
        F, D = self.q.shape
        out = np.zeros((F, D), np.float32)
        for f in range(F):
            for d in range(D):
                g = self.group[d]
                difference = int(self.q[f, d]) - int(self.zero[f, g])
                out[f, d] = np.float32(difference) * np.float32(self.scale[f, g])
        return out


def words(numbers: np.ndarray, bits: int, places: list[int] | None = None) -> np.ndarray:
    """The numbers of a row in words of 32 bits: number `places[i]` of a word at bit i * bits."""
    n = 32 // bits
    places = places or list(range(n))
    rows, columns = numbers.shape
    out = np.zeros((rows, -(-columns // n)), np.uint32)
    for r in range(rows):
        for c in range(columns):
            word, place = divmod(c, n)
            out[r, word] |= np.uint32(int(numbers[r, c]) << (bits * places.index(place)))
    return out.view(np.int32)


def draw(F: int, D: int, bits: int, size: int, act_order: bool, symmetric: bool) -> Kernel:
    rng = np.random.default_rng(F * D + bits)
    top, groups = 2**bits, -(-D // size)
    group = np.arange(D) // size
    zero = np.full((F, groups), top // 2) if symmetric else rng.integers(0, top, (F, groups))
    return Kernel(
        rng.integers(0, top, (F, D)),
        (rng.random((F, groups)) * 2 / top + 0.01).astype(np.float16),
        zero,
        rng.permutation(group) if act_order else group,
    )


def gptq(kernel: Kernel, bits: int, offset: int = 1) -> Arrays:
    return {
        "qweight": words(kernel.q, bits).T.copy(),
        "qzeros": words((kernel.zero.T - offset) % 2**bits, bits),
        "scales": kernel.scale.T.copy(),
        "g_idx": kernel.group.astype(np.int32),
        "bias": np.zeros(len(kernel.q), np.float16),
    }


def awq(kernel: Kernel, bits: int) -> Arrays:
    places = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        "qweight": words(kernel.q.T, bits, places),
        "qzeros": words(kernel.zero.T, bits, places),
        "scales": kernel.scale.T.copy(),
    }


def compressed(kernel: Kernel, bits: int) -> Arrays:
    return {
        "weight_packed": words(kernel.q, bits),
        "weight_scale": kernel.scale,
        "weight_zero_point": words(kernel.zero.T, bits).T.copy(),
        "weight_g_idx": kernel.group.astype(np.int32),
        "weight_shape": np.array(kernel.q.shape),
    }


class Way(NamedTuple):
    """How a checkpoint is made, and in which form lechat keeps it, if it does."""

    said: dict[str, Any]
    pack: Callable[[Kernel], Arrays]
    bits: int = 4
    size: int = 8
    act_order: bool = False
    symmetric: bool = False
    form: dict[str, Any] | None = None


def of_gptq(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, **more}


def of_compressed(bits: int, size: int | None) -> dict[str, Any]:
    strategy = "channel" if size is None else "group"
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "group_size": size}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    method = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    return {**method, "config_groups": groups}


INT4: dict[str, Any] = {"format": "int4", "group": 8}
FLOAT = {"tables": "float"}
WAYS = {
    "gptq": Way(of_gptq(), lambda k: gptq(k, 4), form=INT4 | FLOAT),
    "gptq act-order": Way(
        of_gptq(desc_act=True),
        lambda k: gptq(k, 4),
        act_order=True,
        form=INT4 | {"ordered": True} | FLOAT,
    ),
    "gptq_v2": Way(
        of_gptq(checkpoint_format="gptq_v2"), lambda k: gptq(k, 4, 0), form=INT4 | FLOAT
    ),
    "gptq in larger groups": Way(
        of_gptq(group_size=16), lambda k: gptq(k, 4), size=16, form=INT4 | FLOAT
    ),
    "gptq a group an output": Way(
        of_gptq(group_size=-1), lambda k: gptq(k, 4), size=10**6, symmetric=True, form=INT4 | FLOAT
    ),
    "gptq of 8 bits": Way(
        of_gptq(bits=8, group_size=-1),
        lambda k: gptq(k, 8),
        bits=8,
        size=10**6,
        symmetric=True,
        form={"format": "int8", **FLOAT},
    ),
    "gptq of 8 bits in groups": Way(of_gptq(bits=8), lambda k: gptq(k, 8), bits=8),
    "awq": Way(
        {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "GEMM"},
        lambda k: awq(k, 4),
        form=INT4 | FLOAT,
    ),
    "compressed-tensors": Way(
        of_compressed(4, 8),
        lambda k: compressed(k, 4),
        act_order=True,
        form=INT4 | {"ordered": True} | FLOAT,
    ),
    "compressed-tensors of 8 bits": Way(
        of_compressed(8, None),
        lambda k: compressed(k, 8),
        bits=8,
        size=10**6,
        symmetric=True,
        form={"format": "int8", **FLOAT},
    ),
}


ONE_LAYER = dataclasses.replace(SMALL, n_layers=1)
MIXTURE = dataclasses.replace(SMALL_MIXTURE, n_layers=1, hidden_dim=56, n_experts=3)
MODELS = [(way, ONE_LAYER) for way in WAYS]
MODELS += [(way, MIXTURE) for way in ("gptq act-order", "awq", "gptq of 8 bits")]


def write(folder: Path, config: MistralConfig, way: Way) -> Arrays:
    """A checkpoint packed in that way, and the numbers that it stands for in float32.

    A vision tower stays in floats.
    """
    start = write_torch(folder.with_name("start"), config, random_weights(config, np.dtype("f2")))
    assert main([str(start), str(folder), "--to", "hf"]) == 0
    path, text = folder / "model.safetensors", folder / "config.json"
    text.write_text(json.dumps(json.loads(text.read_text()) | {"quantization_config": way.said}))
    stored, meant = {}, {}
    for key, weight in load_file(path).items():
        if not re.search(r"(_proj|\.w\d)\.weight$", key) or key.startswith("vision_tower."):
            stored[key], meant[key] = weight, weight.astype(np.float32)
            continue
        F, D = weight.shape
        size = min(way.size, D)
        kernel = draw(F, D, way.bits, size, way.act_order, way.symmetric)
        parts = way.pack(kernel)
        stored |= {key.replace("weight", part): array for part, array in parts.items()}
        meant[key] = kernel.numbers()
    save_file(stored, path)
    return meant


def convert(src: Path, dst: Path, *flags: str) -> Path:
    assert main([str(src), str(dst), "--to", "lechat", *flags]) == 0
    return dst


def in_our_shapes(config: MistralConfig, meant: Arrays) -> Arrays:
    theirs, of = names(config, "hf"), parts(config)
    return {
        name: np.stack([meant[theirs[part]] for part in of[name]]).reshape(shape)
        for name, shape in shapes(config, "lechat").items()
    }


def named(value: object) -> str:
    return value if isinstance(value, str) else "mixtral" if value is MIXTURE else "mistral"


@pytest.mark.parametrize(("way", "config"), MODELS, ids=named)
def test_a_packed_model_is_kept_as_it_is_and_stands_for_the_same_numbers(
    way: str, config: MistralConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src, form = tmp_path / "src", WAYS[way].form
    meant = in_our_shapes(config, write(src, config, WAYS[way]))
    made = convert(src, tmp_path / "made")
    assert ("and stays so" in capsys.readouterr().out) == bool(form)
    assert json.loads((made / "config.json").read_text()).get("quantization") == form
    _, direct = load_weights(src)
    for name, array in load_weights(made)[1].items():
        np.testing.assert_array_equal(direct[name], array, strict=True)
    plain = convert(src, tmp_path / "plain", "--dequantize", "--dtype", "float32")
    again = convert(made, tmp_path / "again", "--dtype", "float32") if form else plain
    for folder in (plain, again):
        source = open_source(folder)
        for name, array in meant.items():
            np.testing.assert_array_equal(source.read(name), array, strict=True)
    back = tmp_path / "back"
    assert main([str(src), str(back), "--to", "hf"]) == 0
    q = load_file(back / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    expected = meant["blocks.0.attn.q.kernel"].astype(np.float16).reshape(48, 40)
    np.testing.assert_array_equal(q, expected, strict=True)


@pytest.mark.parametrize(
    ("way", "config"),
    [
        ("gptq act-order", MIXTURE),
        ("gptq of 8 bits", ONE_LAYER),
        pytest.param("gptq act-order", ONE_LAYER, marks=pytest.mark.slow),
        pytest.param("gptq of 8 bits", MIXTURE, marks=pytest.mark.slow),
    ],
    ids=named,
)
def test_a_packed_model_computes_what_its_numbers_do(
    way: str, config: MistralConfig, tmp_path: Path
) -> None:
    meant = in_our_shapes(config, write(tmp_path / "src", config, WAYS[way]))
    made = convert(tmp_path / "src", tmp_path / "made", "--dtype", "float32")
    tokens = jax.random.randint(jax.random.key(0), (1, 9), 0, 97)
    expected = logits_of(config, {n: jnp.asarray(array) for n, array in meant.items()}, tokens)
    assert float(expected.std()) > 0.1
    found = logits_of(config, load_weights(made)[1], tokens)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    (sample,) = Generator.from_checkpoint(made).generate([tokens[0].tolist()], max_tokens=1)
    likeliest = jax.nn.log_softmax(expected[0, -1])[sample.ids[0]]
    assert sample.logprobs[0] == pytest.approx(float(likeliest), abs=1e-5)


UP = "model.layers.0.mlp.up_proj"


def strange_groups(arrays: Arrays) -> None:
    arrays[f"{UP}.g_idx"][:] = [0] * 7 + [1] * 9 + [2] * 8 + [3] * 8 + [4] * 8


def no_such_group(arrays: Arrays) -> None:
    arrays[f"{UP}.g_idx"][5] = 7


def lost_scales(arrays: Arrays) -> None:
    del arrays[f"{UP}.scales"]


def lost_zeros(arrays: Arrays) -> None:
    del arrays[f"{UP}.qzeros"]


def with_bias(arrays: Arrays) -> None:
    arrays[f"{UP}.bias"][3] = 1


def infinite_scale(arrays: Arrays) -> None:
    arrays[f"{UP}.scales"][0, 0] = np.inf


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (strange_groups, r"up_proj\.qweight in .* has groups that are not of 8 features each"),
        (no_such_group, r"up_proj\.g_idx in .* does not name one of 5 groups for each of 40"),
        (lost_scales, r"up_proj\.qweight in .* has no \.scales for 56 outputs and 5 groups"),
        (lost_zeros, r"up_proj\.qzeros is missing beside other parts of its kernel"),
        (with_bias, r"up_proj\.bias in .* is not zero, and lechat's maps have no bias"),
        (infinite_scale, r"up_proj\.qweight in .* is not finite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    spoil: Callable[[Arrays], None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "src", ONE_LAYER, WAYS["gptq"])
    path = tmp_path / "src" / "model.safetensors"
    arrays = load_file(path)
    spoil(arrays)
    save_file(arrays, path)
    with pytest.raises(BadInput, match=message):
        convert(tmp_path / "src", tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["src", "start"]


def test_asymmetric_int8_is_refused_with_what_to_say(tmp_path: Path) -> None:
    way = WAYS["gptq of 8 bits"]._replace(symmetric=False)
    write(tmp_path / "src", ONE_LAYER, way)
    with pytest.raises(BadInput, match=r"_proj\.qweight in .* is int8 with zeros.*--dequantize"):
        convert(tmp_path / "src", tmp_path / "out")
