"""Text generation in Python: `load` a model, then `generate`, `stream` or `chat`."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lechat_jax.checkpoint.load import load_to_compute
from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.devices.mesh import check_divides, make_mesh
from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import Continuation, Sample, join, stop_texts
from lechat_jax.generate.continuous_batch import OnRead, rounds
from lechat_jax.generate.decode import calls_for, compile_for
from lechat_jax.generate.loaded_model import CONTEXT, SHORTER, LoadedModel, Prompt, Prompts
from lechat_jax.generate.prefill import cache_size, cached_bytes, chunk_sizes
from lechat_jax.generate.sampling import Sampling
from lechat_jax.generate.session import Session
from lechat_jax.model.binding import bind
from lechat_jax.quantize.scheme import Format
from lechat_jax.tokenizer.images import Image, ImageSource

if TYPE_CHECKING:
    from lechat_jax.generate.dialogue import Dialogue  # mistral-common takes 0.3 s to import


class Generator(LoadedModel):
    """Generates text with a model, batched or streamed, for commands, training and Python."""

    @classmethod
    def from_checkpoint(
        cls,
        folder: Path | str | SavedModel,
        *,
        context: int = CONTEXT,
        dtype: DTypeLike | None = None,
        quantize: Format | None = None,
        batch: int | None = None,
        draft: int = 0,
        on_read: OnRead | None = None,
        mesh: Mesh | str | None = None,
    ) -> "Generator":
        """Loads a training run's last good checkpoint, or weights of any format.

        Nothing is converted on the disk: files are mapped, and a tensor is put into lechat's shape
        and dtype on its way to the device.

        Damaged checkpoints that are skipped are named on stderr.

        Args:
            folder: of a run, or of weights in lechat's, Hugging Face's or Mistral's format; a GGUF
                file; the name of a model on the Hugging Face Hub; or what was opened of one.
            context: as for the class.
            dtype: compute dtype. By default as stored, but float32 on a CPU where that fits into
                memory: batches and prefill are faster in it.
            quantize: "int8" for per-channel int8, a quarter of float32, or "int4" for group-wise
                int4, an eighth; weights that are stored quantised stay so.
            batch: number of prompts to compile for while the weights are read, for a shorter
                time to first token; by default compilation waits for the first call.
            draft: as for `stream`, to compile for.
            on_read: as for the class.
            mesh: as for the class, or in words such as `tp=8`; each device reads its slices.

        Raises:
            BadInput: the folder is neither, is damaged, or has no good checkpoint yet; the
                weights do not fit into memory; or they are stored in several dtypes and `dtype`
                is not given.
        """
        trained = folder if isinstance(folder, SavedModel) else SavedModel.open(folder)
        tokenizer = trained.tokenizer
        mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
        if mesh:
            check_divides(mesh, trained.config)
        chunks = chunk_sizes(trained.config, context)

        def compile_ahead(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
            if batch is not None:
                size = (batch, chunks, context, draft)
                compile_for(calls_for(trained.config, shapes, *size, mesh), mesh)

        def cached(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> int:
            size = cache_size(trained.config, shapes, batch or 1, chunks[-1], context, draft)
            return cached_bytes(size, mesh)

        weights = load_to_compute(trained, dtype, quantize, compile_ahead, cached, SHORTER, mesh)
        return cls(
            bind(trained.config, weights),
            tokenizer,
            context=context,
            on_read=on_read,
            eos_ids=trained.eos_ids,
            mesh=mesh,
        )

    @overload
    def generate(
        self,
        prompts: Prompt,
        max_tokens: int = ...,
        sampling: Sampling | None = ...,
        eos_ids: Collection[int] | None = ...,
        draft: int = ...,
        first_row: int = ...,
        stop: str | Sequence[str] = ...,
        images: Sequence[ImageSource] = ...,
    ) -> Sample: ...

    @overload
    def generate(
        self,
        prompts: Prompts,
        max_tokens: int = ...,
        sampling: Sampling | None = ...,
        eos_ids: Collection[int] | None = ...,
        draft: int = ...,
        first_row: int = ...,
        stop: str | Sequence[str] = ...,
        images: Sequence[Sequence[ImageSource]] = ...,
    ) -> list[Sample]: ...

    def generate(
        self,
        prompts: Prompt | Prompts,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] | None = None,
        draft: int = 0,
        first_row: int = 0,
        stop: str | Sequence[str] = (),
        images: Sequence[Any] = (),
    ) -> Sample | list[Sample]:
        """Generates the continuation of one prompt, or of each of several as a batch.

        Arguments as for `stream_batch`; of one prompt the images are a list.

        Returns:
            A sample for one prompt (a text or ids); a list of samples for a list of prompts.
        """
        is_one = isinstance(prompts, str) or any(isinstance(p, int | np.integer) for p in prompts)
        several = cast(Prompts, [prompts] if is_one else prompts)
        of_each = [images] if is_one and images else images
        pieces = self.stream_batch(
            several, max_tokens, sampling, eos_ids, draft, first_row, stop, of_each
        )
        samples = [join(row) for row in zip(*pieces, strict=True)]
        return samples[0] if is_one else samples

    def stream(
        self,
        prompt: Prompt,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] | None = None,
        draft: int = 0,
        stop: str | Sequence[str] = (),
        images: Sequence[ImageSource] = (),
    ) -> Iterator[Sample]:
        """Streams the continuation of a prompt, piece by piece; arguments as for `stream_batch`."""
        several = cast(Prompts, [prompt])
        rounds_ = self.stream_batch(
            several, max_tokens, sampling, eos_ids, draft, stop=stop, images=[images]
        )
        return (piece for (piece,) in rounds_)

    def stream_batch(
        self,
        prompts: Prompts,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        eos_ids: Collection[int] | None = None,
        draft: int = 0,
        first_row: int = 0,
        stop: str | Sequence[str] = (),
        images: Sequence[Sequence[ImageSource]] = (),
    ) -> Iterator[list[Sample]]:
        """Streams the continuations of a batch of prompts: rounds of one piece for each prompt.

        The first pieces have one token, for a short time to first token; later ones grow as
        long as they come quickly. No token depends on that, or on the other rows: only on the
        model, the row's prompt and number, and `sampling`.

        Args:
            prompts: texts, or ids with BOS included; at least one prompt.
            max_tokens: maximum new tokens of each prompt.
            sampling: sampling parameters; by default `Sampling()`.
            eos_ids: ids that end a text; by default the model's. Empty: none.
            draft: tokens per step of speculative decoding by prompt lookup; 0 is off. The same
                text, sooner if it repeats itself.
            first_row: number of the first prompt, so that random streams differ by batch.
            stop: stop text or texts, which may start within a token; a continuation is cut
                before the one that is complete first.
            images: of each prompt the images that it begins with if it is a text, or whose ids
                are in it: files, their bytes, data URLs, Pillow's images; or what
                `read_images` made of them.

        Raises:
            BadInput: a prompt is empty, longer than the context or not of this vocabulary,
                `max_tokens` or `draft` is out of range, a stop text is empty or there is no
                tokenizer for it, or the cache does not fit into memory.
        """
        if images and len(images) != len(prompts):
            raise BadInput(f"there are {len(prompts)} prompts and images of {len(images)}")
        seen = [self.read_images(its) for its in images] or [[] for _ in prompts]
        ids = [self.ids_of(*both) for both in zip(prompts, seen, strict=True)]
        self.check(ids, max_tokens, draft, seen)
        self.check_memory(len(ids), draft)
        eos_ids = self.eos_ids if eos_ids is None else eos_ids
        stop = stop_texts(stop)
        rows = [
            Continuation(prompt, max_tokens, self.room(len(prompt)), eos_ids, self.tokenizer, stop)
            for prompt in ids
        ]
        return self._rounds(ids, rows, sampling or Sampling(), eos_ids, draft, first_row, seen)

    def chat(
        self,
        system: str = "",
        *,
        max_tokens: int = 1024,
        sampling: Sampling | None = None,
        draft: int = 0,
        stop: str | Sequence[str] = (),
    ) -> "Dialogue":
        """Starts a chat by the model's chat template; `say` answers a question.

        The history stays in the KV cache, so that a question costs its own tokens only.

        Args:
            system: system prompt.
            max_tokens: maximum tokens of an answer.
            sampling: sampling parameters; by default a temperature of 0.7.
            draft: tokens per step of speculative decoding, as for `stream`.
            stop: stop text or texts, which end an answer.

        Raises:
            BadInput: there is no tokenizer, or the cache does not fit into memory.
        """
        if self.tokenizer is None:
            raise BadInput("there is no tokenizer beside the weights, so there is no chat")
        from lechat_jax.generate.dialogue import Dialogue

        return Dialogue(
            Session(self, draft),
            self.tokenizer,
            vision=self.config.vision,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop_texts(stop),
        )

    def _rounds(
        self,
        prompts: Sequence[Sequence[int]],
        rows: list[Continuation],
        sampling: Sampling,
        eos_ids: Collection[int],
        draft: int,
        first_row: int,
        images: Sequence[Sequence[Image]],
    ) -> Iterator[list[Sample]]:
        if all(row.stopped for row in rows):
            yield [row.take([], []) for row in rows]
            return
        batch = self.continuous_batch(len(rows), draft)
        for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            if not row.stopped:
                stream = first_row + number
                seen = images[number]
                batch.admit(
                    number, prompt, row.limit, sampling, eos_ids, stream=stream, images=seen
                )
        batch.read_all(self.on_read)
        yield from rounds(batch, rows)


load = Generator.from_checkpoint
