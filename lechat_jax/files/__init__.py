"""Files: atomic writes, SHA-256 manifests, locks, globs, safetensors headers, text decoding."""
