"""Samples of a model in training: continuations of its prompts, printed and stored."""

from lechat_jax.checkpoint.load import free_bytes
from lechat_jax.checkpoint.weights import weights_bytes
from lechat_jax.devices.mesh import on_one_device
from lechat_jax.devices.platform import platform
from lechat_jax.devices.processes import from_first, is_first
from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.loaded_model import CONTEXT
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import Weights, bind
from lechat_jax.tokenizer.vocabulary import ends
from lechat_jax.train.training_run import Job

SHOWN = 500  # characters of a prompt that are printed; all of it is in the file
# Too little memory, a full disk, a prompt that is no text: of JAX, the system and lechat.
FAILURES = (BadInput, OSError, MemoryError, RuntimeError, ValueError)


class Samples:
    """Sampling during a run, from every prompt.

    Attributes:
        longest: tokens of a prompt that are read; of a longer one the last.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.shape = job.options.shape(platform())
        self.longest = max(CONTEXT, self.shape.block)

    def take(self, step: int, weights: Weights) -> None:
        """Samples from every prompt, prints the texts and stores them in the run's folder.

        Of a mesh the first device alone continues them, if the whole model fits into its
        memory beside its part of the training state. Every process has to call it. What fails in
        it is said and ends nothing: no sample is worth a run.
        """
        try:
            gathered = self._on_one_device(weights)
            if gathered is not None and is_first():
                self._continue(step, gathered)
        except FAILURES as error:
            reason = (str(error) or type(error).__name__).partition("\n")[0]
            self.job.display.say(f"no sample at step {step}: {reason}", style="yellow")

    def _continue(self, step: int, weights: Weights) -> None:
        prompts = self._prompts(step)
        if not prompts:
            return
        options = self.job.options
        longest = max(map(len, prompts.values()))
        context = longest + min(options.max_tokens, self.longest)
        generator = Generator(
            bind(self.job.config, weights),
            self.job.tokenizer,
            context=context,
            eos_ids=ends(self.job.run.folder),
        )
        sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
        images = [self.job.dataset.images_with(prompt) for prompt in prompts]
        samples = generator.generate(
            [*prompts.values()], options.max_tokens, sampling, images=images
        )
        texts = [p + s.text for p, s in zip(prompts, samples, strict=True)]
        self.job.run.write(f"samples/step-{step:06}.txt", "\n\n---\n\n".join(texts) + "\n")
        for prompt, sample in zip(prompts, samples, strict=True):
            shown = prompt if len(prompt) <= SHOWN else f"\u2026{prompt[-SHOWN:]}"
            self.job.display.say(f"--- sample at step {step} ---", style="dim")
            self.job.display.say(f"[{shown}]{sample.text}\n")

    def _prompts(self, step: int) -> dict[str, list[int]]:
        """Encodes the prompts; one that is left out or cut is reported."""
        found: dict[str, list[int]] = {}
        for prompt in (self.job.dataset.opening, *self.job.options.prompt):
            try:
                ids = self.job.dataset.prompt_ids(prompt)
            except FAILURES as error:
                self.job.display.say(f"no sample at step {step} of {prompt[:40]!r}: {error}")
                continue
            if len(ids) > self.longest:
                self.job.display.say(
                    f"the prompt of {len(ids):,} tokens is cut to BOS and its last "
                    f"{self.longest - 1:,} for the sample at step {step}"
                )
                ids = [ids[0], *ids[1 - self.longest :]]
            found[prompt] = ids
        return found

    def _on_one_device(self, weights: Weights) -> Weights | None:
        """Copies the weights to one device; `None`, with a message, where they do not fit."""
        if self.job.mesh is None:
            return weights
        dtype = self.shape.dtype
        needed = weights_bytes(self.job.config, dtype)
        first = next(iter(weights.values()))
        free = from_first(lambda: free_bytes(first.addressable_data(0)))
        if free is None or needed <= free:
            return on_one_device(self.job.mesh, weights, dtype)
        self.job.display.say(
            f"no sample: the model takes {needed / 1e9:.2f} GB in {dtype} and a device has "
            f"{free / 1e9:.2f} GB left"
        )
        return None
