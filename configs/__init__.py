"""One YAML per experiment; the first comment of each is the command that runs it."""
