"""The command line: typer signatures, one module per group of commands."""
