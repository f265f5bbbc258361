"""Sends what a run measures to experiment trackers, each in a process of its own, and to Prometheus."""
