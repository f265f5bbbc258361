"""`megatron-vespo check layout`."""
