"""Weight quantization: per-channel int8 and group-wise int4."""
