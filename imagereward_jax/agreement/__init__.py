"""How well scores agree with people: metrics, intervals, and the pages that show them. NumPy alone."""
