"""A model loaded for generation: weights, tokenizer, limits, checks of prompts and memory."""

from collections.abc import Collection, Sequence

from jax.sharding import Mesh

from lechat_jax.checkpoint.load import free_bytes
from lechat_jax.config import MistralConfig
from lechat_jax.devices.memory import check_fits
from lechat_jax.devices.mesh import check_divides, on_heads
from lechat_jax.errors import BadInput
from lechat_jax.generate.continuous_batch import ContinuousBatch, OnRead
from lechat_jax.generate.prefill import cache_size, cached_bytes, chunk_sizes
from lechat_jax.generate.vision import starts
from lechat_jax.model.binding import Weights, weights_of
from lechat_jax.model.mistral import Mistral
from lechat_jax.ops.matmul import as_bits
from lechat_jax.tokenizer.images import Image, ImageSource, read_image
from lechat_jax.tokenizer.tokenizer import Tokenizer

MOST_DRAFT = 32  # tokens that may be guessed ahead
CONTEXT = 4096  # positions of a layer without a window, unless told otherwise
SHORTER = "ask for a shorter context or fewer samples"

# What can be continued: a text, or the ids of one, BOS included.
Prompt = str | Sequence[int]
Prompts = Sequence[Sequence[int]] | list[str] | list[str | list[int]]


class LoadedModel:
    """A model with its tokenizer, prefill chunk and context size.

    The functions of `ContinuousBatch` are compiled for each number of prompts; lengths and sampling
    parameters compile nothing.

    Attributes:
        config: the model's config.
        weights: the model's weights by name; the norms' dtype is the compute dtype.
        tokenizer: the tokenizer; without one there are only ids.
        eos_ids: default ids that end a text: those given and the tokenizer's.
        chunks: tokens of a prefill chunk: of a short one, and of a long one if there is any.
        context: positions that a layer without a window can hold, prompt included.
        on_read: called with the prompt tokens done and to do: at the start of prefill with 0,
            then after each chunk, for which prefill waits.
        mesh: of the devices that share the model, `tp`, and the rows of a batch, `fsdp`; by
            default there is one device. Weights are placed on it.

    Raises:
        BadInput: chunk or context is below 1, or the tokenizer is another model's.
    """

    def __init__(
        self,
        model: Mistral,
        tokenizer: Tokenizer | None = None,
        *,
        chunk: int | None = None,
        context: int = CONTEXT,
        on_read: OnRead | None = None,
        eos_ids: Collection[int] = (),
        mesh: Mesh | None = None,
    ) -> None:
        self.config: MistralConfig = model.config
        self.mesh = mesh
        self.weights = on_heads(mesh, weights_of(model))
        self._for_one, self._for_more = (as_bits(self.weights, positions) for positions in (1, 2))
        self.tokenizer = tokenizer
        self.eos_ids = {*eos_ids, *([tokenizer.eos_id] if tokenizer else [])}
        self.chunks = chunk_sizes(self.config, context) if chunk is None else (chunk,)
        self.context = context
        self.on_read = on_read
        if mesh:
            check_divides(mesh, self.config)
        if self.chunks[0] < 1 or context < 1:
            raise BadInput(f"chunk ({chunk}) and context ({context}) must be at least 1")
        if tokenizer and tokenizer.vocab_size != self.config.vocab_size:
            raise BadInput(
                f"{tokenizer.path} has {tokenizer.vocab_size} tokens and the model "
                f"{self.config.vocab_size}; use the tokenizer that the model was trained with"
            )

    def continuous_batch(
        self,
        n_rows: int,
        draft: int = 0,
        *,
        chunks: tuple[int, ...] | None = None,
        with_processors: bool = False,
    ) -> ContinuousBatch:
        """A continuous batch of `n_rows` free rows; arguments as for `ContinuousBatch`."""
        return ContinuousBatch(
            self.config,
            self._weights_for,
            n_rows,
            chunks=chunks or self.chunks,
            context=self.context,
            draft=draft,
            with_processors=with_processors,
            mesh=self.mesh,
        )

    def read_images(self, sources: Sequence[ImageSource]) -> list[Image]:
        """Reads images for this model: of files, their bytes, data URLs, or Pillow's.

        Raises:
            BadInput: the model sees none, or there is no image.
        """
        if not sources:
            return []
        if (vision := self.config.vision) is None:
            raise BadInput("the model has no vision tower, so it cannot be given images")
        return [read_image(one, vision) for one in sources]

    def encode(self, text: str, images: Sequence[Image] = ()) -> list[int]:
        """Encodes a prompt: BOS, the ids of images, then those of the text.

        Raises:
            BadInput: there is no tokenizer.
        """
        if self.tokenizer is None:
            raise BadInput("there is no tokenizer beside the weights; give the prompt as ids")
        seen = [id_ for image in images for id_ in image.ids]
        return [self.tokenizer.bos_id, *seen, *self.tokenizer.encode(text)]

    def ids_of(self, prompt: Prompt, images: Sequence[Image] = ()) -> Sequence[int]:
        """The ids of a prompt, which is a text, before which its images come, or ids with theirs.

        Raises:
            BadInput: there is no tokenizer for a text.
        """
        return self.encode(prompt, images) if isinstance(prompt, str) else prompt

    def room(self, length: int) -> int | None:
        """Tokens that fit into the context after `length`; `None` if every layer has a window."""
        return self.context - length if None in self.config.windows else None

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 0,
        draft: int = 0,
        images: Sequence[Sequence[Image]] = (),
    ) -> None:
        """Raises `BadInput` for prompts that this model cannot continue by so many tokens.

        Each may have images, whose ids must be in it.
        """
        for prompt, its in zip(prompts, images, strict=False):
            if its:
                starts(prompt, its, self.config)
        if not 0 <= max_tokens < 2**31:
            raise BadInput(f"max_tokens must be at least 0 and below 2**31, not {max_tokens}")
        if not 0 <= draft <= MOST_DRAFT:
            raise BadInput(f"draft must be from 0 (off) to {MOST_DRAFT} tokens, not {draft}")
        if not prompts:
            raise BadInput("there is no prompt; give at least one")
        for prompt in prompts:
            if not len(prompt):
                raise BadInput("a prompt has no tokens; an empty text is the BOS token alone")
            for id_ in prompt:
                if not 0 <= id_ < self.config.vocab_size:
                    raise BadInput(
                        f"prompt token {id_} is not an id of the model, which has "
                        f"0 to {self.config.vocab_size - 1}"
                    )
            if (self.room(len(prompt)) or 0) < 0:
                raise BadInput(
                    f"the prompt has {len(prompt)} tokens and the context {self.context}; "
                    "ask for a longer context"
                )

    def check_memory(self, batch: int, draft: int) -> None:
        """Raises `BadInput` if the KV cache of `batch` rows does not fit into memory."""
        size = cache_size(self.config, self.weights, batch, self.chunks[-1], self.context, draft)
        free = free_bytes(self.weights["norm.scale"])
        check_fits("the cache takes", cached_bytes(size, self.mesh), free, SHORTER)

    def _weights_for(self, positions: int) -> Weights:
        """The weights in the form for matmuls of so many positions."""
        return self._for_one if positions == 1 else self._for_more
