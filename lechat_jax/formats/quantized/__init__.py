"""Readers of other programs' quantised weights: FP8, GPTQ, AWQ, compressed-tensors."""
