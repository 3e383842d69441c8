"""Pages of results: one HTML file each, which opens without a network, on a phone and in the dark."""
