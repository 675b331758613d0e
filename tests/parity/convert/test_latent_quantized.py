"""Quantised files of Mistral Small 4 and Large 3 are read as the numbers that stand in them.

Every number expected here is worked out by hand, or by a table of what 16 codes mean.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.formats.names import Format
from lechat_jax.formats.quantized.detect import take_quantization
from parity.convert.open_source import open_source
from tests.parity.checkpoints import convert, random_weights, write_torch
from tests.parity.convert.test_fp8 import groups
from tests.parity.convert.test_latent import LATENT

Arrays = dict[str, np.ndarray]
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
CONFIG = dataclasses.replace(LATENT, n_layers=2)
EXPERTS = "model.layers.1.mlp.experts"
OURS = "blocks.1.mlp.experts"


def start(folder: Path, fmt: Format, config: MistralConfig = CONFIG) -> tuple[Path, Arrays]:
    """A folder that is not quantised, and its tensors."""
    made = write_torch(folder / "start", config, random_weights(config))
    out = convert(made, folder / "src", fmt)
    (path,) = out.glob("*.safetensors")
    return out, load_file(path)


def write(folder: Path, tensors: Arrays, said: dict[str, Any]) -> Path:
    (path,) = folder.glob("*.safetensors")
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, path)
    (text,) = [path for path in folder.glob("*.json") if path.stem in ("config", "params")]
    text.write_text(json.dumps(json.loads(text.read_text()) | said))
    return folder


def read(folder: Path, name: str) -> np.ndarray:
    return open_source(folder, dequantize=True).read(name)


def whole_numbers(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers from -8 to 7, which FP8 has, and no two rows alike."""
    return (np.arange(np.prod(shape)).reshape(shape) * 7 % 16 - 8).astype(np.float32)


# --- FP8 ---


def test_hugging_faces_fp8_has_a_scale_for_each_expert_and_of_activations_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tensors = start(tmp_path, "hf")
    E, X, D = 5, 12, 40
    both, down = whole_numbers((E, 2 * X, D)), whole_numbers((E, D, X))
    scales = 2.0 ** np.arange(E)
    tensors |= {
        f"{EXPERTS}.gate_up_proj": both.astype(FP8),
        f"{EXPERTS}.gate_up_proj_scale_inv": scales.astype(BF16).reshape(E, 1, 1),
        f"{EXPERTS}.gate_up_proj_activation_scale": np.ones(E, BF16),
        f"{EXPERTS}.down_proj": down.astype(FP8),
        f"{EXPERTS}.down_proj_scale_inv": (3 * scales).astype(BF16).reshape(E, 1, 1),
        f"{EXPERTS}.down_proj_activation_scale": np.ones(E, BF16),
    }
    linear = "model.layers.1.self_attn.kv_a_proj_with_mqa"
    latent = whole_numbers((24, 40))
    tensors |= {
        f"{linear}.weight": latent.astype(FP8),
        f"{linear}.weight_scale_inv": np.array(0.25, BF16),
        f"{linear}.activation_scale": np.array(2, BF16),
    }
    write(folder, tensors, {"quantization_config": {"quant_method": "fp8"}})
    wide = scales[:, None, None].astype(np.float32)
    np.testing.assert_array_equal(read(folder, f"{OURS}.gate.kernel"), both[:, :X] * wide)
    np.testing.assert_array_equal(read(folder, f"{OURS}.up.kernel"), both[:, X:] * wide)
    np.testing.assert_array_equal(read(folder, f"{OURS}.down.kernel"), down * 3 * wide)
    np.testing.assert_array_equal(read(folder, "blocks.1.attn.kv_a.kernel"), latent / 4)
    convert(folder, tmp_path / "out", "mistral")
    assert "scales of activations are left out" in capsys.readouterr().out
    found = load_file(tmp_path / "out" / "consolidated.safetensors")
    assert found["layers.1.experts.3.w2.weight"].dtype == BF16
    np.testing.assert_array_equal(
        found["layers.1.experts.3.w2.weight"].astype(np.float32), down[3] * 24
    )


