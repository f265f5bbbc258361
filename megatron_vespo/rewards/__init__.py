"""Verifiable rewards: grading functions, and the killable worker processes that run them."""
