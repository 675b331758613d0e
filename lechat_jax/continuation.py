"""What comes out of generation, row by row: ids, text, and why there is no more."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal

from lechat_jax.errors import BadInput
from lechat_jax.tokenizer import StreamDecoder, Tokenizer

Stopped = Literal["eos", "length", "context"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was generated for one prompt, or the next piece of it.

    Attributes:
        ids: the new tokens, an EOS that ended the text included.
        logprobs: nats that the model itself gave each, at temperature 1 and unfiltered.
        text: of the new tokens, as it continues the prompt's; empty without a tokenizer.
        stopped: why nothing follows: the model ended the text, there are `max_tokens`, or
            the context of a layer without a window is full. `None` when more is to come.
    """

    ids: list[int]
    logprobs: list[float]
    text: str
    stopped: Stopped | None


def join(pieces: Sequence[Sample]) -> Sample:
    """The sample that these pieces are of, in order."""
    return Sample(
        ids=[id_ for piece in pieces for id_ in piece.ids],
        logprobs=[logprob for piece in pieces for logprob in piece.logprobs],
        text="".join(piece.text for piece in pieces),
        stopped=pieces[-1].stopped,
    )


class Continuation:
    """How far one prompt of a batch has been continued.

    Attributes:
        limit: most new tokens: `max_tokens`, or fewer where `room` (`None`: endless) is.
        stopped: why there is no more to come, if so.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        room: int | None,
        eos_ids: Collection[int],
        tokenizer: Tokenizer | None,
    ) -> None:
        self.limit = max_tokens if room is None else min(max_tokens, room)
        self.stopped: Stopped | None = None
        self._at_limit: Stopped = "length" if self.limit == max_tokens else "context"
        self._eos_ids = eos_ids
        self._decoder = StreamDecoder(tokenizer, prompt) if tokenizer else None
        self._produced = 0
        self._note([])

    def take(self, ids: list[int], logprobs: list[float]) -> Sample:
        """The next piece, made of the tokens that a call of `decode` produced for the row.

        Raises:
            BadInput: the model computes no finite numbers.
        """
        if not all(map(math.isfinite, logprobs)):
            raise BadInput("the model's logits are not finite numbers; its weights are broken")
        self._note(ids)
        text = self._decoder.push(ids) if self._decoder else ""
        if self._decoder and self.stopped:
            text += self._decoder.flush()
        return Sample(ids, logprobs, text, self.stopped)

    def _note(self, ids: list[int]) -> None:
        self._produced += len(ids)
        if ids and ids[-1] in self._eos_ids:
            self.stopped = "eos"
        elif self._produced == self.limit and not self.stopped:
            self.stopped = self._at_limit
