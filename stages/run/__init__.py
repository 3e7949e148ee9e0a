"""Computing stages: runners, precision modes, children, memory, calibration."""
