"""One small random model for each kind of block that Mistral has released.

Each is small in the same way, and every length is so short that a text of a few dozen tokens
goes past it several times: windows, the texts before YaRN, the steps in which queries grow.
"""

import dataclasses

from lechat_jax.config import LatentConfig, Llama4Scaling, MistralConfig, VisionConfig, Yarn

# Three layers in which no two dimensions agree, so none can be confused.
SMALL = MistralConfig(
    dim=40,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    head_dim=8,
    hidden_dim=56,
    vocab_size=97,
    norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=7,
)

# The same with experts, each a little smaller.
SMALL_MIXTURE = dataclasses.replace(SMALL, hidden_dim=28, n_experts=5, n_experts_per_token=2)

# With a theta of 5, two of the four pairs of lanes keep their speed, one is slowed down, and
# one is between.
THETA = 5.0
STRETCHED = Yarn(
    factor=16.0, original_max_position_embeddings=9, beta=0.85, alpha=0.45, apply_scale=False
)

# A tower of two layers, whose dimensions are neither each other's nor the decoder's.
TOWER = VisionConfig(
    dim=24,
    n_layers=2,
    n_heads=2,
    hidden_dim=20,
    patch_size=4,
    max_image_size=48,
    rope_theta=20.0,
    spatial_merge_size=2,
    projector_norm=True,
    projector_bias=False,
)

ARCHITECTURES: dict[str, MistralConfig] = {
    # Mistral 7B, Nemo, Small and Large: one window, or none.
    "mistral": SMALL,
    # Ministral 8B: some layers see all.
    "ministral": dataclasses.replace(SMALL, sliding_window=(None, 7, 7)),
    # Mixtral: a router and experts.
    "mixtral": dataclasses.replace(SMALL_MIXTURE, n_layers=2),
    # Ministral 3 and Devstral Small 2: stretched, queries grow; the smallest is tied.
    "ministral-3": dataclasses.replace(
        SMALL,
        n_layers=2,
        rope_theta=THETA,
        sliding_window=None,
        tied_embeddings=True,
        yarn=STRETCHED,
        llama_4_scaling=Llama4Scaling(beta=0.1, original_max_position_embeddings=9),
    ),
    # Mistral Small 3.1 and what came after: a tower, whose patches are merged by fours.
    "mistral-small-3.1": dataclasses.replace(SMALL, n_layers=2, sliding_window=None, vision=TOWER),
    # Pixtral 12B: a tower whose patches are tokens.
    "pixtral": dataclasses.replace(
        SMALL,
        n_layers=2,
        sliding_window=None,
        vision=dataclasses.replace(
            TOWER, spatial_merge_size=1, projector_norm=False, projector_bias=True
        ),
    ),
    # Mistral Small 4 and Large 3: latent attention, shared experts, a dense layer first. The inner
    # norms of transformers have an epsilon of 1e-6 whatever the config says.
    "mistral-small-4": dataclasses.replace(
        SMALL,
        n_kv_heads=6,
        head_dim=14,
        norm_eps=1e-6,
        rope_theta=THETA,
        sliding_window=None,
        n_experts=5,
        n_experts_per_token=2,
        expert_hidden_dim=18,
        n_shared_experts=2,
        n_dense_layers=1,
        yarn=STRETCHED,
        llama_4_scaling=Llama4Scaling(beta=0.1, original_max_position_embeddings=9),
        latent_attention=LatentConfig(
            q_lora_rank=24,
            kv_lora_rank=20,
            qk_nope_head_dim=6,
            qk_rope_head_dim=8,
            v_head_dim=10,
        ),
    ),
    # Devstral 2: stretched, and queries and keys longer for it.
    "devstral-2": dataclasses.replace(
        SMALL,
        n_layers=2,
        rope_theta=THETA,
        sliding_window=None,
        yarn=dataclasses.replace(STRETCHED, factor=64.0, apply_scale=True),
    ),
}
