"""Training data: files and datasets, then text or examples, then token ids, then batches."""
