"""Training: objectives, one jitted step, checkpoints, and the loop that never loses a step."""
