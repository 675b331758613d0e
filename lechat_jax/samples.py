"""What a model that is being trained writes: its prompts continued, printed and kept."""

from jax.sharding import Mesh

from lechat_jax.config import MistralConfig
from lechat_jax.display import Display
from lechat_jax.distributed import from_first, is_first
from lechat_jax.generator import Generator
from lechat_jax.lessons import Lessons
from lechat_jax.loading import free_bytes
from lechat_jax.model import Weights, bind
from lechat_jax.options import TrainConfig
from lechat_jax.run import Run
from lechat_jax.sampling import Sampling
from lechat_jax.sharding import on_one_device
from lechat_jax.tokenizer import Tokenizer
from lechat_jax.weights import weights_bytes


class Samples:
    """The samples of a run, each of every prompt.

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

    def take(self, step: int, weights: Weights) -> None:
        """Continues every prompt, prints the texts and keeps them in the run's folder.

        Of a mesh the first device alone continues them, if the whole model fits into its
        memory beside its part of the training state. Every process has to call it.
        """
        gathered = self._on_one_device(weights)
        if gathered is None or not is_first():
            return
        prompts = [self.lessons.opening, *self.options.prompt]
        generator = Generator(bind(self.config, gathered), self.tokenizer)
        samples = generator.generate(
            [self.lessons.asked(prompt) for prompt in prompts],
            max_tokens=self.options.max_tokens,
            sampling=Sampling(
                temperature=self.options.temperature,
                top_p=self.options.top_p,
                seed=self.options.seed,
            ),
        )
        texts = [p + s.text for p, s in zip(prompts, samples, strict=True)]
        self.run.write(f"samples/step-{step:06}.txt", "\n\n---\n\n".join(texts) + "\n")
        for prompt, whole in zip(prompts, texts, strict=True):
            self.display.say(f"--- sample at step {step} ---", style="dim")
            self.display.say(f"[{prompt}]{whole.removeprefix(prompt)}\n")

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
