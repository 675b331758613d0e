"""What a model that is being trained writes: its prompts continued, printed and kept."""

import jax
from jax.sharding import Mesh

from lechat_jax.checkpoint.load import free_bytes
from lechat_jax.checkpoint.run import Run
from lechat_jax.checkpoint.weights import weights_bytes
from lechat_jax.cli.display import Display
from lechat_jax.config import MistralConfig
from lechat_jax.data.dataset import Lessons
from lechat_jax.devices.mesh import on_one_device
from lechat_jax.devices.processes import from_first, is_first
from lechat_jax.errors import BadInput
from lechat_jax.generate.generator import Generator
from lechat_jax.generate.loaded_model import CONTEXT
from lechat_jax.generate.sampling import Sampling
from lechat_jax.model.binding import Weights, bind
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.vocabulary import ends
from lechat_jax.train.options import TrainConfig

SHOWN = 500  # characters of a prompt that are printed; all of it is in the file
# Too little memory, a full disk, a prompt that is no text: of JAX, the system and lechat.
FAILURES = (BadInput, OSError, MemoryError, RuntimeError, ValueError)


class Samples:
    """The samples of a run, each of every prompt.

    Attributes:
        longest: tokens of a prompt that are read; of a longer one the last.

    Args:
        mesh: what the weights are on.
        dtype: that they are sampled in, if they are on a mesh.
    """

    def __init__(
        self,
        run: Run,
        config: MistralConfig,
        options: TrainConfig,
        lessons: Lessons,
        tokenizer: Tokenizer,
        display: Display,
        mesh: Mesh | None,
        dtype: str,
    ) -> None:
        self.run, self.config, self.options = run, config, options
        self.lessons, self.tokenizer, self.display = lessons, tokenizer, display
        self.mesh, self.dtype = mesh, dtype
        self.longest = max(CONTEXT, options.shape(jax.default_backend()).block)

    def take(self, step: int, weights: Weights) -> None:
        """Continues every prompt, prints the texts and keeps them in the run's folder.

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
            self.display.say(f"no sample at step {step}: {reason}", style="yellow")

    def _continue(self, step: int, weights: Weights) -> None:
        prompts = self._prompts(step)
        if not prompts:
            return
        options = self.options
        longest = max(map(len, prompts.values()))
        context = longest + min(options.max_tokens, self.longest)
        generator = Generator(
            bind(self.config, weights),
            self.tokenizer,
            context=context,
            eos_ids=ends(self.run.folder),
        )
        sampling = Sampling(temperature=options.temperature, top_p=options.top_p, seed=options.seed)
        samples = generator.generate([*prompts.values()], options.max_tokens, sampling)
        texts = [p + s.text for p, s in zip(prompts, samples, strict=True)]
        self.run.write(f"samples/step-{step:06}.txt", "\n\n---\n\n".join(texts) + "\n")
        for prompt, sample in zip(prompts, samples, strict=True):
            shown = prompt if len(prompt) <= SHOWN else f"\u2026{prompt[-SHOWN:]}"
            self.display.say(f"--- sample at step {step} ---", style="dim")
            self.display.say(f"[{shown}]{sample.text}\n")

    def _prompts(self, step: int) -> dict[str, list[int]]:
        """The ids of every prompt that can be continued; what cannot, or is cut, is said."""
        found: dict[str, list[int]] = {}
        for prompt in (self.lessons.opening, *self.options.prompt):
            try:
                ids = self.lessons.asked(prompt)
            except FAILURES as error:
                self.display.say(f"no sample at step {step} of {prompt[:40]!r}: {error}")
                continue
            if len(ids) > self.longest:
                self.display.say(
                    f"the prompt of {len(ids):,} tokens is cut to BOS and its last "
                    f"{self.longest - 1:,} for the sample at step {step}"
                )
                ids = [ids[0], *ids[1 - self.longest :]]
            found[prompt] = ids
        return found

    def _on_one_device(self, weights: Weights) -> Weights | None:
        """The weights to sample from; where they do not fit, none, and it is said."""
        if self.mesh is None:
            return weights
        needed = weights_bytes(self.config, self.dtype)
        first = next(iter(weights.values()))
        free = from_first(lambda: free_bytes(first.addressable_data(0)))
        if free is None or needed <= free:
            return on_one_device(self.mesh, weights, self.dtype)
        self.display.say(
            f"no sample: the model takes {needed / 1e9:.2f} GB in {self.dtype} and a device has "
            f"{free / 1e9:.2f} GB left"
        )
        return None
