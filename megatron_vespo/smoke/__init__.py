"""`megatron-vespo smoke`: every part of a run once, with a small model, before the first run."""
