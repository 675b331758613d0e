"""GPTQ, AWQ and compressed-tensors: weights of four or eight bits, in groups, packed into words.

All stand for w = (q - zero) * scale, with a scale and a zero for each output and group of features,
and pack whole numbers q into words of 32 bits; they differ in which of those lie in a word.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32, Shaped, UInt8

from lechat_jax.config.layout import ORDER, SCALE, ZERO
from lechat_jax.errors import BadInput
from lechat_jax.formats.quantized.fp8 import WEIGHT, float_type
from lechat_jax.formats.stores import Store, Stored
from lechat_jax.quantize.int4 import pack
from lechat_jax.quantize.int8 import pieces
from lechat_jax.quantize.scheme import LEAST_GROUP, Form

Words = Int32[np.ndarray, "rows columns"]
# Where in a word of AWQ's its eight outputs are.
AWQ = (0, 4, 1, 5, 2, 6, 3, 7)


class Grouped(NamedTuple):
    """A kernel of F outputs and D features.

    Attributes:
        q: its whole numbers.
        scale: of each output and group.
        zero: the q that stands for nought, likewise.
        group: that each feature belongs to.
    """

    q: UInt8[np.ndarray, "F D"]
    scale: Float32[np.ndarray, "F groups"]
    zero: Int32[np.ndarray, "F groups"]
    group: Int[np.ndarray, " D"]

    def numbers(self) -> Float32[np.ndarray, "F D"]:
        """What it stands for."""
        out = np.empty(self.q.shape, np.float32)
        for rows in pieces(out):
            shifted = self.q[rows] - self.zero[rows][:, self.group]
            np.multiply(shifted, self.scale[rows][:, self.group], out=out[rows], casting="unsafe")
        return out

    @property
    def order(self) -> Int[np.ndarray, " D"]:
        """The features group by group, in their own order within each."""
        return np.argsort(self.group, kind="stable")

    def in_int4(self, form: Form, where: object) -> dict[str, Shaped[np.ndarray, "..."]]:
        """The parts of the same kernel in that form, by what is behind its name.

        Raises:
            BadInput: its groups are not of equal size; `where` is named.
        """
        order = self.order
        groups = self.group[order].reshape(-1, form.group)
        if (groups != groups[:, :1]).any():
            raise BadInput(
                f"{where} has groups that are not of {form.group} features each; make it anew, or "
                "say --dequantize"
            )
        q = self.q[:, order] if form.is_ordered else self.q
        found = {
            "": pack(q),
            SCALE: self.scale[:, groups[:, 0]],
            ZERO: self.zero[:, groups[:, 0]].astype(np.uint8),
        }
        return found | ({ORDER: order.astype(np.int32)} if form.is_ordered else {})

    def in_int8(self, where: object) -> dict[str, Shaped[np.ndarray, "..."]]:
        """Likewise, in int8, of a kernel whose outputs have one group each.

        Raises:
            BadInput: nought is not 128, half way; `where` is named.
        """
        if (self.zero != 128).any():
            raise BadInput(
                f"{where} is int8 with zeros, which lechat's int8 has not; say --dequantize, or "
                "--quantize int8 to round it again"
            )
        return {"": (self.q ^ 128).view(np.int8), SCALE: self.scale[:, 0]}


# From a store, the beginning of a kernel's keys, its bits and the features of a group.
Reader = Callable[[Store, str, int, int | None], Grouped]


class Layout(NamedTuple):
    """One of the ways to pack.

    Attributes:
        words: the end of the key of the numbers.
        shape: outputs and features, from the shape of that and the numbers of a word.
        read: the kernel.
        others: the ends of the keys of what else a kernel has, its scales first.
    """

    words: str
    shape: Callable[[tuple[int, ...], int], tuple[int, int]]
    read: Reader
    others: tuple[str, ...]


def packed_store(store: Store, layout: Layout, bits: int, size: int | None) -> Store:
    """Unpacks the kernels as they are read: float32, or the parts of lechat's int4 and int8.

    Args:
        store: of the files.
        layout: how the words are packed.
        bits: of a number: 4 or 8.
        size: features of a group; `None` for one group an output.

    Raises:
        BadInput: a kernel lacks a part or has one of another shape, or a bias.
    """
    stems = [key.removesuffix(layout.words) for key in store.tensors if key.endswith(layout.words)]
    if not stems:
        raise BadInput(
            f"there is no key that ends with {layout.words}, though the config says that the "
            "weights are packed; download the model again"
        )
    shapes = {stem: _checked(store, stem, layout, bits, size) for stem in stems}
    form = _form(store, shapes, bits, size)
    dtype = float_type(store)
    made: dict[str, Stored] = {}
    for stem in stems:
        read = functools.partial(layout.read, store, stem, bits, size)
        where = store.tensors[stem + layout.words].where
        parts = None if form is None else functools.partial(_parts, read, form, where)
        made[stem + layout.words] = Stored(
            dtype, shapes[stem], where, lambda read=read: read().numbers(), parts
        )
    used = {stem + suffix for stem in stems for suffix in layout.others}
    tensors = {
        key.removesuffix(layout.words) + WEIGHT if key in made else key: made.get(key, one)
        for key, one in store.tensors.items()
        if key not in used
    }
    return dataclasses.replace(store, tensors=tensors, form=form)


def _parts(
    read: Callable[[], Grouped], form: Form, where: str
) -> Mapping[str, Shaped[np.ndarray, "..."]]:
    return read().in_int4(form, where) if form.format == "int4" else read().in_int8(where)


def _form(
    store: Store, shapes: Mapping[str, tuple[int, int]], bits: int, size: int | None
) -> Form | None:
    """Lechat's form of such kernels; `None` if it has none, so that only their numbers are left.

    Its groups may be smaller, with scales that are repeated, where widths are no multiple.
    """
    if bits == 8:
        return Form("int8", has_int8_embeddings=False) if size is None else None
    widths = [D for _, D in shapes.values()]
    group = math.gcd(*widths, *([size] if size else []))
    if group < LEAST_GROUP or group % 2:
        return None
    is_ordered = any(
        (np.diff(store.tensors[stem + key].read()) < 0).any()
        for stem in shapes
        for key in (".g_idx", ".weight_g_idx")
        if stem + key in store.tensors
    )
    return Form("int4", group, is_ordered, has_int8_embeddings=False)


def _checked(
    store: Store, stem: str, layout: Layout, bits: int, size: int | None
) -> tuple[int, int]:
    """Outputs and features of a kernel, all of whose parts are there."""
    words = store.tensors[stem + layout.words]
    if words.dtype != np.int32 or len(words.shape) != 2:
        raise BadInput(f"{words.where} is no matrix of int32; download the model again")
    F, D = layout.shape(words.shape, 32 // bits)
    groups = 1 if size is None else -(-D // size)
    scale = store.tensors.get(stem + layout.others[0])
    if scale is None or sorted(scale.shape) != sorted((F, groups)):
        raise BadInput(
            f"{words.where} has no {layout.others[0]} for {F} outputs and {groups} groups beside "
            "it; download the model again"
        )
    bias = store.tensors.get(f"{stem}.bias")
    if bias is not None and bias.read().any():
        raise BadInput(f"{bias.where} is not zero, and lechat's maps have no bias")
    return F, D


def unpacked_words(words: Words, bits: int) -> UInt8[np.ndarray, "rows numbers"]:
    """The numbers of each row, the first of a word in its lowest bits.

    >>> unpacked_words(np.array([[0x76543210]], np.int32), 4).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    whole = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return whole
    return np.stack([whole & 15, whole >> 4], axis=-1).reshape(len(whole), -1)


