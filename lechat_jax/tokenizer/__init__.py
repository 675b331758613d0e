"""Tokenizers (SentencePiece, tekken), chat templates, added tokens, streaming decoding."""
