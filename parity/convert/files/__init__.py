"""Where the tensors of other formats lie: safetensors, torch.save, the Hub."""
