"""The shapes of released models, and of lechat's own, in the words of `MistralConfig`.

Plain data, one model under another where they are alike but for some numbers. Only shapes:
a checkpoint's own config always decides about that checkpoint. Of models that see, the vision tower
is among them.
"""

from collections.abc import Mapping
from typing import Any

from lechat_jax.config.mistral import MistralConfig
from lechat_jax.errors import BadInput

Fields = Mapping[str, Any]

SEVEN: dict[str, Any] = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "head_dim": 128,
    "hidden_dim": 14336,
    "vocab_size": 32000,
    "norm_eps": 1e-5,
    "rope_theta": 1e4,
    "sliding_window": 4096,
}
FULL: dict[str, Any] = {"sliding_window": None, "rope_theta": 1e6}  # no window since v0.2
TWENTY_TWO = SEVEN | FULL | {"dim": 6144, "n_layers": 56, "n_heads": 48, "hidden_dim": 16384}
EXPERTS: dict[str, Any] = {"n_experts": 8, "n_experts_per_token": 2}
LARGE = SEVEN | FULL | {"dim": 12288, "n_layers": 88, "n_heads": 96, "hidden_dim": 28672}
NEMO = SEVEN | FULL | {"dim": 5120, "n_layers": 40, "vocab_size": 131072}  # 32 * 128 != 5120
SMALL = NEMO | {"hidden_dim": 32768, "rope_theta": 1e8}

# The vision tower of Mistral Small 3.1 and of what came after, and that of Pixtral 12B.
TOWER: dict[str, Any] = {
    "dim": 1024,
    "n_layers": 24,
    "n_heads": 16,
    "hidden_dim": 4096,
    "patch_size": 14,
    "max_image_size": 1540,
    "rope_theta": 1e4,
    "spatial_merge_size": 2,
    "projector_norm": True,
    "projector_bias": False,
}
SEES: dict[str, Any] = {"vision": TOWER}
PIXTRAL = TOWER | {
    "patch_size": 16,
    "max_image_size": 1024,
    "spatial_merge_size": 1,
    "projector_norm": False,
    "projector_bias": True,
}

