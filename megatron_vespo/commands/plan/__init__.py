"""`megatron-vespo plan`."""
