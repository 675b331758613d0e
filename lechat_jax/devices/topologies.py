"""Devices to compile for that are not there: TPU topologies and NVIDIA GPUs, with published peaks.

The compilers of both run on any machine: libtpu's (the extra `aot`) and that of JAX's CUDA plugin
(`cuda12`, `cuda13`). What they give is the final program; running it needs the device.
"""

import importlib.util
import math
import re
from typing import Any, NamedTuple

from lechat_jax.devices.platform import Platform
from lechat_jax.errors import BadInput


class Chip(NamedTuple):
    """A device by its published peaks.

    Attributes:
        platform: what JAX calls it.
        memory: bytes of its own.
        bandwidth: of that memory, in bytes a second.
        flops: of dense bfloat16 matrix products, a second.
    """

    platform: Platform
    memory: float
    bandwidth: float
    flops: float


CHIPS = {
    # https://cloud.google.com/tpu/docs/v4, and the pages of v5e, v5p, v6e and tpu7x beside it. A
    # chip of tpu7x is two devices, of which this is one.
    "v4": Chip("tpu", 32e9, 1.23e12, 275e12),
    "v5e": Chip("tpu", 16e9, 0.82e12, 197e12),
    "v5p": Chip("tpu", 95e9, 2.77e12, 459e12),
    "v6e": Chip("tpu", 32e9, 1.64e12, 918e12),
    "tpu7x": Chip("tpu", 96e9, 3.7e12, 1153e12),
    # https://www.nvidia.com/en-us/data-center/ a100, h100, h200 and dgx-b200; all of them SXM.
    "a100": Chip("gpu", 80e9, 2.04e12, 312e12),
    "h100": Chip("gpu", 80e9, 3.35e12, 989e12),
    "h200": Chip("gpu", 141e9, 4.8e12, 989e12),
    "b200": Chip("gpu", 180e9, 7.7e12, 2250e12),
}


class Card(NamedTuple):
    """What XLA is told of a GPU beside its peaks, as in its own descriptions of such cards."""

    name: str
    cores: int
    shared_per_core: int
    l2: int
    clock_ghz: float
    capability: str


CARDS = {
    "a100": Card("NVIDIA A100-SXM4-80GB", 108, 167_936, 41_943_040, 1.41, "major: 8"),
    "h100": Card("NVIDIA H100 80GB HBM3", 132, 233_472, 52_428_800, 1.98, "major: 9"),
    "h200": Card("NVIDIA H200", 132, 233_472, 62_914_560, 1.98, "major: 9"),
    "b200": Card("NVIDIA B200", 148, 233_472, 132_644_864, 1.965, "major: 10"),
}

# A TPU's runtime otherwise looks for the machine's metadata, and lets one process use it.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def chip(asked: str) -> Chip:
    """The chip of a topology such as v6e:2x4 or h100:8.

    Raises:
        BadInput: it is none that is known, or its compiler is not installed.
    """
    name, _, shape = asked.partition(":")
    if name not in CHIPS or not re.fullmatch(r"(\d+(x\d+)*)?", shape):
        raise BadInput(
            f"--topology is a chip and its number or grid, such as v6e:2x4 or h100:8, not {asked}; "
            f"chips are {', '.join(CHIPS)}"
        )
    is_tpu = CHIPS[name].platform == "tpu"
    needed = ("libtpu",) if is_tpu else ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(map(importlib.util.find_spec, needed)):
        extra = "aot" if is_tpu else "cuda12"
        raise BadInput(
            f"the compiler for {asked} is not installed; get it with pip install "
            f"'lechat-jax[{extra}]'"
        )
    return CHIPS[name]


def devices(asked: str) -> list[Any]:
    """Descriptions of the devices of a topology, to compile for; see `chip` for what can be asked.

    In a process whose environment has `ENVIRONMENT`, before JAX looks for devices.

    Raises:
        BadInput: there is no such topology, or its compiler is not installed.
    """
    from jax.experimental import topologies

    name, _, shape = asked.partition(":")
    if chip(asked).platform == "gpu":
        n, config = math.prod(map(int, (shape or "1").split("x"))), target_config(name)
        grid = f"1x1x{n}"
        found = topologies.get_topology_desc("", "cuda", topology=grid, target_config=config)
        return list(found.devices)
    grid = shape or ("1x1x1" if name == "tpu7x" else "2x2x1" if name == "v4" else "1x1")
    try:
        found = topologies.get_topology_desc(topology_name=f"{name}:{grid}", platform="tpu")
    except (RuntimeError, ValueError) as error:  # libtpu's and JAX's
        told = str(error).strip().partition("\n")[0]
        raise BadInput(f"there is no TPU topology {name}:{grid}: {told[:200]}") from None
    return list(found.devices)


def target_config(name: str) -> str:
    """XLA's `GpuTargetConfigProto` of a card, as text."""
    card, peaks = CARDS[name], CHIPS[name]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49_152,
        "shared_memory_per_block_optin": card.shared_per_core - 1024,
        "shared_memory_per_core": card.shared_per_core,
        "threads_per_core_limit": 2048,
        "core_count": card.cores,
        "fpus_per_core": 64 if name == "a100" else 128,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65_535,
        "block_dim_limit_z": 65_535,
        "memory_bandwidth": int(peaks.bandwidth),
        "l2_cache_size": card.l2,
        "clock_rate_ghz": card.clock_ghz,
        "device_memory_size": int(peaks.memory),
        "registers_per_core_limit": 65_536,
        "registers_per_block_limit": 65_536,
    }
    told = " ".join(f"{key}: {value}" for key, value in fields.items())
    feature = "" if name == "a100" else " feature_extension: ACCELERATED_FEATURES"
    capability = f"cuda_compute_capability {{ {card.capability}{feature} }}"
    return (
        f"gpu_device_info {{ {told} {capability} }} "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} '
        f'device_description_str: "{card.name}"'
    )
