"""Servers that are measured side by side, and the client that measures them."""
