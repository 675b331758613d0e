"""LoRA adapters in PEFT's format, which Python's `peft` and most servers read.

<folder>/
  adapter_config.json         target modules, rank and alpha
  adapter_model.safetensors   A [r, in] and B [out, r] of each, heads merged to one axis; and all
                              weights of the projector, if it learned (PEFT's modules_to_save)

The rows of queries and keys are in Hugging Face's order, which is lechat's own. Also read is the
`lora.safetensors` of mistral-finetune, in Mistral's names and order of rows.
"""

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array

from lechat_jax.checkpoint.weights import FLOATS
from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import (
    LORA_A,
    LORA_B,
    MAPS,
    SHARED,
    TABLE,
    in_layer,
    is_projector,
    kernel_of,
    layer_of,
    module_of,
    part_of,
    row_of,
)
from lechat_jax.errors import BadInput
from lechat_jax.files.safetensors import TensorFiles, write_tensors
from lechat_jax.files.safetensors_header import TensorInfo, parse_json
from lechat_jax.formats.names import rows
from lechat_jax.formats.names import shape as shape_in
from lechat_jax.model.adapters import Adapters, in_short

CONFIG, STEM = "adapter_config.json", "adapter_model"
PARTS = {"A": LORA_A, "B": LORA_B}
# The maps of a layer by their names in Hugging Face's model, and in Mistral's own.
OURS = {TABLE[name].hf: module_of(name) for name in MAPS.values()}
MISTRALS = {TABLE[name].mistral: module_of(name) for name in MAPS.values()}
# A map's name in the model that the adapter was trained on, which may be the text part of one that
# sees (transformers 5 and 4 name it in two ways), or lack its head.
KEY = re.compile(
    r"(?:base_model\.model\.)?((?:model\.)?(?:language_model\.)?(?:model\.)?"
    r"layers\.(\d+)\.([\w.]+))\.lora_([AB])(?:\.default)?\.weight"
)
PROJECTOR = "multi_modal_projector"
VISION = re.compile(rf"(?:base_model\.model\.)?(?:model\.)?((?:vision_tower|{PROJECTOR})\..+)")
MISTRALS_STEM = "lora"  # of mistral-finetune's file
MISTRALS_KEY = re.compile(r"layers\.(\d+)\.([\w.]+)\.lora_([AB])\.weight")
SCALING = 2.0  # of mistral-finetune and mistral-inference, where nothing is said
MERGE = "merge the adapter with peft (merge_and_unload) and convert the result"

# What changes nothing in the function of an adapter, or is read below.
UNDERSTOOD = set(
    "peft_type auto_mapping base_model_name_or_path revision task_type inference_mode peft_version "
    "r target_modules exclude_modules lora_alpha lora_dropout use_rslora rank_pattern "
    "alpha_pattern layers_to_transform layers_pattern init_lora_weights loftq_config eva_config "
    "corda_config lora_ga_config megatron_core qalora_group_size runtime_config "
    "ensure_weight_tying".split()
)
# Ways to begin that leave the base as it was. After others an adapter belongs to a changed one.
BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


