"""What comes out of generation, row by row: ids, text, and why there is no more."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import StreamDecoder, Tokenizer

Stopped = Literal["eos", "length", "stop", "context", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was generated for one prompt, or the next piece of it.

    Attributes:
        ids: the new tokens, an EOS that ended the text included. Of a text that was cut before a
            stop text those that begin before it; the last may go on into it.
        logprobs: nats that the model itself gave each, at temperature 1 and unfiltered.
        text: of the new tokens but for an EOS, as it continues the prompt's; empty without a
            tokenizer.
        stopped: why nothing follows: the model ended the text, there are `max_tokens`, a stop
            text came, the context of a layer without a window is full, or somebody interrupted
            it. `None` when more is to come.
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


class Certain(NamedTuple):
    """Tokens that can be handed out, and the text."""

    ids: list[int]
    logprobs: list[float]
    text: str


class UntilStop:
    """Tokens and their text up to a stop text, wherever the borders of the tokens are.

    What may be the beginning of a stop text is held back until it is known to be none. Of several
    stop texts that counts which is complete first.

    Attributes:
        found: whether a stop text came; nothing is handed out of what is behind.

    >>> tokenizer = Tokenizer.mistral_v1()
    >>> heard = UntilStop(tokenizer, stop=["cat sat"])
    >>> [heard.push([id_], [0.0]).text for id_ in tokenizer.encode("A cat. The cat sat")]
    ['A', ' ', 'cat.', ' The', ' ', '']
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prefix_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        eos_ids: Collection[int] = (),
    ) -> None:
        self.found = False
        self._eos_ids = eos_ids  # not told, though a token that was added to the model has a text
        self._decoder = StreamDecoder(tokenizer, prefix_ids)
        self._stop = stop
        self._text = ""  # what is held back
        self._tokens: list[tuple[int, int, float]] = []  # of it: where each begins, id, logprob

    def push(self, ids: Sequence[int], logprobs: Sequence[float]) -> Certain:
        """What the next tokens make certain."""
        begins = 0
        for id_, logprob in zip(ids, logprobs, strict=True):
            if self.found:
                break
            self._tokens.append((len(self._text), id_, logprob))
            self._text += "" if id_ in self._eos_ids else self._decoder.push([id_])
            begins = self._look()
        if not self._stop:
            return self._pop(len(self._text), all_tokens=True)
        return self._pop(begins)

    def flush(self) -> Certain:
        """What is still held, now that nothing follows."""
        if self.found:
            return Certain([], [], "")
        self._text += self._decoder.flush()
        return self._pop(len(self._text), all_tokens=True)

    def _look(self) -> int:
        """Where in the text a stop text begins, or may begin."""
        text, stop = self._text, self._stop
        complete = [(at + len(end), at) for end in stop if (at := text.find(end)) >= 0]
        self.found = bool(complete)
        if complete:
            return min(complete)[1]
        places = range(len(text))
        return next((i for i in places if any(end.startswith(text[i:]) for end in stop)), len(text))

    def _pop(self, length: int, all_tokens: bool = False) -> Certain:
        """So much of the text, and the tokens that begin in it.

        One without a text of its own, as a part of a character is, begins where the text of the
        next one does.
        """
        n = sum(all_tokens or begin < length for begin, _, _ in self._tokens)
        tokens, text = self._tokens[:n], self._text[:length]
        self._tokens = [(begin - length, id_, nats) for begin, id_, nats in self._tokens[n:]]
        self._text = self._text[length:]
        return Certain([id_ for _, id_, _ in tokens], [nats for _, _, nats in tokens], text)


class Continuation:
    """How far one prompt of a batch has been continued.

    Attributes:
        limit: most new tokens: `max_tokens`, or fewer where `room` (`None`: endless) is.
        stopped: why there is no more to come, if so.

    Raises:
        BadInput: there are stop texts and no tokenizer to tell them by.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        room: int | None,
        eos_ids: Collection[int],
        tokenizer: Tokenizer | None,
        stop: Sequence[str] = (),
    ) -> None:
        if stop and tokenizer is None:
            raise BadInput("a stop text needs a tokenizer, and there is none beside the weights")
        self.limit = max_tokens if room is None else min(max_tokens, room)
        self.stopped: Stopped | None = None
        self._at_limit: Stopped = "length" if self.limit == max_tokens else "context"
        self._eos_ids = eos_ids
        self._heard = UntilStop(tokenizer, prompt, stop, eos_ids) if tokenizer else None
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
        if self._heard is None:
            return Sample(ids, logprobs, "", self.stopped)
        pieces = [self._heard.push(ids, logprobs)]
        if self._heard.found:
            self.stopped = "stop"
        elif self.stopped:
            pieces.append(self._heard.flush())
        return join([Sample(*piece, self.stopped) for piece in pieces])

    def _note(self, ids: list[int]) -> None:
        self._produced += len(ids)
        if ids and ids[-1] in self._eos_ids:
            self.stopped = "eos"
        elif self._produced == self.limit and not self.stopped:
            self.stopped = self._at_limit


def stop_texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The texts that end a continuation, of which a text alone is one.

    Raises:
        BadInput: one is empty.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in texts:
        raise BadInput("a stop text is empty; give at least a character to stop at")
    return texts
