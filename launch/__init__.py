"""Scripts that set environment and arguments for one kind of machine each; no logic of their own."""
