"""Constrained decoding: which tokens a grammar, a JSON schema or a regular expression lets follow.

By llguidance, of which this is the only file that knows. A grammar that it refuses is bad input.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from lechat_jax.errors import BadInput
from lechat_jax.tokenizer.tokenizer import Tokenizer

# Spaces as most JSON that models have read has them; free ones could go on for ever.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST = 60_000  # characters of a grammar


class Grammars:
    """Compiles grammars for a model's tokens.

    Making it takes seconds for a large vocabulary, compiling a schema about a millisecond.

    Args:
        tokenizer: the model's tokenizer.

    Raises:
        BadInput: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise BadInput("a grammar needs llguidance: pip install 'lechat-jax[serve]'") from error
        self._llguidance, self.n_words = llguidance, -(-tokenizer.vocab_size // 32)
        tokens = _Tokens(tokenizer)
        self._tokens = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens))

    def json_schema(self, schema: Mapping[str, Any] | bool) -> "Matcher":
        """A grammar of the JSON texts that a schema describes."""
        text = json.dumps({} if schema is True else schema)
        try:
            grammar = self._llguidance.LLMatcher.grammar_from_json_schema(text, overrides=COMPACT)
        except ValueError as error:
            raise BadInput(f"the JSON schema cannot be used: {error}") from error
        return self._compile(grammar, "the JSON schema")

    def json_object(self) -> "Matcher":
        """A grammar of all JSON objects."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> "Matcher":
        """A grammar of the texts that a regular expression matches as a whole."""
        return self._compile(self._llguidance.LLMatcher.grammar_from_regex(pattern), "the regex")

    def choice(self, texts: Sequence[str]) -> "Matcher":
        """A grammar of these texts."""
        return self.lark("start: " + " | ".join(json.dumps(text) for text in texts))

    def lark(self, grammar: str) -> "Matcher":
        """A grammar in llguidance's variant of Lark's notation."""
        return self._compile(self._llguidance.LLMatcher.grammar_from_lark(grammar), "the grammar")

    def _compile(self, grammar: str, what: str) -> "Matcher":
        if len(grammar) > MOST:
            raise BadInput(f"{what} has {len(grammar)} characters; at most {MOST} are compiled")
        matcher = self._llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            why = " ".join(matcher.get_error().split())
            raise BadInput(f"{what} cannot be used: {why[:300]}")
        made = Matcher(matcher, self.n_words)
        try:
            made.copy().mask()  # what the engine would find only in the middle of an answer
        except BadInput as error:
            raise BadInput(f"{what} allows no text: {error}") from error
        return made


class Matcher:
    """A grammar's state after the tokens of one answer so far."""

    def __init__(self, matcher: Any, n_words: int) -> None:
        self._matcher, self._n_words = matcher, n_words

    def copy(self) -> "Matcher":
        """The same state, for another answer."""
        return Matcher(self._matcher.deep_copy(), self._n_words)

    def mask(self) -> UInt32[np.ndarray, "words"]:
        """Bits of the ids that may come next, EOS among them where the text may end.

        Raises:
            BadInput: the grammar has become too large to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._n_words]
        if self._matcher.is_error() or not bits.any():
            why = self._matcher.get_error().partition("\n")[0] or "nothing may follow"
            raise BadInput(f"the grammar cannot be followed any further: {why[:300]}")
        return bits

    def consume(self, ids: Sequence[int]) -> None:
        """Advances by the tokens of the answer."""
        self._matcher.consume_tokens([*ids])


class _Tokens:
    """The vocabulary as llguidance wants it: the bytes of each id, and an encoder."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
        self.tokens = [tokenizer.bytes_of(id_) for id_ in range(tokenizer.vocab_size)]
        self.special_token_ids = [id_ for id_, text in enumerate(self.tokens) if not text]
        for id_ in self.special_token_ids:
            self.tokens[id_] = f"<[{id_}]>".encode()
        self._encode = tokenizer.encode_after

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())
