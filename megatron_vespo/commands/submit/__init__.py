"""`megatron-vespo submit`."""
