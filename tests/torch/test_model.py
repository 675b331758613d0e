"""The PyTorch reference computes what the papers define, and what transformers computes.

The oracle of the definitions is the one in NumPy that also judges `lechat_jax`.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("xformers", reason="lechat_torch takes its masks from xformers")

from lechat_jax.config import Llama4Scaling, MistralConfig
from lechat_torch.cache import empty_cache
from lechat_torch.model import Mistral, RMSNorm
from tests.model.test_mistral import STRETCHED, oracle

T = 33  # more than twice the window of the tiny model
EXACT = 1e-11  # of the largest number, in float64; measured 2e-15
FLOAT32 = 1e-5  # of the deviation; measured 4e-6, and 1e-6 of a gradient


def random_model(
    config: MistralConfig, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Mistral:
    """Logits have a deviation of about 1, norms are uneven and attention is sharp.

    As PyTorch draws a model, a wrong rotation or window would hardly be seen.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Mistral(config).double()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.5, 1.5, generator=generator)
            else:
                is_lookup = name == "embed.weight" and not config.tied_embeddings
                std = 1.0 if is_lookup else weight.shape[1] ** -0.5
                weight.normal_(0, std, generator=generator)
    return model.to(dtype)


def text(config: MistralConfig, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (rows, T), generator=generator)


def in_lechats_words(model: Mistral) -> dict[str, np.ndarray]:
    """The weights under the names and in the shapes that the oracle reads."""
    config = model.config
    found = {}
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        part = name.split(".")[-2]
        if part in ("q", "k", "v"):
            array = array.reshape(-1, config.head_dim, config.dim)
        elif part == "o":
            array = array.reshape(config.dim, -1, config.head_dim)
        found[name.removesuffix("weight") + ("scale" if array.ndim == 1 else "kernel")] = array
    return found


def in_transformers(model: Mistral) -> transformers.MistralForCausalLM:
    """The model of transformers with the same weights, in float32."""
    config = model.config
    theirs = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            sliding_window=config.windows[0],
            tie_word_embeddings=config.tied_embeddings,
        )
    )
    theirs.load_state_dict({their_name(n): w for n, w in model.state_dict().items()})
    return theirs


def their_name(name: str) -> str:
    if name == "head.weight":
        return "lm_head.weight"
    for ours, other in (
        ("embed.", "embed_tokens."),
        ("blocks.", "layers."),
        ("attn_norm.", "input_layernorm."),
        ("mlp_norm.", "post_attention_layernorm."),
    ):
        name = name.replace(ours, other)
    for part in "qkvo":
        name = name.replace(f".attn.{part}.", f".self_attn.{part}_proj.")
    for part in ("gate", "up", "down"):
        name = name.replace(f".mlp.{part}.", f".mlp.{part}_proj.")
    return "model." + name


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "tied": {"tied_embeddings": True},
    "no window": {"sliding_window": None},
    "windows": {"sliding_window": (7, None, 3)},
    "window of one": {"sliding_window": 1},
    "one kv head": {"n_kv_heads": 1},
    "all kv heads": {"n_kv_heads": 6},
    "heads as wide as the model": {"n_heads": 4, "head_dim": 10},
    "another theta and epsilon": {"rope_theta": 1e6, "norm_eps": 1e-2},
    "stretched and growing": {
        "rope_theta": 16.0,
        "yarn": STRETCHED,
        "llama_4_scaling": Llama4Scaling(0.3, 9),
    },
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_are_what_the_definitions_say(tiny: MistralConfig, change: dict[str, Any]) -> None:
    config = dataclasses.replace(tiny, **change)
    model, tokens = random_model(config), text(config)
    with torch.no_grad():
        logits = model(tokens).numpy()
    assert 0.5 < logits.std() < 2
    for row, ids in zip(logits, tokens.numpy(), strict=True):
        expected = oracle(config, in_lechats_words(model), ids)
        np.testing.assert_allclose(row, expected, rtol=0, atol=EXACT * np.abs(expected).max())


