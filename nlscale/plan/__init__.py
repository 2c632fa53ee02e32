"""A run of any size, simulated in one process: memory, FLOPs, traffic, and layouts ranked by what they would take."""
