"""Flags of the commands that generate text: model, dtype, KV cache, speculation, sampling."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import tyro

from lechat_jax.checkpoint.saved_model import SavedModel
from lechat_jax.errors import BadInput
from lechat_jax.generate.continuation import stop_texts
from lechat_jax.generate.continuous_batch import OnRead
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.loaded_model import CONTEXT
from lechat_jax.generate.sampling import Sampling
from lechat_jax.quantize.scheme import Format


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The flags that `generate`, `chat` and `serve` have in common.

    Attributes:
        folder: Folder of a training run, such as runs/NAME, or of weights in lechat's, Hugging
            Face's or Mistral's format; a GGUF file; either in a bucket (gs:// or s3://); or the
            name of a model on the Hugging Face Hub.
        context: Maximum tokens, prompts and chat included, in the KV cache of layers without a
            sliding window. It is allocated at once, and generation stops there. Other models have
            no limit.
        dtype: Type to compute in. By default as stored, but float32 on a CPU if that fits into
            memory. bfloat16 takes half the memory; on a CPU it is slower for prompts and batches.
        quantize: Quantise the weights on loading: int8 takes a quarter of float32, int4 an eighth;
            python -m parity.quality measures the loss. By default as stored; a quantised model
            stays as it is.
        speculate: Speculative decoding by prompt lookup, without a draft model: the same text,
            sooner where it repeats itself. By default off.
        draft: Tokens that --speculate guesses per step.
        mesh: Devices that share the work, such as tp=8 or fsdp=2,tp=4: the model's heads and
            feed-forward are split over tp, the rows of a batch over fsdp. By default one device.
    """

    folder: tyro.conf.Positional[Path]
    context: int = CONTEXT
    dtype: Literal["bfloat16", "float32"] | None = None
    quantize: Format | None = None
    speculate: bool = False
    draft: int = 7
    mesh: str | None = None

    def check(self) -> None:
        """Validates the flags before anything is loaded; raises `BadInput`."""
        if self.speculate and self.draft < 1:
            raise BadInput(f"--draft must be at least 1 token, not {self.draft}")

    @functools.cached_property
    def saved(self) -> SavedModel:
        """The model, opened and not loaded; raises `BadInput` if there is none."""
        return SavedModel.open(self.folder)

    @property
    def n_drafted(self) -> int:
        """Tokens that prompt lookup guesses per step; 0 without --speculate."""
        return self.draft if self.speculate else 0

    def load(self, batch: int | None = None, on_read: OnRead | None = None) -> Generator:
        """Loads the model, and compiles for a batch meanwhile if one is given.

        Raises:
            BadInput: the folder holds no usable model; see `Generator.from_checkpoint`.
        """
        return Generator.from_checkpoint(
            self.saved,
            context=self.context,
            dtype=self.dtype,
            quantize=self.quantize,
            batch=batch,
            draft=self.n_drafted,
            on_read=on_read,
            mesh=self.mesh,
        )


@dataclasses.dataclass(frozen=True)
class GenerationOptions(ModelOptions):
    """The flags that `generate` and `chat` have in common.

    Attributes:
        max_tokens: Maximum new tokens of each sample or answer.
        temperature: Sampling temperature: logits are divided by it. 1 is the model's own
            distribution, less is safer, 0 is greedy decoding.
        top_k: Sample from the k likeliest tokens only; 0 is off.
        top_p: Nucleus sampling: sample from the likeliest tokens only, as many as it takes to
            pass this probability; 1 is off.
        min_p: Sample only from tokens at least this fraction as likely as the likeliest; 0 is off.
        seed: Random seed of sampling: the same seed and prompts give the same text.
        stop: Stop text: a sample or answer ends before it, even if it starts within a token;
            repeatable. By default only EOS and --max-tokens end one.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()

    def check(self) -> None:
        """Validates the flags before anything is loaded; raises `BadInput`."""
        super().check()
        stop_texts(self.stop)

    @property
    def sampling(self) -> Sampling:
        """How to choose each token; raises `BadInput` for a number that is out of range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.seed)
