"""HF folders and torch_dist checkpoints, as files."""
