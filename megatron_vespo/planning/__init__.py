"""What a run will take, from its flags: memory, bytes to move, seconds. Pure arithmetic."""
