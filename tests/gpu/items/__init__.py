"""What `run.py` and pytest run: each item is a function of a `Context` that returns figures, by name.

An item raises `Skip` where it cannot run, any other exception where what it checks does not hold.
"""
