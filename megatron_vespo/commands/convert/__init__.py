"""`megatron-vespo convert`."""
