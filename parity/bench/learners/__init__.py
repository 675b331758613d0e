"""Implementations that train, behind one interface."""
