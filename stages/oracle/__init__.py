"""Is this one array right: the float64 reference, rounding-error bounds, verdicts."""
