"""Several losses: the same search for each, then statistics of repeats."""
