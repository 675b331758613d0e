"""Implementations that continue prompts, behind one interface."""
