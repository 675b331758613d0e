"""Text embeddings from a decoder."""
