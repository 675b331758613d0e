"""Models on the disk: weights, adapters, training state, the folder of a run."""
