"""The tokenizer in GGUF's words and back: tokens, their kinds, scores or merges, BOS and EOS."""

import base64
import hashlib
import importlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lechat_jax.errors import BadInput
from lechat_jax.files.atomic import write_atomic
from lechat_jax.files.paths import cache_home
from lechat_jax.formats.gguf.architecture import library
from lechat_jax.tokenizer.tokenizer import Tokenizer
from lechat_jax.tokenizer.vocabulary import no_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens, as of ggml
# How tekken cuts a text into words.
WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The control token that a version of tekken's was the first to have, newest first. What v7 has, v3
# has too; the chat template tells which of them it is.
MARKS = {"v15": "[MODEL_SETTINGS]", "v13": "[THINK]", "v11": "[CALL_ID]"}
SYSTEM = "[SYSTEM_PROMPT]"


def add_vocabulary(
    gguf: Any, writer: Any, folder: Path, vocab_size: int, bos_id: int, eos_ids: Sequence[int]
) -> None:
    """Writes the fields of the tokenizer of a model with so many ids, which lies in a folder.

    Raises:
        BadInput: there is no tokenizer of Mistral's, or it is another model's.
    """
    tokenizer = Tokenizer.beside(folder, vocab_size)
    if tokenizer is None:
        raise BadInput(no_tokenizer(folder, "no other program could use the model"))
    if tokenizer.path.suffix != ".json":
        _check_like_mistrals(tokenizer.path)
    with tempfile.TemporaryDirectory(prefix="lechat-") as alone:
        tokenizer.save(Path(alone))
        own = gguf.vocab.MistralVocab(Path(alone))
    tokens, scores, kinds = map(list, zip(*own.all_tokens(), strict=True))
    for id_ in range(len(tokens), vocab_size):  # tokens that were added, or that nobody has
        text = tokenizer.piece_text(id_, first=False)
        tokens.append((text or f"[PAD{id_}]").encode())
        scores.append(0.0)
        kinds.append(USER_DEFINED if text else UNUSED)
    writer.add_tokenizer_model(own.gguf_tokenizer_model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if own.gguf_tokenizer_model == "gpt2":
        writer.add_tokenizer_pre("tekken")
        writer.add_token_merges(own.extract_vocab_merges_from_model())
    else:
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_add_space_prefix(True)
    writer.add_bos_token_id(bos_id)
    writer.add_eos_token_id(eos_ids[0])
    if len(eos_ids) > 1:
        writer.add_eot_token_id(eos_ids[1])
    writer.add_unk_token_id(own.unk_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def _check_like_mistrals(path: Path) -> None:
    """Raises `BadInput` for a SentencePiece model that cuts or changes texts in another way.

    GGUF has fields for byte-pair encoding of a text as it is, and llama.cpp would do just that.
    """
    proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # made when imported
    model = proto.ModelProto.FromString(path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    is_changed = normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces
    if trainer.model_type != trainer.BPE or is_changed:
        raise BadInput(
            f"{path} is not byte-pair encoding of the text as it is, which Mistral's tokenizers "
            "are; GGUF cannot say it"
        )


def tokenizer_files(fields: Mapping[str, Any]) -> tuple[Path, ...]:
    """The tokenizer as Mistral's file, in the user's cache, with its added tokens and template.

    None, if it is no SentencePiece model and no tekken.
    """
    said = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    kind, tokens, kinds = said.get("model"), said.get("tokens"), said.get("token_type")
    if not (tokens and kinds and (kind == "llama" or said.get("pre") == "tekken")):
        return ()
    # What comes behind the last token of the tokenizer's own was added, or is padding.
    last = max(id_ for id_, one in enumerate(kinds) if one in (NORMAL, BYTE))
    added = {
        tokens[id_]: id_
        for id_ in range(last + 1, len(tokens))
        if kinds[id_] in (CONTROL, USER_DEFINED)
    }
    template = fields.get("tokenizer.chat_template")
    own = tokens[: last + 1], kinds[: last + 1]
    if kind == "llama":
        content, name = _sentencepiece(*own, said), "tokenizer.model"
    else:
        content, name = _tekken(*own, template or "").encode(), "tekken.json"
    files = {name: content}
    if added:
        files["added_tokens.json"] = json.dumps(added).encode()
    if template:
        files["chat_template.jinja"] = template.encode()
    digest = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
    folder = cache_home() / "gguf" / digest[:16]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(folder / name, content)
    return tuple(folder / name for name in sorted(files))


def _sentencepiece(tokens: list[str], kinds: list[int], said: Mapping[str, Any]) -> bytes:
    """A SentencePiece model of these pieces: BPE, with byte fallback and a space before a text."""
    proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2")  # made when imported
    model = proto.ModelProto()
    for text, score, kind in zip(tokens, said["scores"], kinds, strict=False):
        model.pieces.add(piece=text, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(tokens), True
    trainer.unk_id = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0
    trainer.bos_id, trainer.eos_id, trainer.pad_id = (*_own_ends(tokens, said), -1)
    for field, id_ in (("bos", trainer.bos_id), ("eos", trainer.eos_id), ("unk", trainer.unk_id)):
        setattr(trainer, f"{field}_piece", tokens[id_])
    normalizer.name, normalizer.escape_whitespaces = "identity", True
    normalizer.add_dummy_prefix = bool(said.get("add_space_prefix", True))
    normalizer.remove_extra_whitespaces = False
    return model.SerializeToString()


def _own_ends(tokens: list[str], said: Mapping[str, Any]) -> tuple[int, int]:
    """BOS and EOS of the tokenizer itself, whatever a fine-tune ends its texts with."""
    bos_id, eos_id = said.get("bos_token_id", 1), said.get("eos_token_id", 2)
    return (
        tokens.index("<s>") if "<s>" in tokens else bos_id,
        tokens.index("</s>") if "</s>" in tokens else eos_id,
    )


def _tekken(tokens: list[str], kinds: list[int], template: str) -> str:
    """A `tekken.json` of these tokens, control tokens first; the opposite of GPT-2's letters."""
    n_control = next(id_ for id_, kind in enumerate(kinds) if kind == NORMAL)
    byte_of = {letter: byte for byte, letter in library().vocab.bytes_to_unicode().items()}
    raw = [bytes(byte_of[letter] for letter in token) for token in tokens[n_control:]]
    control = tokens[:n_control]
    newest = (version for version, mark in MARKS.items() if mark in control)
    version = next(newest, "v7" if SYSTEM in template else "v3")
    return json.dumps(
        {
            "config": {
                "pattern": WORDS,
                "num_vocab_tokens": len(raw),
                "default_vocab_size": len(tokens),
                "default_num_special_tokens": n_control,
                "version": version,
            },
            "vocab": [
                {"rank": rank, "token_bytes": base64.b64encode(one).decode(), "token_str": None}
                for rank, one in enumerate(raw)
            ],
            "special_tokens": [
                {"rank": rank, "token_str": text, "is_control": True}
                for rank, text in enumerate(control)
            ],
        }
    )
