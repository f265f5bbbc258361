"""One entry for each command of `megatron-vespo`."""
