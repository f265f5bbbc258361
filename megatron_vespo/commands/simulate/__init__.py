"""`megatron-vespo simulate`."""
