"""`megatron-vespo prepare-data`."""
