"""Text from the PyTorch reference: read the prompts in chunks, then one token at a time."""

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lechat_jax.errors import BadInput
from lechat_torch.cache import EMPTY, Cache, empty_cache
from lechat_torch.model import Mistral


class Sample(NamedTuple):
    """What was generated for one prompt.

    Attributes:
        ids: the new tokens, one of `eos_ids` that ended the text included.
        logprobs: nats that the model itself gave each, at temperature 1 and unfiltered.
    """

    ids: list[int]
    logprobs: list[float]


@torch.no_grad()
def generate(
    model: Mistral,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    chunk: int = 64,
    context: int = 4096,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Collection[int] = (),
    features: Float[Tensor, "image_tokens D"] | None = None,
) -> list[Sample]:
    """Up to `max_tokens` new tokens for each prompt, all prompts in one batch.

    Prompts are padded on the left, so that all end in the same column. The padding is never
    seen: each row has the logits that it would have alone.

    Args:
        model: computes in the dtype and on the device of its weights.
        prompts: the ids of each; at least one prompt, of at least one token.
        max_tokens: most new tokens of each.
        chunk: tokens of the prompts that are read at once.
        context: positions that a layer without a window can hold, prompt included.
        temperature: what the logits are divided by; 0 takes the likeliest token always.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens, up to and including the one that brings their
            probability past p; 1 for all.
        seed: of the draws, one stream for the whole batch.
        eos_ids: tokens that end a text.
        features: of images that each of the prompts has, see `Mistral.see`.

    Raises:
        BadInput: a number is out of range, a prompt cannot be read by this model, or a layer
            without a window has no room for it and its continuation.
    """
    _check(model, prompts, max_tokens, context)
    if chunk < 1 or not 0 <= temperature < math.inf or top_k < 0 or not 0 <= top_p <= 1:
        raise BadInput(
            f"chunk ({chunk}) must be at least 1, temperature ({temperature}) and top_k ({top_k}) "
            f"0 or more, and top_p ({top_p}) from 0 to 1"
        )
    weight = model.embed.weight
    draws = torch.Generator(weight.device).manual_seed(seed)
    tokens, positions = left_padded(prompts, weight.device)
    cache = empty_cache(model.config, len(prompts), chunk, context, weight.dtype, weight.device)
    samples = [Sample([], []) for _ in prompts]
    embedded = model.embedded(tokens, features)
    for _ in range(max_tokens):
        last = _read(model, tokens, positions, embedded, chunk, cache)
        chosen = choose(last, temperature, top_k, top_p, draws)
        nats = last.log_softmax(dim=-1).gather(1, chosen)
        for sample, id_, nat in zip(
            samples, chosen[:, 0].tolist(), nats[:, 0].tolist(), strict=True
        ):
            if not (sample.ids and sample.ids[-1] in eos_ids):
                sample.ids.append(id_)
                sample.logprobs.append(nat)
        if all(sample.ids[-1] in eos_ids for sample in samples):
            break
        tokens, positions = chosen, positions[:, -1:] + 1
        embedded = model.embed(tokens)
    return samples


def choose(
    logits: Float[Tensor, "B V"],
    temperature: float,
    top_k: int,
    top_p: float,
    draws: torch.Generator,
) -> Int[Tensor, "B 1"]:
    """The next token of each row: temperature, then the k likeliest, then those up to p."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ranked, ids = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    shares = ranked[:, : top_k or None].softmax(dim=-1)
    before = shares.cumsum(dim=-1) - shares
    limit = top_p if top_p < 1 else math.inf  # of all shares the sum may be rounded up
    kept = shares.masked_fill(before > limit, 0)
    return ids.gather(1, torch.multinomial(kept, 1, generator=draws))


def left_padded(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """The prompts as one array whose rows end together, and the position of each token.

    >>> tokens, positions = left_padded([[7, 8, 9], [5]], torch.device("cpu"))
    >>> tokens.tolist(), positions.tolist()
    ([[7, 8, 9], [0, 0, 5]], [[0, 1, 2], [-1, -1, 0]])
    """
    T = max(map(len, prompts))
    tokens = [[0] * (T - len(prompt)) + list(prompt) for prompt in prompts]
    positions = [[EMPTY] * (T - len(prompt)) + list(range(len(prompt))) for prompt in prompts]
    return torch.tensor(tokens, device=device), torch.tensor(positions, device=device)


def _read(
    model: Mistral,
    tokens: Int[Tensor, "B T"],
    positions: Int[Tensor, "B T"],
    embedded: Float[Tensor, "B T D"],
    chunk: int,
    cache: Cache,
) -> Float[Tensor, "B V"]:
    """Logits behind the last of the tokens, all of which are now in the cache."""
    whole = tokens, positions, embedded
    *pieces, last = zip(*(part.split(chunk, 1) for part in whole), strict=True)
    for ids, places, x in pieces:
        model.extend(ids, places, cache, x)
    ids, places, x = last
    return model.extend(ids, places, cache, x)[0][:, -1]


def _check(model: Mistral, prompts: Sequence[Sequence[int]], max_tokens: int, context: int) -> None:
    """Raises `BadInput` for prompts that this model cannot continue."""
    config = model.config
    if max_tokens < 0:
        raise BadInput(f"max_tokens must be at least 0, not {max_tokens}")
    if not prompts or not all(map(len, prompts)):
        raise BadInput("there is no prompt, or one without tokens; an empty text is BOS alone")
    for id_ in (id_ for prompt in prompts for id_ in prompt):
        if not 0 <= id_ < config.vocab_size:
            raise BadInput(
                f"prompt token {id_} is not an id of the model, which has 0 to "
                f"{config.vocab_size - 1}"
            )
    needed = max(map(len, prompts)) + max_tokens
    if None in config.windows and needed > context:
        raise BadInput(
            f"a prompt and {max_tokens} new tokens are {needed} positions, but the context has "
            f"{context}; ask for a longer context"
        )