# Ministral 3 was stretched from 16,384 tokens to 262,144, Devstral 2 from 4,096.
MINISTRAL_3 = SEVEN | {
    **SEES,
    "rope_theta": 1e6,
    "sliding_window": None,
    "vocab_size": 131072,
    "yarn": {
        "factor": 16,
        "original_max_position_embeddings": 16384,
        "beta": 32,
        "alpha": 1,
        "apply_scale": False,
    },
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16384},
}
MINISTRAL_3_3B = MINISTRAL_3 | {
    "dim": 3072,
    "n_layers": 26,
    "hidden_dim": 9216,
    "tied_embeddings": True,
}
EIGHT_K = {"original_max_position_embeddings": 8192}
DEVSTRAL_SMALL_2 = SMALL | {
    **SEES,
    "yarn": MINISTRAL_3["yarn"] | EIGHT_K | {"factor": 48},
    "llama_4_scaling": MINISTRAL_3["llama_4_scaling"] | EIGHT_K,
}
# Latent attention and experts: 320 numbers a token and layer in the cache of Small 4.
SMALL_4 = SEVEN | {
    **SEES,
    "n_layers": 36,
    "n_kv_heads": 32,
    "hidden_dim": 12288,  # of no layer
    "vocab_size": 131072,
    "norm_eps": 1e-6,
    "sliding_window": None,
    "n_experts": 128,
    "n_experts_per_token": 4,
    "expert_hidden_dim": 2048,
    "n_shared_experts": 1,
    "yarn": MINISTRAL_3["yarn"] | EIGHT_K | {"factor": 128},
    "llama_4_scaling": MINISTRAL_3["llama_4_scaling"] | EIGHT_K,
    "latent_attention": {
        "q_lora_rank": 1024,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
}
# The tower of Medium 3.5 and Large 3.
LARGE_TOWER = TOWER | {"n_layers": 48, "dim": 1664, "hidden_dim": 8192}
DEVSTRAL_2 = LARGE | {
    "vocab_size": 131072,
    "yarn": {
        "factor": 64,
        "original_max_position_embeddings": 4096,
        "beta": 4,
        "alpha": 1,
        "apply_scale": True,
    },
}

RELEASES: dict[str, Fields] = {
    # The default of the main job; five minutes on two cores. The window is half the
    # training block, so that what is trained is sliding-window attention.
    "lechat-15m": {
        "dim": 192,
        "n_layers": 6,
        "n_heads": 8,
        "n_kv_heads": 2,
        "head_dim": 24,
        "hidden_dim": 672,
        "vocab_size": 32000,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": 64,
    },
    # A small one that sees, for drawings: python -m parity.drawings.
    "lechat-sees-3m": {
        "dim": 160,
        "n_layers": 4,
        "n_heads": 8,
        "n_kv_heads": 2,
        "head_dim": 20,
        "hidden_dim": 480,
        "vocab_size": 4096,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": None,
        "vision": TOWER
        | {
            "dim": 96,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 256,
            "patch_size": 8,
            "max_image_size": 64,
        },
    },
    # For measuring: 1.00 GB of float32 weights are read for each token decoded.
    "bench-284m": {
        "dim": 1024,
        "n_layers": 16,
        "n_heads": 16,
        "n_kv_heads": 4,
        "head_dim": 64,
        "hidden_dim": 3584,
        "vocab_size": 32000,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": 256,
    },
    # For measuring training on a GPU: a billion parameters.
    "bench-1b": {
        "dim": 2048,
        "n_layers": 16,
        "n_heads": 16,
        "n_kv_heads": 4,
        "head_dim": 128,
        "hidden_dim": 7168,
        "vocab_size": 32000,
        "norm_eps": 1e-5,
        "rope_theta": 1e4,
        "sliding_window": 1024,
    },
    # For measuring latent attention and experts: an eighth of Small 4's widths and ranks, a quarter
    # of its heads, of half the width, a seventh of its layers; four of 128 experts as there.
    "bench-small-4": SMALL_4
    | {
        "dim": 512,
        "n_layers": 5,
        "n_heads": 8,
        "n_kv_heads": 8,
        "head_dim": 64,
        "hidden_dim": 1536,
        "vocab_size": 32000,
        "expert_hidden_dim": 256,
        "latent_attention": {
            "q_lora_rank": 128,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
        },
        "vision": None,
    },
    # https://huggingface.co/mistralai/Mistral-7B-v0.1/blob/main/config.json
    "mistral-7b-v0.1": SEVEN,
    # https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2/blob/main/config.json
    "mistral-7b-v0.2": SEVEN | FULL,
    # https://huggingface.co/mistralai/Mistral-7B-v0.3/blob/main/config.json
    "mistral-7b-v0.3": SEVEN | FULL | {"vocab_size": 32768},
    # https://huggingface.co/mistralai/Mixtral-8x7B-v0.1/blob/main/config.json
    "mixtral-8x7b-v0.1": SEVEN | FULL | EXPERTS,
    # https://huggingface.co/mistralai/Mixtral-8x22B-v0.1/blob/main/config.json
    "mixtral-8x22b-v0.1": TWENTY_TWO | EXPERTS,
    # https://huggingface.co/mistralai/Mixtral-8x22B-Instruct-v0.1/blob/main/config.json
    # The same with 768 control tokens; so is mistral-inference's 8x22B v0.3.
    "mixtral-8x22b-v0.3": TWENTY_TWO | EXPERTS | {"vocab_size": 32768},
    # https://huggingface.co/mistralai/Mathstral-7B-v0.1/blob/main/config.json: the only one
    # with a window beside a theta of 1e6.
    "mathstral-7b": SEVEN | {"rope_theta": 1e6, "vocab_size": 32768},
    # https://huggingface.co/mistralai/Mistral-Nemo-Base-2407/blob/main/config.json
    "mistral-nemo-12b-2407": NEMO,
    # https://huggingface.co/mistralai/Codestral-22B-v0.1
    "codestral-22b": TWENTY_TWO | {"vocab_size": 32768},
    # https://huggingface.co/mistralai/Mistral-Small-Instruct-2409/blob/main/config.json
    "mistral-small-22b-2409": TWENTY_TWO | {"vocab_size": 32768},
    # https://huggingface.co/mistralai/Mistral-Small-24B-Base-2501/blob/main/config.json
    "mistral-small-24b-2501": SMALL,
    # https://huggingface.co/mistralai/Mistral-Small-3.1-24B-Base-2503/blob/main/config.json, on
    # which Mistral Small 3.2, Magistral Small and Devstral Small were built.
    "mistral-small-24b-2503": SMALL | SEES | {"rope_theta": 1e9},
    # https://huggingface.co/mistralai/Pixtral-12B-2409/blob/main/params.json
    "pixtral-12b-2409": NEMO | {"vision": PIXTRAL, "rope_theta": 1e9},
    # https://huggingface.co/mistralai/Mistral-Large-Instruct-2407/blob/main/config.json
    "mistral-large-2407": LARGE | {"vocab_size": 32768},
    # https://huggingface.co/mistralai/Mistral-Large-Instruct-2411/blob/main/config.json
    "mistral-large-2411": LARGE | {"vocab_size": 32768},
    # https://huggingface.co/mistralai/Ministral-8B-Instruct-2410/blob/main/params.json; its
    # config.json has the window in every layer.
    "ministral-8b-2410": SEVEN
    | {
        "n_layers": 36,
        "hidden_dim": 12288,
        "vocab_size": 131072,
        "rope_theta": 1e8,
        "sliding_window": [None, 32768, 32768, 32768] * 9,
    },
    # https://huggingface.co/mistralai/Ministral-3-3B-Base-2512/blob/main/config.json
    "ministral-3-3b-2512": MINISTRAL_3_3B,
    # https://huggingface.co/mistralai/Ministral-3-8B-Base-2512/blob/main/config.json
    "ministral-3-8b-2512": MINISTRAL_3 | {"n_layers": 34},
    # https://huggingface.co/mistralai/Ministral-3-14B-Base-2512/blob/main/config.json
    "ministral-3-14b-2512": MINISTRAL_3
    | {"dim": 5120, "n_layers": 40, "hidden_dim": 16384, "rope_theta": 1e9},
    # https://huggingface.co/mistralai/Devstral-Small-2-24B-Instruct-2512/blob/main/config.json
    "devstral-small-2-24b-2512": DEVSTRAL_SMALL_2,
    # https://huggingface.co/mistralai/Devstral-2-123B-Instruct-2512/blob/main/config.json
    "devstral-2-123b-2512": DEVSTRAL_2,
    # https://huggingface.co/mistralai/Mistral-Medium-3.5-128B/blob/main/params.json
    "mistral-medium-3.5-128b": DEVSTRAL_2 | {"vision": LARGE_TOWER},
    # https://huggingface.co/mistralai/Mistral-Small-4-119B-2603/blob/main/params.json
    "mistral-small-4-119b-2603": SMALL_4,
    # https://huggingface.co/mistralai/Leanstral-2603/blob/main/params.json
    "leanstral-2603": SMALL_4,
    # https://huggingface.co/mistralai/Mistral-Large-3-675B-Instruct-2512/blob/main/params.json
    "mistral-large-3-675b-2512": SMALL_4
    | {
        "dim": 7168,
        "n_layers": 61,
        "n_heads": 128,
        "n_kv_heads": 128,
        "head_dim": 192,
        "hidden_dim": 16384,
        "expert_hidden_dim": 4096,
        "n_dense_layers": 3,
        "yarn": SMALL_4["yarn"] | {"factor": 36},
        "latent_attention": {
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        "vision": LARGE_TOWER,
    },
    # https://huggingface.co/mistralai/Shieldstral-1.0-3B/blob/main/config.json: yes or no to a
    # policy in the prompt.
    "shieldstral-1.0-3b": MINISTRAL_3_3B,
    # https://huggingface.co/mistralai/Voxtral-Mini-3B-2507/blob/main/config.json; its text part.
    "voxtral-mini-3b-2507": SEVEN
    | FULL
    | {"dim": 3072, "n_layers": 30, "hidden_dim": 8192, "vocab_size": 131072, "rope_theta": 1e8},
    # https://huggingface.co/nvidia/Mistral-NeMo-Minitron-8B-Base/blob/main/config.json
    "mistral-nemo-minitron-8b": NEMO | {"dim": 4096, "hidden_dim": 11520},
}

# What no copy of the release's own config was at hand for. The number of weights follows from
# the other fields; these fields it does not show, or nobody has published it.
UNVERIFIED: dict[str, tuple[str, ...]] = {
    "leanstral-2603": (
        *("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "norm_eps", "rope_theta"),
        *("n_experts", "n_experts_per_token", "expert_hidden_dim", "n_shared_experts"),
        *("latent_attention", "yarn", "llama_4_scaling", "vision"),
    ),
    "ministral-8b-2410": ("sliding_window",),
    "mistral-large-3-675b-2512": ("vision",),  # its sizes are known, its projector is not
    "mistral-medium-3.5-128b": (
        *("hidden_dim", "vocab_size", "rope_theta", "norm_eps", "yarn", "vision"),
    ),
    "pixtral-12b-2409": ("rope_theta",),
    "shieldstral-1.0-3b": ("dim", "n_layers", "hidden_dim", "yarn", "llama_4_scaling"),
    "voxtral-mini-3b-2507": ("n_heads",),
}

PRESETS: dict[str, MistralConfig] = {
    name: MistralConfig.from_dict(dict(fields)) for name, fields in RELEASES.items()
}


def preset(name: str) -> MistralConfig:
    """The config of that name in `PRESETS`.

    Raises:
        BadInput: there is none; the message lists those there are.
    """
    if name not in PRESETS:
        raise BadInput(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
