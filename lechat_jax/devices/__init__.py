"""Devices: mesh and sharding, multi-host processes, memory, persistent compilation cache."""