def test_halves_of_experts_that_were_joined_keep_scales_of_their_own(tmp_path: Path) -> None:
    """Those of blocks, and one for each half."""
    folder, tensors = start(tmp_path, "hf")
    both = whole_numbers((5, 24, 40))
    scale = np.arange(1, 5 * 4 * 3 + 1, dtype=np.float32).reshape(5, 4, 3)  # of 6 by 16
    tensors |= {
        f"{EXPERTS}.gate_up_proj": both.astype(FP8),
        f"{EXPERTS}.gate_up_proj_scale_inv": scale,
    }
    said = {"quant_method": "fp8", "weight_block_size": [6, 16]}
    write(folder, tensors, {"quantization_config": said})
    wide = scale.repeat(6, 1).repeat(16, 2)[..., :40]
    np.testing.assert_array_equal(read(folder, f"{OURS}.gate.kernel"), (both * wide)[:, :12])
    np.testing.assert_array_equal(read(folder, f"{OURS}.up.kernel"), (both * wide)[:, 12:])
    tensors[f"{EXPERTS}.gate_up_proj_scale_inv"] = scale[:, :2, :1]
    write(folder, tensors, {"quantization_config": {"quant_method": "fp8"}})
    np.testing.assert_array_equal(
        read(folder, f"{OURS}.up.kernel"), both[:, 12:] * scale[:, 1:2, :1]
    )


