"""What every room above stands on: the world of ranks, megatron-core on a CPU, logs."""