def _of_array(store: Store, key: str) -> Shaped[np.ndarray, "..."]:
    if key not in store.tensors:
        raise BadInput(f"{key} is missing beside other parts of its kernel; download it again")
    return store.tensors[key].read()


def _groups(store: Store, key: str, D: int, groups: int, size: int | None) -> Int[np.ndarray, " D"]:
    """The group of each feature: as the files say it, or one after the other."""
    if key not in store.tensors:
        return np.arange(D) // (size or D)
    found = store.tensors[key].read()
    if found.shape != (D,) or found.min() < 0 or found.max() >= groups:
        raise BadInput(
            f"{store.tensors[key].where} does not name one of {groups} groups for each of "
            f"{D} features; download the model again"
        )
    return found


def _gptq(offset: int, store: Store, stem: str, bits: int, size: int | None) -> Grouped:
    """Words hold features; in the first version of the format zeros are one less than they are."""
    q = unpacked_words(_of_array(store, f"{stem}.qweight").T, bits)
    scale = _of_array(store, f"{stem}.scales")
    zero = unpacked_words(_of_array(store, f"{stem}.qzeros"), bits).astype(np.int32)
    zero = (zero[:, : scale.shape[1]] + offset) & (2**bits - 1)
    group = _groups(store, f"{stem}.g_idx", q.shape[1], len(scale), size)
    return Grouped(q, scale.T.astype(np.float32), zero.T, group)


def _awq(store: Store, stem: str, bits: int, size: int | None) -> Grouped:
    """Words hold outputs."""

    def outputs(key: str) -> UInt8[np.ndarray, "rows F"]:
        numbers = unpacked_words(_of_array(store, stem + key), bits)
        return numbers.reshape(len(numbers), -1, 8)[..., AWQ].reshape(len(numbers), -1)

    q, zero = outputs(".qweight").T, outputs(".qzeros").T.astype(np.int32)
    scale = _of_array(store, f"{stem}.scales").T.astype(np.float32)
    return Grouped(
        np.ascontiguousarray(q), scale, zero, np.arange(q.shape[1]) // (size or q.shape[1])
    )


def _compressed(store: Store, stem: str, bits: int, size: int | None) -> Grouped:
    """Words hold features, as lechat's bytes do, and signed numbers, half their range added."""
    q = unpacked_words(_of_array(store, f"{stem}.weight_packed"), bits)
    scale = _of_array(store, f"{stem}.weight_scale").reshape(len(q), -1).astype(np.float32)
    zero = np.full(scale.shape, 2 ** (bits - 1), np.int32)
    if f"{stem}.weight_zero_point" in store.tensors:
        found = unpacked_words(_of_array(store, f"{stem}.weight_zero_point").T, bits)
        zero = found[:, : len(q)].T.astype(np.int32)
    group = _groups(store, f"{stem}.weight_g_idx", q.shape[1], scale.shape[1], size)
    return Grouped(q, scale, zero, group)


def _features_first(shape: tuple[int, ...], n: int) -> tuple[int, int]:
    return shape[1], shape[0] * n


GPTQ_PARTS = (".scales", ".qzeros", ".g_idx", ".bias")
LAYOUTS: dict[str, Layout] = {
    "gptq": Layout(".qweight", _features_first, functools.partial(_gptq, 1), GPTQ_PARTS),
    "gptq_v2": Layout(".qweight", _features_first, functools.partial(_gptq, 0), GPTQ_PARTS),
    "awq": Layout(".qweight", lambda shape, n: (shape[1] * n, shape[0]), _awq, GPTQ_PARTS),
    "compressed-tensors": Layout(
        ".weight_packed",
        lambda shape, n: (shape[0], shape[1] * n),
        _compressed,
        (".weight_scale", ".weight_zero_point", ".weight_g_idx", ".weight_shape", ".bias"),
    ),
}