def test_mistrals_fp8_has_another_scale_for_the_gate_than_for_the_up(tmp_path: Path) -> None:
    folder, tensors = start(tmp_path, "mistral")
    w1, w3 = whole_numbers((12, 40)), whole_numbers((12, 40))[::-1]
    stem = "layers.1.experts.3"
    tensors |= {
        f"{stem}.w1.weight": w1.astype(FP8),
        f"{stem}.w1.qscale_weight": np.array(0.5, np.float32),
        f"{stem}.w1.qscale_act": np.array(9, np.float32),
        f"{stem}.w3.weight": w3.astype(FP8),
        f"{stem}.w3.qscale_weight": np.array(4, np.float32),
    }
    write(
        folder,
        tensors,
        {"quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}},
    )
    np.testing.assert_array_equal(read(folder, f"{OURS}.gate.kernel")[3], w1 / 2)
    np.testing.assert_array_equal(read(folder, f"{OURS}.up.kernel")[3], w3 * 4)
    hf = convert(folder, tmp_path / "hf", "hf")
    found = load_file(hf / "model.safetensors")[f"{EXPERTS}.gate_up_proj"]
    np.testing.assert_array_equal(found[3].astype(np.float32), np.concatenate([w1 / 2, w3 * 4]))


def test_large_3_has_blocks_of_128_in_mistrals_names(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, dim=200, expert_hidden_dim=130)
    folder, tensors = start(tmp_path, "mistral", config)
    w1 = whole_numbers((130, 200))
    tensors |= {
        "layers.1.experts.3.w1.weight": w1.astype(FP8),
        "layers.1.experts.3.w1.weight_scale": np.array([[1, 2], [3, 4]], np.float32),
    }
    said = groups(strategy="block", block_structure=[128, 128])
    said["quantization_config"] |= {"format": "float-quantized", "sparsity_config": {}}
    write(folder, tensors, said)
    expected = w1.copy()
    expected[:128, 128:] *= 2
    expected[128:, :128] *= 3
    expected[128:, 128:] *= 4
    np.testing.assert_array_equal(read(folder, f"{OURS}.gate.kernel")[3], expected)


@pytest.mark.parametrize("shape", [(4, 1, 1), (5, 3, 1)])
def test_scales_that_are_not_of_the_experts_are_refused(
    shape: tuple[int, ...], tmp_path: Path
) -> None:
    folder, tensors = start(tmp_path, "hf")
    tensors |= {
        f"{EXPERTS}.gate_up_proj": whole_numbers((5, 24, 40)).astype(FP8),
        f"{EXPERTS}.gate_up_proj_scale_inv": np.ones(shape, np.float32),
    }
    write(folder, tensors, {"quantization_config": {"quant_method": "fp8"}})
    message = r"gate_up_proj_scale_inv in .* has the shape .*, which is not of 5 experts"
    with pytest.raises(BadInput, match=message):
        open_source(folder, dequantize=True)


# --- NVFP4 ---

NVFP4 = groups(num_bits=4, strategy="tensor_group", group_size=16)
NVFP4["quantization_config"]["format"] = "nvfp4-pack-quantized"
CODES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
WIDE = dataclasses.replace(CONFIG, dim=32)


def packed(codes: np.ndarray) -> np.ndarray:
    """Two in a byte, the even column in the low half."""
    return (codes[:, 0::2] + 16 * codes[:, 1::2]).astype(np.uint8)


def nvfp4(folder: Path, fmt: Format = "mistral") -> tuple[Path, Arrays, np.ndarray]:
    """One expert's gate, of 12 rows and two groups of columns: files, tensors, its numbers."""
    out, tensors = start(folder, fmt, WIDE)
    codes = np.stack([np.roll(np.arange(32) % 16, row) for row in range(12)])
    scale = np.stack([np.arange(1.0, 13.0), np.full(12, 0.5)], axis=1)
    stem = "layers.1.experts.3.w1"
    if fmt == "hf":
        stem, both = f"{EXPERTS}.3.gate_proj", tensors.pop(f"{EXPERTS}.gate_up_proj")
        for e in range(5):
            tensors[f"{EXPERTS}.{e}.gate_proj.weight"] = both[e, :12]
            tensors[f"{EXPERTS}.{e}.up_proj.weight"] = both[e, 12:]
    del tensors[f"{stem}.weight"]
    tensors |= {
        f"{stem}.weight_packed": packed(codes),
        f"{stem}.weight_scale": scale.astype(FP8),
        f"{stem}.weight_global_scale": np.array([4], np.float32),
        f"{stem}.input_global_scale": np.array([99], np.float32),
    }
    meant = np.array(CODES)[codes].reshape(12, 2, 16) * scale[..., None] / 4
    return out, tensors, meant.reshape(12, 32)


@pytest.mark.parametrize("fmt", ["mistral", "hf"])
def test_nvfp4_is_read_as_codes_times_scale_over_the_global_one(
    fmt: Format, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tensors, meant = nvfp4(tmp_path, fmt)
    write(folder, tensors, NVFP4)
    np.testing.assert_array_equal(read(folder, f"{OURS}.gate.kernel")[3], meant)
    # By hand: in row 1 the codes begin with 15, 0, 1, 2, and the scales are 2 and 4.
    assert meant[1, :4].tolist() == [-3.0, 0.0, 0.25, 0.5]
    assert meant[1, 16:20].tolist() == [-0.75, 0.0, 0.0625, 0.125]
    convert(folder, tmp_path / "out", "lechat")
    said = capsys.readouterr().out
    assert "is NVFP4: these are the numbers it stands for" in said
    assert "scales of activations are left out" in said


def no_global_scale(tensors: Arrays, stem: str) -> None:
    del tensors[f"{stem}.weight_global_scale"]


def scales_of_32(tensors: Arrays, stem: str) -> None:
    tensors[f"{stem}.weight_scale"] = tensors[f"{stem}.weight_scale"][:, :1]


def scales_of_mxfp4(tensors: Arrays, stem: str) -> None:
    tensors[f"{stem}.weight_scale"] = tensors[f"{stem}.weight_scale"].view(np.uint8)


def words(tensors: Arrays, stem: str) -> None:
    tensors[f"{stem}.weight_packed"] = tensors[f"{stem}.weight_packed"].view(np.int32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_global_scale, r"has a weight_global_scale that is not there instead of float32 \[1\]"),
        (scales_of_32, r"has a weight_scale that is float8_e4m3fn \[12, 1\] instead of .* \[12, 2"),
        (scales_of_mxfp4, r"has a weight_scale that is uint8 \[12, 2\] instead of float8_e4m3fn"),
        (words, r"w1\.weight_packed in .* is int32 \[12, 4\], and not two codes in a byte"),
    ],
)
def test_nvfp4_that_does_not_fit_is_refused_by_name(
    spoil: Callable[[Arrays, str], None], message: str, tmp_path: Path
) -> None:
    folder, tensors, _ = nvfp4(tmp_path)
    spoil(tensors, "layers.1.experts.3.w1")
    write(folder, tensors, NVFP4)
    with pytest.raises(BadInput, match=message):
        open_source(folder, dequantize=True)


def test_nvfp4_of_other_groups_is_refused() -> None:
    said = groups(num_bits=4, strategy="group", group_size=32)
    said["quantization_config"]["format"] = "nvfp4-pack-quantized"
    with pytest.raises(BadInput, match="NVFP4 weights in groups of 32 by the strategy group"):
        take_quantization(said, "params.json")
