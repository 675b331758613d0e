"""transformers' own Mistral as an oracle."""

import inspect
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import nn

from lechat_jax.config import MistralConfig
from lechat_jax.formats import names
from parity.check.oracles.interface import Arrays, Dtype, Implementation, Text, pieces
from parity.check.oracles.pytorch import Watched, to_numpy, torch_dtype
from parity.peers.transformers import drawn


class TransformersOracle(Watched[Any]):
    """transformers' own class for such a model, with its eager attention; see `Oracle`.

    Raises:
        BadInput: there is none.
    """

    name: Implementation = "transformers"
    layout: names.Format = "hf"

    def __init__(
        self, config: MistralConfig, weights: Arrays, dtype: Dtype, share: bool = False
    ) -> None:
        super().__init__(config, dtype, share)
        self.model = drawn(config)
        self.model.set_attn_implementation("eager")
        if config.n_experts:
            self.model.set_experts_implementation("eager")  # others have no float64
        self.model.generation_config.eos_token_id = None  # here no id ends a text
        cast(nn.Module, self.model).to(torch_dtype(dtype))
        self.load(weights)

    def logits(self, tokens: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        """See `Watched.logits`."""
        positions = first_position + torch.arange(tokens.shape[1], device=self.device)[None]
        seen = self._given(tokens)
        logits = self.model(input_ids=tokens, position_ids=positions, **seen).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def stations(self) -> dict[str, nn.Module]:
        """See `Watched.stations`."""
        text = "model.language_model" if self.config.vision else "model"
        return self._modules(
            f"{text}.layers.{{i}}",
            "self_attn",
            "input_layernorm",
            f"{text}.norm",
            "model.vision_tower.ln_pre",
            "model.vision_tower.transformer.layers.{i}",
            "model.multi_modal_projector",
        )

    def _given(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The images of all rows as transformers is given them, if the tokens have any."""
        if not self.has_images(tokens):
            return {}
        sizes = torch.tensor([picture.shape[1:] for picture in self.pictures])
        shape = (len(sizes), 3, *sizes.max(dim=0).values.tolist())
        pixels = torch.zeros(shape, dtype=torch_dtype(self.dtype))
        for row, picture in zip(pixels, self.pictures, strict=True):
            row[:, : picture.shape[1], : picture.shape[2]] = picture
        B = len(tokens)
        given = {"pixel_values": pixels.repeat(B, 1, 1, 1), "image_sizes": sizes.repeat(B, 1)}
        return {name: tensor.to(self.device) for name, tensor in given.items()}

    def cached(
        self, tokens: Int[np.ndarray, "B T"], prompt: int, chunk: int
    ) -> Float[np.ndarray, "B T V"]:
        """See `Oracle.cached`."""
        ids = self._tensor(tokens)
        # The argument was renamed in transformers 5.
        known = inspect.signature(self.model.forward).parameters
        cache = {
            "cache" if "cache" in known else "past_key_values": transformers.DynamicCache(
                config=self.model.config
            )
        }
        found = []
        with torch.no_grad():
            x = self.model.get_input_embeddings()(ids)
            if given := self._given(ids):
                features = torch.cat(self.model.get_image_features(**given).pooler_output)
                is_image = ids == self.model.config.image_token_id
                x = x.masked_scatter(is_image[..., None], features.to(x.dtype))
            for start, end in pieces(tokens.shape[1], prompt, chunk):
                out = self.model(
                    inputs_embeds=x[:, start:end],
                    position_ids=torch.arange(start, end, device=self.device)[None],
                    use_cache=True,
                    **cache,
                )
                found.append(to_numpy(out.logits))
        return np.concatenate(found, axis=1)

    def greedy(
        self, prompts: Sequence[Sequence[int]], n: int, chunk: int, context: int
    ) -> list[Text]:
        """See `Oracle.greedy`; its own `generate`, which reads each prompt in one piece."""
        longest = max(map(len, prompts))
        ids = np.array([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        real = np.array([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        model: Any = self.model  # whose type says that it cannot generate
        made = model.generate(
            self._tensor(ids),
            **self._given(self._tensor(ids)),
            attention_mask=self._tensor(real),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=n,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            ),
        )
        new = made.sequences[:, longest:].cpu()
        nats = torch.log_softmax(torch.stack(made.logits, dim=1).double().cpu(), dim=-1)
        chosen = nats.gather(2, new[..., None])[..., 0]
        return [Text(new[b].tolist(), chosen[b].tolist()) for b in range(len(prompts))]
