"""The only place that runs a `tokenizer.json`: a confined child, since its patterns and rules are a program."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from stages.errors import InputError, shown
from stages.files.confined import serve


def _ids(request: dict[str, Any]) -> dict[str, Any]:
    """The prompt's ids; `InputError` for a file that cannot be read or used, or that makes more of them than `most`."""
    path = request["path"]
    try:
        ids = Tokenizer.from_file(path).encode(request["prompt"]).ids
    except MemoryError:
        raise
    except BaseException as error:  # tokenizers raises a bare Exception, and for a panic in Rust a BaseException
        raise InputError(f"{path}: not a readable tokenizer: {shown(error)}") from None
    if len(ids) > request["most"]:
        size = len(request["prompt"])
        raise InputError(f"{path}: makes {len(ids)} tokens of a prompt of {size} characters; not a model's tokenizer")
    return {"ids": ids}


if __name__ == "__main__":
    serve(_ids)
