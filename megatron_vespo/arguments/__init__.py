"""Flags: for each concern, its flags, defaults and checks."""
