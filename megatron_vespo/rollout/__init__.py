"""Rollout: SGLang engines as child processes, and the clients that draw completions from them."""
