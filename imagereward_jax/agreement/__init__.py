"""Agreement of scores with human rankings: metrics, intervals and result pages, in NumPy."""
