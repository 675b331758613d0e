"""Checkpoints in the formats of others: names, shapes, configs, quantised tensors, GGUF."""
