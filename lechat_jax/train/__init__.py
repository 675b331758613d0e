"""Training: options, the step, the loop around it."""
