"""Other implementations of the same model, built from lechat's weights."""
