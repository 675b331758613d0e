"""Planted faults, which the check has to find."""
