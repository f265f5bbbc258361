"""`megatron-vespo evaluate`."""
