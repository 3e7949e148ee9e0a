"""Planted faults and clean runs: how small a fault the verdicts find and name. No judging module imports this."""
