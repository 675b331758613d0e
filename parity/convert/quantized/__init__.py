"""Weights that other programs have quantised: FP8, GPTQ, AWQ, compressed-tensors."""
