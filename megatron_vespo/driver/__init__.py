"""A run: services, attempts, the training loop."""
