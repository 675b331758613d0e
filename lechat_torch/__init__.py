"""Mistral in PyTorch: a second witness, which shares numbers with `lechat_jax` but no maths."""
