"""The run: loop, step, state, checkpoints, what it reports."""
