"""Bytes on disk: formats, dumps, checkpoints, safe writing, caches."""
