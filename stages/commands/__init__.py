"""The command line: typer signatures, one module a group of commands."""