FAULTS: dict[str, dict[str, Any]] = {
    "a key too few": {"sliding_window": 6},
    "a key too many": {"sliding_window": 8},
    "no window": {"sliding_window": None},
    "the last layer has no window": {"sliding_window": (7, 7, None)},
    "another theta": {"rope_theta": 1e6},
    "another epsilon": {"norm_eps": 1e-6},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_model_that_differs_in_one_number_is_seen(
    tiny: MistralConfig, fault: dict[str, Any]
) -> None:
    right, tokens = random_model(tiny), text(tiny)
    wrong = Mistral(dataclasses.replace(tiny, **fault)).double()
    wrong.load_state_dict(right.state_dict())
    with torch.no_grad():
        logits = right(tokens)
        difference = (logits - wrong(tokens)).abs().max()
    assert difference > 3 * FLOAT32 * logits.std()  # measured 5e-5 for epsilon, 0.9 to 3 else


@pytest.mark.parametrize("name", ["tiny", "tied", "no window", "one kv head"])
def test_transformers_computes_the_same_forward_and_backward(
    tiny: MistralConfig, name: str
) -> None:
    config = dataclasses.replace(tiny, **VARIANTS[name])
    ours, tokens = random_model(config, torch.float32), text(config)
    theirs = in_transformers(ours)
    for attention in ("eager", "sdpa"):
        theirs.set_attn_implementation(attention)
        logits, expected = ours(tokens), theirs(input_ids=tokens).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=FLOAT32 * expected.std().item())
    loss, expected_loss = ours.loss(tokens), theirs(input_ids=tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    loss.backward()
    expected_loss.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters()}
    for ours_name, parameter in ours.named_parameters():
        gradient, expected = parameter.grad, gradients[their_name(ours_name)]
        assert gradient is not None
        assert expected is not None
        error = (gradient - expected).norm() / expected.norm()
        assert error < FLOAT32, ours_name


def test_weights_have_the_names_and_shapes_that_converters_rely_on(tiny: MistralConfig) -> None:
    model = Mistral(dataclasses.replace(tiny, n_layers=1))
    assert {name: tuple(leaf.shape) for name, leaf in model.state_dict().items()} == {
        "embed.weight": (97, 40),
        "blocks.0.attn_norm.weight": (40,),
        "blocks.0.attn.q.weight": (48, 40),
        "blocks.0.attn.k.weight": (16, 40),
        "blocks.0.attn.v.weight": (16, 40),
        "blocks.0.attn.o.weight": (40, 48),
        "blocks.0.mlp_norm.weight": (40,),
        "blocks.0.mlp.gate.weight": (56, 40),
        "blocks.0.mlp.up.weight": (56, 40),
        "blocks.0.mlp.down.weight": (40, 56),
        "norm.weight": (40,),
        "head.weight": (97, 40),
    }
    assert {leaf.dtype for leaf in model.state_dict().values()} == {torch.float32}
    assert sum(weight.numel() for weight in model.parameters()) == model.config.n_params


def test_tied_embeddings_are_one_weight_in_every_dtype(tiny: MistralConfig) -> None:
    config = dataclasses.replace(tiny, tied_embeddings=True)
    for model in (Mistral(config), Mistral(config).bfloat16(), copy.deepcopy(Mistral(config))):
        assert model.head.weight is model.embed.weight
        assert sum(weight.numel() for weight in model.parameters()) == config.n_params
        assert "head.weight" in model.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_model_computes_in_the_dtype_of_its_weights(
    tiny: MistralConfig, dtype: torch.dtype
) -> None:
    model, tokens = random_model(tiny, dtype), text(tiny)
    wide = torch.promote_types(dtype, torch.float32)
    dtypes: set[torch.dtype] = set()
    for part in (model.embed, *model.blocks, model.norm):
        part.register_forward_hook(lambda _module, _inputs, output: dtypes.add(output.dtype))
    with torch.no_grad():
        assert model(tokens).dtype == model.loss(tokens).dtype == wide
    assert dtypes == {dtype}


