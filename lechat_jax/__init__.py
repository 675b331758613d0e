"""Mistral in JAX. Import the modules you need: `lechat_jax.config` does not load JAX."""
