"""A run: its services, the attempts of its trainer, the training loop."""
