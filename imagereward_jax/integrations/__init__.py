"""Scripts that other programs load."""
