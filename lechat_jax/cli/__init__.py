"""Command-line interface: flags, YAML config files, progress bars, signals. For commands only."""
