"""How a program talks to a person: flags, progress, signals. Commands use it, nothing else."""
