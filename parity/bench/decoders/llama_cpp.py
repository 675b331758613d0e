"""Greedy decoding by llama.cpp, through npm's package node-llama-cpp and its prebuilt binary."""

import contextlib
import io
import json
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path

from lechat_jax.checkpoint.weights import save_weights
from lechat_jax.config import MistralConfig
from lechat_jax.data.parallel_encoding import cores
from lechat_jax.errors import BadInput
from lechat_jax.model.binding import Weights
from lechat_jax.tokenizer.tokenizer import Tokenizer
from parity.bench.decoders.lechat import DtypeName, Prompts
from parity.convert import command as convert

PACKAGES = ("node-llama-cpp", "@node-llama-cpp/linux-x64")
SCRIPT = Path(__file__).with_suffix(".mjs")
# What a GGUF stores for each of lechat's types; of int8 and int4 in blocks of 32 with a scale.
FORMS: dict[DtypeName, list[str]] = {
    "float32": ["--dtype", "float32"],
    "bfloat16": ["--dtype", "bfloat16"],
    "int8": ["--quantize", "q8_0"],
    "int4": ["--quantize", "q4_0"],
}


class LlamaCpp:
    """llama.cpp with a GGUF of the same weights, in a process of Node.js.

    Its keys and values are float16, as is usual there. A prompt is read from its beginning.

    Args:
        packages: folder in which npm has installed node-llama-cpp.
        gguf: the model's file.

    """

    note = "keys and values in float16"

    def __init__(self, packages: Path, gguf: Path) -> None:
        self.ids: list[list[int]] = []
        command = ["node", str(SCRIPT), str(packages.absolute()), str(gguf), str(cores())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        weakref.finalize(self, _end, self._process)
        self._answer()  # it has mapped the file, which may be deleted now

    @classmethod
    def around(
        cls, config: MistralConfig, weights: Weights, dtype: DtypeName, packages: Path
    ) -> "LlamaCpp":
        """A decoder of these weights, written as a GGUF in that type.

        Raises:
            BadInput: there is no Node.js or package, or GGUF has no such model, or one whose ids
                are not those of Mistral's tokenizer.
        """
        tokenizer = Tokenizer.mistral_v1()
        if tokenizer.vocab_size != config.vocab_size:
            raise BadInput(f"a GGUF needs a tokenizer, and none has {config.vocab_size} ids here")
        _check(packages)
        with tempfile.TemporaryDirectory(prefix="parity-") as folder:
            ours, gguf = Path(folder, "model"), Path(folder, "model.gguf")
            save_weights(ours, config, weights, tokenizer.path)
            silence = io.StringIO()
            with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
                convert.main([str(ours), str(gguf), "--to", "gguf", *FORMS[dtype]])
            return cls(packages, gguf)

    def start(self, prompts: Prompts, room: int, skip: int = 0) -> None:
        """See `Decoder.start`."""
        self.ids = self._ask({"prompts": [[*prompt] for prompt in prompts], "room": room})

    def advance(self, n: int) -> int:
        """See `Decoder.advance`."""
        for row, more in zip(self.ids, self._ask({"tokens": n}), strict=True):
            row += more
        return n

    def device_bytes(self) -> int | None:
        """See `Decoder.device_bytes`."""
        return None

    def _ask(self, what: dict[str, object]) -> list[list[int]]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> list[list[int]]:
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise BadInput(f"llama.cpp ended with code {self._process.wait()}; it says why above")
        return json.loads(line)


def _check(packages: Path) -> None:
    if shutil.which("node") is None:
        raise BadInput("llama.cpp runs in Node.js, and there is none; leave it out of --impl")
    if not (packages / "node_modules" / PACKAGES[0]).is_dir():
        raise BadInput(
            f"{packages} has no node_modules/{PACKAGES[0]}: npm install --prefix {packages} "
            f"--ignore-scripts --omit=optional {' '.join(PACKAGES)}, or name another folder "
            "with --packages"
        )


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends the process and closes its pipes."""
    process.kill()
    process.communicate()
