"""A model's weights on the disk, in any format, by lechat's names; opened, and not yet read."""

import dataclasses
import hashlib
from pathlib import Path

from lechat_jax.config import MistralConfig
from lechat_jax.errors import BadInput
from lechat_jax.files.checksums import MANIFEST, digests
from lechat_jax.formats.folder import fault_of, kind_of, read_config
from lechat_jax.formats.open_model import open_model
from lechat_jax.formats.stores import Store, safetensors_store
from lechat_jax.quantize.scheme import Form
from lechat_jax.tokenizer.vocabulary import ends


@dataclasses.dataclass(frozen=True)
class StoredWeights:
    """A folder of lechat's, Hugging Face's or Mistral's, or a GGUF file.

    Attributes:
        path: the folder or file.
        config: config of the model.
        form: quantization scheme on disk, of lechat's own; `None` for floats, and for quantised
            weights that are read as the numbers they stand for.
        store: the tensors, views of their files where the format permits.
        tokenizer_folder: folder with the tokenizer's files, if there are any.
        eos_ids: EOS ids that the files name, beyond the tokenizer's own.
        is_lechats: whether it is in lechat's format, with a manifest of checksums.
    """

    path: Path
    config: MistralConfig
    form: Form | None
    store: Store
    tokenizer_folder: Path
    eos_ids: frozenset[int]
    is_lechats: bool

    @classmethod
    def open(cls, path: Path) -> "StoredWeights":
        """Opens weights of any format, and reads what is no tensor.

        Raises:
            BadInput: there are none, or config and tensors do not fit, or nothing here computes
                such a model.
        """
        if kind_of(path) == "lechat":
            config, form = read_config(path)
            store = safetensors_store(path, "model")
            return cls(path, config, form, store, path, frozenset(ends(path)), True)
        source = open_model(path)
        eos = source.control_ids.get("eos_token_id", [])
        return cls(
            path,
            source.config,
            source.store.form,
            source.in_lechats_form,
            source.tokenizer_files[0].parent if source.tokenizer_files else path,
            frozenset(eos if isinstance(eos, list) else [eos]),
            False,
        )

    def fault(self) -> str | None:
        """Verifies the files that have checksums: the first damage or `None`."""
        return fault_of(self.path) if self.is_lechats else None

    def sha256(self) -> str:
        """SHA-256 of the checksums of all weights, and of the config; of lechat's, its manifest.

        Raises:
            BadInput: a file cannot be read.
        """
        try:
            if self.is_lechats:
                return hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest()
            files = digests(self.path.parent, [str(path.absolute()) for path in self.store.files])
        except OSError as error:
            raise BadInput(f"{error.filename} cannot be read: {error.strerror}") from error
        known = [self.config.to_dict(), str(self.form), sorted(files.values())]
        return hashlib.sha256(repr(known).encode()).hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are read."""
        return sum(tensor.nbytes for tensor in self.store.tensors.values())
