"""What a training run will need on hardware that is not there: shapes, the compiled step, and counts of both."""
