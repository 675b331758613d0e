"""Serving: an OpenAI-compatible server over a continuous batch, and its engine without HTTP."""
