"""Weights converted between the formats."""