def write_adapter(
    folder: Path,
    config: MistralConfig,
    adapters: Adapters,
    weights: Mapping[str, Array],
    base: str | None = None,
) -> None:
    """Writes a PEFT adapter folder atomically, new or in place of an old one.

    Args:
        folder: the adapter's folder.
        config: config of the model.
        adapters: target modules, rank and alpha.
        weights: A and B of each by lechat's name, and the projector's if it learned, float32.
        base: name or folder of the base model, for information.

    Raises:
        BadInput: the folder cannot be written.
    """
    arrays = {}
    for name, shape in adapters.shapes(config).items():
        array = np.asarray(weights[name])
        arrays[_key(name, config)] = array.reshape(_flat(name, shape, config))
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "new").mkdir(parents=True)
        text = json.dumps(_fields(adapters, config, base), indent=2) + "\n"
        (partial / "new" / CONFIG).write_text(text, encoding="utf-8")
        write_tensors(
            partial / "new",
            STEM,
            [(key, array.dtype, array.shape) for key, array in arrays.items()],
            arrays.__getitem__,
            shard_bytes=None,
            metadata={"format": "pt"},
        )
        if folder.exists():
            folder.rename(partial / "old")
        os.rename(partial / "new", folder)
    except OSError as error:
        raise BadInput(f"cannot write {folder}: {error.filename}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_adapter(folder: Path, config: MistralConfig) -> tuple[Adapters, dict[str, np.ndarray]]:
    """Reads a PEFT adapter folder: its settings, and what was learned by lechat's name, float32.

    That is A and B of each, and the projector's weights if they are in `modules_to_save`. For a
    model without eyes what is of a tower or a projector is left out, and a note says so.

    Raises:
        BadInput: the adapter is not plain LoRA of this model's linear layers, as DoRA is not; or
            the files contradict each other, are damaged or missing.
    """
    path = folder / CONFIG
    if not path.is_file():
        if (folder / f"{MISTRALS_STEM}.safetensors").is_file():
            return _read_mistrals(folder, config)
        raise BadInput(
            f"{folder} holds no adapter: neither PEFT's {CONFIG} nor mistral-finetune's "
            f"{MISTRALS_STEM}.safetensors"
        )
    fields = parse_json(path.read_bytes(), path)
    _check(fields, path)
    if (folder / f"{STEM}.bin").is_file() and not (folder / f"{STEM}.safetensors").is_file():
        raise BadInput(f"{folder} has its adapter in a pickle; save it as {STEM}.safetensors")
    files = TensorFiles.open(folder, STEM)
    vision = {key: match[1] for key in files if (match := VISION.fullmatch(key))}
    if vision and not config.vision:
        said = f"only the text part is read; tensors of the adapter left out: {len(vision)}"
        print(f"{folder}: {said}", file=sys.stderr)
    found: dict[str, TensorInfo] = {}
    theirs: dict[str, str] = {}  # the name that each map has in the model it was trained on
    for key in (key for key in files if config.vision or key not in vision):
        name, module = _ours(vision.get(key, key), files[key].path, config)
        if name in found:
            raise BadInput(f"{folder} has {name} twice: {found[name].name} and {key}")
        found[name], theirs[module_of(name)] = files[key], module
    if not found:
        raise BadInput(f"{folder} has no adapter of a model's text part, so it changes nothing")
    adapters = _adapters(fields, path, _ranks(found), theirs, config)
    return adapters, _weights(folder, files, found, adapters, config)


def _read_mistrals(folder: Path, config: MistralConfig) -> tuple[Adapters, dict[str, np.ndarray]]:
    """Reads mistral-finetune's `lora.safetensors`, with its scale in params.json or the default.

    Raises:
        BadInput: as `read_adapter`.
    """
    files = TensorFiles.open(folder, MISTRALS_STEM)
    found: dict[str, TensorInfo] = {}
    for key in files:
        match = MISTRALS_KEY.fullmatch(key)
        if match is None or match[2] not in MISTRALS:
            raise BadInput(
                f"{files[key].path} has {key}, and only lora_A and lora_B of the maps "
                f"{', '.join(MISTRALS)} are read here; let mistral-finetune merge it "
                "(save_adapters: False) and convert the result"
            )
        name = in_layer(MISTRALS[match[2]], int(match[1])) + PARTS[match[3]]
        found[name] = files[key]
    params = folder / "params.json"
    said = parse_json(params.read_bytes(), params).get("lora") if params.is_file() else None
    scaling = said.get("scaling", SCALING) if isinstance(said, dict) else SCALING
    if isinstance(scaling, bool) or not isinstance(scaling, int | float):
        raise BadInput(f"{params} has a scaling of its lora that is no number: {scaling!r}")
    ranks = _ranks(found)
    if not ranks:
        raise BadInput(f"{folder} has no adapter in its {MISTRALS_STEM}.safetensors; get it again")
    rank = next(iter(ranks.values()))
    others = {name: r for name, r in ranks.items() if r != rank}
    alphas = {name: scaling * r for name, r in others.items()}
    adapters = Adapters(rank, scaling * rank, in_short(ranks, config), others, alphas)
    weights = _weights(folder, files, found, adapters, config)
    for name in weights:
        if part_of(name) == LORA_B and row_of(kernel_of(name)).is_rotated:
            N, H, rank = weights[name].shape
            pairs = weights[name].reshape(N, H // 2, 2, rank)
            weights[name] = pairs.swapaxes(1, 2).reshape(N, H, rank)
    return adapters, weights


def _ranks(found: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The LoRA rank of each linear layer, by name."""
    return {
        module_of(name): info.shape[0] for name, info in found.items() if part_of(name) == LORA_A
    }


def _weights(
    folder: Path,
    files: TensorFiles,
    found: Mapping[str, TensorInfo],
    adapters: Adapters,
    config: MistralConfig,
) -> dict[str, np.ndarray]:
    """A and B of each linear layer in lechat's shapes, float32.

    Raises:
        BadInput: one is missing, has another shape, or is not finite.
    """
    shapes = adapters.shapes(config)
    if odd := found.keys() ^ shapes.keys():
        name = min(odd)
        what = f"its modules_to_save, of which {name} is," if is_projector(name) else ""
        raise BadInput(f"{folder} lacks {what or f'the other half of {name}'}")
    weights = {}
    for name, shape in shapes.items():
        info = found[name]
        if info.shape != _flat(name, shape, config):
            raise BadInput(
                f"{info.name} in {info.path} has the shape {list(info.shape)}, which does not fit "
                f"the model; an adapter is for the model that it was trained on"
            )
        array = files.read(info.name).astype(np.float32)
        if info.dtype not in FLOATS or not np.isfinite(array).all():
            raise BadInput(f"{info.name} in {info.path} is not finite; get the adapter again")
        weights[name] = array.reshape(shape)
    return weights


def _flat(name: str, shape: tuple[int, ...], config: MistralConfig) -> tuple[int, ...]:
    """The shape in a file: of A and B [r, in] and [out, r], of the projector Hugging Face's."""
    if is_projector(name):
        return shape_in(config, "hf", rows(config)[name])
    if part_of(name) == LORA_A:
        return shape[0], math.prod(shape[1:])
    return math.prod(shape[:-1]), shape[-1]


def _key(name: str, config: MistralConfig) -> str:
    """PEFT's name of a weight that learned."""
    if is_projector(name):
        return f"base_model.model.model.{rows(config)[name].hf}"
    letter = "A" if part_of(name) == LORA_A else "B"
    return f"base_model.model.{_theirs(module_of(name), config)}.lora_{letter}.weight"


def _theirs(name: str, config: MistralConfig) -> str:
    """A linear layer's name in Hugging Face's model, as transformers 5 has it in memory.

    >>> from lechat_jax.config import preset
    >>> _theirs("blocks.3.attn.q", preset("mistral-7b-v0.3"))
    'model.layers.3.self_attn.q_proj'
    >>> _theirs("blocks.3.attn.q", preset("ministral-3-3b-2512"))
    'model.language_model.layers.3.self_attn.q_proj'
    """
    within = "language_model." if config.vision else ""
    return f"model.{within}layers.{layer_of(name)}.{row_of(f'{name}.kernel').hf}"


def _ours(key: str, path: Path, config: MistralConfig) -> tuple[str, str]:
    """Lechat's name of a PEFT tensor, and its layer's name in the base model.

    >>> from lechat_jax.config import preset
    >>> key = "base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"
    >>> _ours(key, Path("x"), preset("mistral-7b-v0.3"))
    ('blocks.3.mlp.up.lora.b', 'model.layers.3.mlp.up_proj')
    """
    whole = {row.hf: name for name, row in rows(config).items() if is_projector(name)}
    if key in whole:
        return whole[key], PROJECTOR
    match = KEY.fullmatch(key)
    if match is None or match[3] not in OURS:
        raise BadInput(
            f"{path} has {key}, and only lora_A and lora_B of the maps {', '.join(OURS)} of the "
            f"decoder and a whole {PROJECTOR} are read here; {MERGE}"
        )
    return in_layer(OURS[match[3]], int(match[2])) + PARTS[match[4]], match[1]


def _fields(adapters: Adapters, config: MistralConfig, base: str | None) -> dict[str, Any]:
    """The fields of `adapter_config.json`; without the tower, whose maps are called alike.

    PEFT takes a last word for every map that has it, also for those of experts which all tokens
    share, so beside these maps of feed-forwards are named in full.
    """
    shared = {TABLE[name].hf.split(".")[-1] for name in SHARED if config.n_shared_experts}

    def modules(target: str) -> list[str]:
        if target not in MAPS:
            return [_theirs(target, config)]
        word = TABLE[MAPS[target]].hf.split(".")[-1]
        if word not in shared:
            return [word]
        parts = [name for name in adapters.parts(config) if name.split(".")[-1] == target]
        return [_theirs(name, config) for name in parts]

    def number(alpha: float) -> int | float:  # PEFT's own are whole
        return int(alpha) if alpha == int(alpha) else alpha

    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapters.rank,
        "lora_alpha": number(adapters.alpha),
        "use_rslora": adapters.rslora,
        "target_modules": [name for target in adapters.targets for name in modules(target)],
        "rank_pattern": {_theirs(name, config): rank for name, rank in adapters.ranks.items()},
        "alpha_pattern": {_theirs(name, config): number(a) for name, a in adapters.alphas.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": [PROJECTOR] if adapters.projector else None,
    } | ({"exclude_modules": r".*\bvision_tower\b.*"} if config.vision else {})


def _check(fields: Mapping[str, Any], path: Path) -> None:
    """Raises `BadInput` for settings beyond plain LoRA, which change the adapter's function."""
    if fields.get("peft_type") != "LORA":
        raise BadInput(f"{path} is for {fields.get('peft_type')} adapters; only LORA is read here")
    empty = (None, False, "none", [], {})
    strange = {key: x for key, x in fields.items() if key not in UNDERSTOOD and x not in empty}
    if _saves_projector(fields):
        del strange["modules_to_save"]
    if (beginning := fields.get("init_lora_weights")) not in BEGINNINGS:
        strange["init_lora_weights"] = beginning
    if strange:
        said = ", ".join(f"{key} {json.dumps(value)}" for key, value in strange.items())
        raise BadInput(f"{path} asks for {said}, which is not done here; {MERGE}")


def _adapters(
    fields: Mapping[str, Any],
    path: Path,
    ranks: Mapping[str, int],
    theirs: Mapping[str, str],
    config: MistralConfig,
) -> Adapters:
    """Parses `adapter_config.json`, for the layers of these ranks in the file."""

    def said(pattern: str, name: str, usual: Any) -> Any:
        """As PEFT does it: by the first regular expression that matches the end of the name."""
        for key, value in (fields.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", theirs[name]):
                return value
        return usual

    try:
        rank, alpha = int(fields["r"]), float(fields["lora_alpha"])
        alphas = {name: float(said("alpha_pattern", name, alpha)) for name in ranks}
        expected = {name: int(said("rank_pattern", name, rank)) for name in ranks}
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise BadInput(f"{path} does not say r, lora_alpha and their patterns ({error})") from None
    if wrong := [name for name in ranks if ranks[name] != expected[name]]:
        raise BadInput(
            f"{path} gives {theirs[wrong[0]]} the rank {expected[wrong[0]]}, and the tensors have "
            f"{ranks[wrong[0]]}; get the adapter again"
        )
    return Adapters(
        rank,
        alpha,
        in_short(ranks, config),
        {name: r for name, r in ranks.items() if r != rank},
        {name: a for name, a in alphas.items() if a != alpha},
        bool(fields.get("use_rslora")),
        projector=_saves_projector(fields) and config.vision is not None,
    )


def _saves_projector(fields: Mapping[str, Any]) -> bool:
    """Whether the projector learned beside the adapters, and no other module."""
    return fields.get("modules_to_save") in ([PROJECTOR], [f"model.{PROJECTOR}"])
