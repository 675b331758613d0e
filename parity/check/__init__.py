"""The proof: implementations compared, and faults planted that have to be found."""
