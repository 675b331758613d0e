"""Prompts continued: prefill, the decode loop, sampling."""
