"""Seeded prompts of an exact number of tokens, as text that every server tokenises alike."""

from collections.abc import Iterator

import numpy as np

from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer
from parity.bench.servers.client import Request

WORDS = 200  # that prompts consist of
DRAWN = 20_000  # ids among which they are looked for


class Prompts:
    """Prompts of random words that are one token each, wherever they stand.

    Args:
        tokenizer: the model's.
        prompt_tokens: mean tokens of a prompt, BOS included.
        new_tokens: mean new tokens of a request.
        seed: first of the numbers on which a prompt depends.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_tokens: int, new_tokens: int, seed: int
    ) -> None:
        self._prompt_tokens, self._new_tokens, self._seed = prompt_tokens, new_tokens, seed
        self._words = words_of(tokenizer)

    def user(self, *numbers: int) -> Iterator[Request]:
        """The requests of one user, without end; other numbers make other requests.

        Prompts and answers have from half to one and a half times the mean number of tokens.
        """
        rng = np.random.default_rng((self._seed, *numbers))

        def about(mean: int) -> int:
            return int(rng.integers(max(1, mean // 2), mean + mean // 2, endpoint=True))

        while True:
            n_prompt, n_new = about(self._prompt_tokens), about(self._new_tokens)
            yield Request(self._text(rng, n_prompt), n_new)

    def long(self, n_tokens: int, *numbers: int) -> str:
        """A prompt of so many tokens, BOS included."""
        return self._text(np.random.default_rng((self._seed, n_tokens, *numbers)), n_tokens)

    def _text(self, rng: np.random.Generator, n_tokens: int) -> str:
        return " ".join(rng.choice(self._words, n_tokens - 1))


def words_of(tokenizer: Tokenizer) -> list[str]:
    """Words each of which is one token between any others, always the same.

    Raises:
        BadInput: the tokenizer has too few.
    """
    words: list[str] = []
    for id_ in np.random.default_rng(0).permutation(tokenizer.vocab_size)[:DRAWN]:
        word = tokenizer.decode([id_]).strip()
        if word.isascii() and word.isalpha() and len(tokenizer.encode(f"{word} {word}")) == 2:
            words.append(word)
        if len(words) == WORDS:
            return words
    if len(words) < 2:
        raise BadInput("this tokenizer has no words of one token, of which to make prompts")
    return words
