"""The proof: lechat beside other implementations of the same model."""
