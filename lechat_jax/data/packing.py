"""Sequence packing: documents in rows of one length by best-fit decreasing, shuffled per epoch."""

import bisect
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from lechat_jax.config import VisionConfig
from lechat_jax.data.images import DocumentImages
from lechat_jax.data.rows import Images, RowImages, Rows
from lechat_jax.errors import BadInput


class Documents(NamedTuple):
    """Concatenated documents as token ids, loss mask and offsets.

    Attributes:
        ids: token ids of all documents.
        counted: loss mask: True for ids that are trained on as targets.
        begins: start of each document, and at last the end of all.
        images: of each document the files or data URLs of its images; empty if none has any.
    """

    ids: Integer[np.ndarray, " ids"]
    counted: Bool[np.ndarray, " ids"]
    begins: Integer[np.ndarray, " begins"]
    images: Sequence[Sequence[str]] = ()

    @classmethod
    def of(cls, documents: Sequence[tuple[Sequence[int], Sequence[bool]]]) -> "Documents":
        """Concatenates documents, each given as ids and loss mask."""
        lengths = [len(ids) for ids, _ in documents]
        return cls(
            np.array([id_ for ids, _ in documents for id_ in ids], np.int32),
            np.array([one for _, counted in documents for one in counted], bool),
            np.cumsum([0, *lengths]),
        )

    @classmethod
    def of_stream(
        cls, stream: Integer[np.ndarray, " stream"], bos_id: int, block: int
    ) -> "Documents":
        """Splits a stream at BOS; longer documents are cut, each token a target in one piece.

        >>> Documents.of_stream(np.array([1, 5, 6, 7, 1, 8]), 1, block=2).ids.tolist()
        [1, 5, 6, 6, 7, 1, 8]
        """
        borders = [*np.flatnonzero(stream == bos_id).tolist(), len(stream)]
        pieces = [
            stream[start : min(start + block + 1, end)]
            for begin, end in itertools.pairwise(borders)
            for start in range(begin, end - 1, block)
        ]
        ids = np.concatenate([*pieces, stream[:0]])
        return cls(ids, np.ones(len(ids), bool), np.cumsum([0, *map(len, pieces)]))

    @property
    def lengths(self) -> Integer[np.ndarray, " documents"]:
        """Number of tokens of each document."""
        return np.diff(self.begins)


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing: the indices of the documents in each row.

    Longest first, each goes where it leaves the least room, so short ones fill the gaps.

    >>> best_fit([5, 3, 7, 2], room=8)
    [[2], [0, 1], [3]]
    """
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows by the room left in them
    left: list[int] = []  # how much room there is anywhere, sorted
    for document in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[document]
        place = bisect.bisect_left(left, length)
        if place == len(left):
            row, free = len(rows), room
            rows.append([])
        else:
            free = left[place]
            row = with_room[free].pop()
            if not with_room[free]:
                left.pop(place)
        rows[row].append(document)
        free -= length
        if not with_room[free]:
            bisect.insort(left, free)
        with_room[free].append(row)
    return rows


class Packed:
    """Packed batches: which documents share each row, as a pure function of (seed, step).

    The lengths alone decide the number of rows and which lengths share one, so all epochs have
    equally many rows. Each epoch shuffles documents of equal length and the order of rows; each
    document is in it once. There is no state, so a resumed run continues where it stopped.

    Attributes:
        windows: number of rows of an epoch.

    Raises:
        BadInput: a document does not fit into a row, or an argument is out of range.
    """

    def __init__(
        self,
        documents: Documents,
        block: int,
        batch: int,
        seed: int,
        together: bool = True,
        vision: VisionConfig | None = None,
    ) -> None:
        lengths = documents.lengths
        if block < 1 or batch < 1 or seed < 0 or not len(lengths):
            raise BadInput(
                f"block ({block}), batch ({batch}) and the number of documents ({len(lengths)}) "
                f"must be at least 1, seed ({seed}) at least 0"
            )
        if lengths.max() > block + 1:
            raise BadInput(
                f"a document has {lengths.max()} tokens and a block of {block} holds {block + 1}"
            )
        self.documents = documents
        self._images: DocumentImages | None = None
        if vision and any(documents.images):
            pairs = itertools.pairwise(documents.begins.tolist())
            ids = [documents.ids[a:b] for a, b in pairs]
            self._images, together = DocumentImages(documents.images, vision, ids), False
        self.block, self.batch, self.seed = block, batch, seed
        sizes = np.sort(lengths)[::-1].tolist()
        alone = [[place] for place in range(len(sizes))]
        self._rows = best_fit(sizes, block + 1) if together else alone
        self.windows = len(self._rows)
        self._epoch = functools.lru_cache(maxsize=2)(self._drawn)  # two at a border

    @property
    def padding(self) -> float:
        """Fraction of an epoch's tokens that are padding."""
        return 1 - len(self.documents.ids) / (self.windows * (self.block + 1))

    def rows(self, first_step: int, n_steps: int, part: slice = slice(None)) -> Rows:
        """The batches of consecutive steps, [n_steps, B, block + 1], or a part of their rows."""
        within = range(self.batch)[part]
        steps = range(first_step, first_step + n_steps)
        numbers = [step * self.batch + row for step in steps for row in within]
        rows = self._filled(numbers, (n_steps, len(within)))
        images = self.images_of(np.array(numbers))
        if images is None:
            return rows
        (patches, places), slots = images
        patches, places, slots = (
            x.reshape(n_steps, len(within), *x.shape[1:]) for x in (patches, places, slots)
        )
        return rows._replace(images=RowImages(Images(patches, places), slots))

    def described(self, rows: Rows) -> Rows:
        """`jax.ShapeDtypeStruct`s of a batch, those of its tokens given, with its images."""
        if self._images is None:
            return rows
        return rows._replace(images=self._images.described(rows.tokens))

    def images_of(self, numbers: Integer[np.ndarray, " rows"]) -> RowImages | None:
        """The images of rows, counted through all epochs; `None` if no document has any."""
        if self._images is None:
            return None
        tokens = self._filled(numbers.tolist(), (len(numbers),)).tokens
        return self._images.rows([self.sharing(n)[0] for n in numbers.tolist()], tokens)

    def one_epoch(self) -> Rows:
        """All rows of the first epoch's packing, [windows, block + 1]."""
        return self._filled(range(self.windows), (self.windows,))

    def sharing(self, number: int) -> list[int]:
        """Indices of the documents in a row; rows are counted through all epochs."""
        epoch, offset = divmod(number, self.windows)
        order, who = self._epoch(epoch)
        return [int(who[place]) for place in self._rows[order[offset]]]

    def _filled(self, numbers: Sequence[int], shape: tuple[int, ...]) -> Rows:
        tokens = np.zeros((len(numbers), self.block + 1), np.int32)
        counted = np.zeros(tokens.shape, bool)
        part = np.zeros(tokens.shape, np.int32)
        ids, learned, begins, _ = self.documents
        for row, number in enumerate(numbers):
            together = self.sharing(number)
            end = 0
            for i, document in enumerate(together):
                source = slice(begins[document], begins[document + 1])
                here = slice(end, end + source.stop - source.start)
                tokens[row, here], counted[row, here] = ids[source], learned[source]
                part[row, here] = i
                end = here.stop
            part[row, end:] = len(together)
        whole = (*shape, self.block + 1)
        return Rows(tokens.reshape(whole), counted.reshape(whole), part.reshape(whole))

    def _drawn(
        self, epoch: int
    ) -> tuple[Integer[np.ndarray, " windows"], Integer[np.ndarray, " documents"]]:
        """Shuffles an epoch: the order of its rows, and its documents, longest first."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.windows)
        mixed = rng.permutation(len(self.documents.lengths))
        return order, mixed[np.argsort(-self.documents.lengths[mixed], kind="stable")]
