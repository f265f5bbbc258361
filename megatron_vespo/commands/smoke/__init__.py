"""`megatron-vespo smoke`."""
