"""Rollouts: SGLang engines as child processes, and everything that generates completions with them."""
