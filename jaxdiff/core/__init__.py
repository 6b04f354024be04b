"""What every package may use; imports nothing else of ours."""
