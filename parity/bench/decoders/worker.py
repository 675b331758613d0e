"""One process that decodes alone: reads a job on stdin, tells its peak memory as JSON."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lechat_jax.generate.generator import Generator
from parity.bench.decoders.contestants import torch_decoders
from parity.bench.decoders.lechat import Decoder, Lechat
from parity.measure import PeakMemory

Load = Callable[[], Decoder]


def main() -> None:
    """Loads the weights and decodes as the job on stdin says."""
    job = json.load(sys.stdin)
    load = ready(job["impl"], Path(job["folder"]), job["dtype"], len(job["prompts"]))
    with PeakMemory() as memory:
        decoder = load()
        decoder.start(job["prompts"], job["tokens"], job["skip"])
        decoder.advance(job["tokens"])
    print(json.dumps({"peak_bytes": decoder.device_bytes() or memory.bytes}))


def ready(impl: str, folder: Path, dtype: str, batch: int) -> Load:
    """What loads the weights for so many rows, its framework having been imported and started."""
    if impl == "lechat_jax":
        jax.block_until_ready(jnp.ones(8) @ jnp.ones(8))

        def load_lechat() -> Decoder:
            made = Generator.from_checkpoint(folder, dtype=dtype, batch=batch)
            return Lechat(made.config, made.weights)

        return load_lechat
    torch: Any = torch_decoders()
    torch.start()
    kinds: dict[str, Any] = {"lechat_torch": torch.LechatTorch, "transformers": torch.Transformers}
    return lambda: kinds[impl].load(folder, dtype)


if __name__ == "__main__":
    main()
