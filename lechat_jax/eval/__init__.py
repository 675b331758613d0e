"""Evaluation: perplexity and bits per byte of a text under a model."""
