"""Ways to quantise that are not read are refused by name, before a weight is looked at."""

from typing import Any

import pytest

from lechat_jax.errors import BadInput
from lechat_jax.formats.quantized.detect import take_quantization
from tests.parity.convert.test_fp8 import groups


def of(method: str | None, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **more}}


@pytest.mark.parametrize("fields", [{}, {"quantization_config": None}, {"quantization": {}}])
def test_a_config_that_says_nothing_is_that_of_plain_weights(fields: dict[str, Any]) -> None:
    assert take_quantization(fields, "config.json") is None
    assert not fields


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (of("bitsandbytes", load_in_4bit=True), "quantised by bitsandbytes, which is not read"),
        (of("gptq", bits=3, group_size=128), "weights of 3 bits in groups of 128, and 4 or 8"),
        (of("gptq", bits=4, checkpoint_format="marlin"), "the checkpoint_format marlin of GPTQ"),
        (of("awq", bits=4, version="gemv"), "has the version gemv of AWQ, and gemm is read"),
        (of("awq", bits=8), "has weights of 8 bits of AWQ, and 4 are read here"),
        (of(None), "quantised by None, which is not read here"),
        ({"quantization_config": "fp8"}, "is no JSON object"),
        (of("fp8", fmt="e5m2"), "weights of the type e5m2, and only e4m3 is read"),
        (of("fp8", weight_block_size=[128]), r"weight_block_size = \[128\], which is no height"),
        ({"quantization": {"qformat_weight": "int4"}}, "type int4, and only fp8_e4m3 is read"),
        (of("compressed-tensors"), "quantised in 0 ways by compressed-tensors"),
        (groups(num_bits=4, type="float"), "4-bit float weights of compressed-tensors, which"),
        (groups(type="int", symmetric=False), "8-bit int weights of compressed-tensors, which"),
        (
            of("compressed-tensors", sparsity_config={"format": "sparse-24-bitmask"}),
            "has a sparsity_config of compressed-tensors",
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=f"^config.json .*{message}"):
        take_quantization(fields, "config.json")
