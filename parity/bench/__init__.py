"""Speed, side by side with other implementations."""
