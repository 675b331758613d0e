"""Samples: ids, text, log-probabilities and stop reason of each row; stop texts."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import StreamDecoder, Tokenizer

Stopped = Literal["eos", "length", "stop", "context", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A generated sample of one prompt, or the next piece of a streamed one.

    Attributes:
        ids: the new tokens, EOS included. Before a stop text, the tokens that begin before it;
            the last one may reach into it.
        logprobs: log-probability of each token under the model in nats, at temperature 1 and
            unfiltered.
        text: text of the new tokens, as it continues the prompt; empty without a tokenizer.
        stopped: stop reason: EOS, `max_tokens`, a stop text, a full context (layers without a
            window) or an interrupt. `None` if more follows.
    """

    ids: list[int]
    logprobs: list[float]
    text: str
    stopped: Stopped | None


def join(pieces: Sequence[Sample]) -> Sample:
    """Joins the streamed pieces of a sample, in order."""
    return Sample(
        ids=[id_ for piece in pieces for id_ in piece.ids],
        logprobs=[logprob for piece in pieces for logprob in piece.logprobs],
        text="".join(piece.text for piece in pieces),
        stopped=pieces[-1].stopped,
    )


class Certain(NamedTuple):
    """Tokens and text that no later token can take back."""

    ids: list[int]
    logprobs: list[float]
    text: str


class UntilStop:
    """Cuts a token stream before a stop text, which may start or end within a token.

    Text that may be the start of a stop text is held back. Of several stop texts the one that is
    complete first counts.

    Attributes:
        found: whether a stop text has come; nothing after it is output.

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
        """Adds the next tokens; returns those that are certain."""
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
        """Ends the stream; returns what was held back."""
        if self.found:
            return Certain([], [], "")
        self._text += self._decoder.flush()
        return self._pop(len(self._text), all_tokens=True)

    def _look(self) -> int:
        """Offset in the held text at which a stop text begins or may begin."""
        text, stop = self._text, self._stop
        complete = [(at + len(end), at) for end in stop if (at := text.find(end)) >= 0]
        self.found = bool(complete)
        if complete:
            return min(complete)[1]
        places = range(len(text))
        return next((i for i in places if any(end.startswith(text[i:]) for end in stop)), len(text))

    def _pop(self, length: int, all_tokens: bool = False) -> Certain:
        """Takes `length` characters of the held text, and the tokens that begin in them.

        A token without text, such as a part of a character, begins where the next token's text
        does.
        """
        n = sum(all_tokens or begin < length for begin, _, _ in self._tokens)
        tokens, text = self._tokens[:n], self._text[:length]
        self._tokens = [(begin - length, id_, nats) for begin, id_, nats in self._tokens[n:]]
        self._text = self._text[length:]
        return Certain([id_ for _, id_, _ in tokens], [nats for _, _, nats in tokens], text)


class Continuation:
    """Progress of one row of a batch: tokens left, stop texts, stop reason.

    Attributes:
        limit: maximum new tokens: the lesser of `max_tokens` and `room` (`None`: no limit).
        stopped: stop reason; `None` if more follows.

    Raises:
        BadInput: there are stop texts and no tokenizer.
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
        """The next piece of the sample, from the tokens that `decode` produced for the row.

        Raises:
            BadInput: a log-probability is not finite.
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
    """Validates stop texts: one text or several, none of them empty.

    Raises:
        BadInput: one is empty.
    """
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in texts:
        raise BadInput("a stop text is empty; give at least a character to stop at")
    return texts
