"""Chips and processes: the mesh, several hosts, memory, compiled programs kept on disk."""
