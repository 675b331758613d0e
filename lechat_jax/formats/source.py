"""An open checkpoint of any format: its config and files, and tensors that are read one by one."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from lechat_jax.config import MistralConfig
from lechat_jax.config.layout import is_vision
from lechat_jax.errors import BadInput
from lechat_jax.formats.layouts import from_format
from lechat_jax.formats.names import Format, parts, rows, shapes
from lechat_jax.formats.stores import Store, Stored, text_alone
from lechat_jax.quantize.scheme import Form, in_parts

SourceFormat = Literal["hf", "mistral", "lechat", "torch", "gguf", "run"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint whose tensors are all there and fit its config; none has been read.

    Attributes:
        format: what it is.
        path: its folder, or of GGUF the file.
        config: the model.
        tokenizer_files: those beside the weights, all of them.
        metadata: where it came from, as text that a copy may carry along.
        stored: the tensors in the order in which they are best read, by lechat's name, or where
            each expert has its own by that of the part; see `names`.
        store: gives back memory.
        quantization: how they are on the disk, if not as the numbers that they are read as.
        taught_to_chat: whether it is a run that was trained on conversations.
        control_ids: `bos_token_id` and `eos_token_id`, one or a list, where its files say them.
    """

    format: SourceFormat
    path: Path
    config: MistralConfig
    tokenizer_files: tuple[Path, ...]
    metadata: Mapping[str, str]
    stored: Mapping[str, Stored]
    store: Store
    quantization: str | None = None
    control_ids: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    taught_to_chat: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Lechat's name of each weight, in the order in which they are best read."""
        table = rows(self.config)
        whole = (table[name].lechat if name in table else name for name in self.stored)
        return tuple(dict.fromkeys(whole))

    @property
    def text(self) -> "Source":
        """The decoder alone, without a vision tower; a note says what is left out."""
        text = {name: one for name, one in self.stored.items() if not is_vision(name)}
        if not (n_left_out := len(self.stored) - len(text)):
            return self
        store = dataclasses.replace(self.store, notes=(*self.store.notes, text_alone(n_left_out)))
        return dataclasses.replace(self, config=self.config.text, stored=text, store=store)

    @property
    def dtype(self) -> np.dtype:
        """The dtype of all weights.

        Raises:
            BadInput: they have several.
        """
        dtypes = {stored.dtype: stored for stored in self.stored.values()}
        if len(dtypes) > 1:
            a, b = list(dtypes.values())[:2]
            raise BadInput(
                f"{a.where} is {a.dtype} and {b.where} is {b.dtype}; make them one with --dtype, "
                f"such as --dtype {max(a.dtype, b.dtype, key=lambda x: x.itemsize)}, of "
                "parity.convert"
            )
        return next(iter(dtypes))

    def read(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A weight, or an expert's part of one, in lechat's shape.

        A view of its file, unless its rows change their order, or it has to be put together of
        what each expert has.
        """
        row = rows(self.config).get(name)
        if row is None and name not in self.stored:  # all experts', of which each has its own
            first, *others = parts(self.config)[name]
            array = self._part(first)
            whole = np.empty((1 + len(others), *array.shape), array.dtype)
            whole[0] = array
            for e, part in enumerate(others, 1):  # one in memory beside them, where it is made
                whole[e] = self._part(part)
            return whole
        return self.stored[name].read() if row is None else self._part(name)

    def _part(self, name: str) -> Shaped[np.ndarray, "..."]:
        row, array = rows(self.config)[name], self.stored_of(name).read()
        array = array if name in self.stored else array[row.expert]
        return from_format(array, self.config, format_of(self.format), row)

    def stored_of(self, name: str) -> Stored:
        """The tensor that a weight or a part of one lies in, or the first of several."""
        if name in self.stored:
            return self.stored[name]
        row = rows(self.config).get(name)
        return self.stored[row.lechat if row else parts(self.config)[name][0]]

    def stored_parts(self, name: str, form: Form) -> dict[str, Shaped[np.ndarray, "..."]] | None:
        """The parts of a kernel that is stored in that form, by name and in lechat's shapes.

        Those of a layer's experts are put together.
        """
        of_each = [self.stored_of(part).parts for part in parts(self.config)[name]]
        found = [read() for read in of_each if read is not None]
        if len(found) < len(of_each):
            return None
        wanted = form.parts(name, shapes(self.config, "lechat")[name])
        return {
            key: np.stack([one[key.removeprefix(name)] for one in found]).reshape(its_shape)
            for key, (_, its_shape) in wanted.items()
        }

    def parts_of(self, name: str, form: Form) -> dict[str, Shaped[np.ndarray, "..."]]:
        """The parts of a quantised kernel: those that are stored, or what rounding makes of it."""
        stored = self.stored_parts(name, form) if form is self.store.form else None
        return stored or in_parts(form, name, self.read(name), self.where(name))

    @property
    def in_lechats_form(self) -> Store:
        """The tensors by lechat's names and in its shapes; of a quantised kernel, its parts.

        The parts of a kernel are read together, and kept until the next one is.
        """
        form, sizes = self.store.form, shapes(self.config, "lechat")
        read_parts = functools.lru_cache(1)(self.parts_of)
        tensors: dict[str, Stored] = {}
        for name in self.names:
            where = self.where(name)
            parts = form.parts(name, sizes[name]) if form else {}
            for key, (dtype, shape) in parts.items():

                def read(name: str = name, key: str = key) -> Shaped[np.ndarray, "..."]:
                    return read_parts(name, form)[key]

                tensors[key] = Stored(dtype, shape, where, read)
            if not parts:
                dtype, read_it = self.stored_of(name).dtype, functools.partial(self.read, name)
                tensors[name] = Stored(dtype, sizes[name], where, read_it)
        return dataclasses.replace(self.store, tensors=tensors)

    def where(self, name: str) -> str:
        """The key and the file of a weight, for messages."""
        return self.stored_of(name).where

    def release(self) -> None:
        """Gives back the memory of the files that were read so far."""
        self.store.release()


def format_of(kind: SourceFormat) -> Format:
    """The format whose names and shapes a kind of checkpoint has; a training run has lechat's."""
    return "lechat" if kind == "run" else kind
