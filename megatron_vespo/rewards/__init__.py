"""Verifiable rewards: reward functions, and the killable worker processes that run them."""
