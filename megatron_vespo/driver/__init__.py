"""Drives a run: its services, the attempts of its trainer, and the training loop."""
