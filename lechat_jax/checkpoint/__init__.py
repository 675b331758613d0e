"""Checkpoints: safetensors weights, PEFT/LoRA adapters, training state, run folders."""
