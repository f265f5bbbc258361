"""What runs inside of the sandbox of code rewards: its modules import only the standard library."""