class Types(TorchDispatchMode):
    """Notes of every operation the types of the floats it takes and makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...], set[torch.dtype]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            floats = {x.dtype for x in (*args, made) if isinstance(x, Tensor)}
            floats = {dtype for dtype in floats if dtype.is_floating_point or dtype.is_complex}
            self.seen.append((func.__name__.split(".")[0], tuple(made.shape), floats))
        return made


@pytest.mark.parametrize("n_experts", [0, 5])
def test_scores_softmax_norms_turns_and_the_router_are_float32(
    tiny: MistralConfig, n_experts: int
) -> None:
    """In bfloat16, whole and from the cache; maps and what attention gathers are not."""
    chosen = min(2, n_experts)
    config = dataclasses.replace(
        tiny, n_layers=1, n_experts=n_experts, n_experts_per_token=chosen, sliding_window=7
    )
    model = Mistral(config).bfloat16()
    tokens = torch.zeros(4, 10, dtype=torch.long)
    positions = torch.arange(10).expand(4, 10)
    cache = empty_cache(config, 4, 10, 10, torch.bfloat16, "cpu")
    wide = "_softmax _log_softmax rsqrt mean polar pow exp complex native_layer_norm topk"
    with torch.no_grad(), Types() as types:
        model(tokens)
        model.extend(tokens, positions, cache)
        model.loss(tokens)
    names = {name for name, _, _ in types.seen}
    assert {"_softmax", "polar", "complex"} <= names
    for name, _, floats in types.seen:
        if name in wide.split():
            assert floats <= {torch.float32, torch.complex64}, name
    scores = [floats for name, shape, floats in types.seen if name == "bmm" and shape[-1] != 8]
    mixed = [floats for name, shape, floats in types.seen if name == "bmm" and shape[-1] == 8]
    assert all(floats == {torch.float32} for floats in scores)
    assert all(floats == {torch.bfloat16} for floats in mixed)
    assert len(scores) == len(mixed) == 3
    routed = [floats for name, shape, floats in types.seen if name == "mm" and shape[-1] == 5]
    assert routed == [{torch.float32}] * (3 if n_experts else 0)


def test_bfloat16_is_off_by_what_rounding_costs(tiny: MistralConfig) -> None:
    rounded, tokens = random_model(tiny, torch.bfloat16), text(tiny)
    exact = copy.deepcopy(rounded).double()
    with torch.no_grad():
        logits, truth = rounded(tokens), exact(tokens)
    error = (logits - truth).square().mean().sqrt() / truth.std()
    assert 1e-3 < error < 3e-2  # measured 1e-2


def test_a_norm_rounds_before_it_multiplies(tiny: MistralConfig) -> None:
    """As both references do; the other order gives other numbers."""
    norm = RMSNorm(1024, tiny.norm_eps).bfloat16()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    x = torch.randn(1, 3, 1024, generator=generator).bfloat16()
    unit = x.float() / (x.double().square().mean(-1, keepdim=True) + tiny.norm_eps).sqrt().float()
    rounded_first = unit.bfloat16() * norm.weight
    rounded_last = (unit * norm.weight.float()).bfloat16()
    assert (norm(x) == rounded_first).float().mean() > 0.999  # the rest lies on an edge
    assert (norm(x) == rounded_last).float().mean() < 0.9


def test_an_indifferent_model_loses_the_logarithm_of_the_vocabulary(tiny: MistralConfig) -> None:
    model = random_model(tiny)
    nn.init.zeros_(model.head.weight)
    assert model.loss(text(tiny)).item() == pytest.approx(math.log(97), rel=1e-15)


def test_the_loss_is_that_of_each_token_but_the_first(tiny: MistralConfig) -> None:
    model, tokens = random_model(tiny), text(tiny)
    nats = []
    with torch.no_grad():
        shares = model(tokens).exp().tolist()
        loss = model.loss(tokens).item()
    for b, ids in enumerate(tokens.tolist()):
        for t in range(T - 1):
            nats.append(-math.log(shares[b][t][ids[t + 1]] / sum(shares[b][t])))
    assert loss == pytest.approx(sum(nats) / (2 * (T - 1)), rel=1e-13)


def test_where_a_sequence_begins_changes_nothing_but_rounding(tiny: MistralConfig) -> None:
    model, tokens = random_model(tiny), text(tiny)
    with torch.no_grad():
        here, there = model(tokens), model(tokens, first_position=1000)
    assert not torch.equal(here, there)
    torch.testing.assert_close(here, there, rtol=0, atol=1e-10)


PATHS = ("forward", "hidden", "loss", "extend")


@pytest.mark.parametrize("path", PATHS)
def test_every_path_adds_up_what_its_modules_return(tiny: MistralConfig, path: str) -> None:
    """So whoever watches the modules sees all that the model computes, whatever it is asked."""
    model, tokens = random_model(tiny), text(tiny)
    parts: list[Tensor] = []
    ends: list[Tensor] = []
    watched = [model.embed, *(part for block in model.blocks for part in (block.attn, block.mlp))]
    for module in watched:
        module.register_forward_hook(lambda _module, _inputs, output: parts.append(output))
    model.norm.register_forward_hook(lambda _module, inputs, _output: ends.append(inputs[0]))
    with torch.no_grad():
        if path == "extend":
            cache = empty_cache(tiny, 2, T, T, torch.float64, "cpu")
            model.extend(tokens, torch.arange(T).expand(2, T), cache)
        else:
            getattr(model, path)(tokens)
    assert len(parts) == 1 + 2 * tiny.n_layers
    assert len(ends) == 1
    torch.testing.assert_close(sum(parts), ends[0], rtol=0, atol=1e-13)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """No check of shapes, which a compiler cannot trace."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_the_model_is_exported_for_texts_of_any_length(
    tiny: MistralConfig, unchecked: None
) -> None:
    model, tokens = random_model(tiny, torch.float32), text(tiny)
    length = torch.export.Dim("T", min=2, max=4096)
    short = tokens[:, :9].contiguous()
    exported = torch.export.export(model, (short,), dynamic_shapes=({1: length},)).module()
    torch.testing.assert_close(exported(tokens), model(tokens), rtol=0, atol=0)


@pytest.mark.slow
def test_the_model_is_compiled_as_one_graph_forward_and_backward(
    tiny: MistralConfig, unchecked: None
) -> None:
    """By the backend that needs no C++ compiler."""
    torch.compiler.reset()
    model, tokens = random_model(tiny), text(tiny)
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    gradients = [
        torch.autograd.grad(loss(tokens), list(model.parameters()))
        for loss in (compiled, model.loss)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-13)
