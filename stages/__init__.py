"""Stages, both paths, layouts, files, oracle, bounds and reports; knows neither torch nor jax nor the command line."""
