"""Heavy operations (matmul, attention, cross-entropy), in the form that each device is fast at."""
