"""A page that compares training runs."""
