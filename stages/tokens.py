"""Token ids of a forward run: given, from a file, or a prompt through the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from stages.checkpoint import Checkpoint
from stages.errors import InputError, NotFoundError, UsageError, shown
from stages.jsonio import read_bytes

# The built-in run: long enough for attention to matter, and no two ids alike.
DEFAULT_TOKENS = (3, 141, 59, 26, 53, 58, 97, 93)
# One id a line of a prompt of 2^24 tokens is about this much.
_MAX_FILE_BYTES = 256 * 1024 * 1024


def parse_tokens(text: str, where: str = "--tokens") -> np.ndarray:
    """`1,2,3` (commas, spaces, newlines, or a JSON list) as int64 ids; `UsageError` for anything else."""
    stripped = text.strip()
    if stripped.startswith("["):
        try:
            stripped = ",".join(str(item) for item in json.loads(stripped))
        except (ValueError, RecursionError):
            raise UsageError(f"{where}: '{shown(text, 40)}' is not a JSON list of token ids") from None
    parts = [part for part in re.split(r"[\s,]+", stripped) if part]
    if not parts or not all(re.fullmatch(r"[0-9]{1,9}", part) for part in parts):
        raise UsageError(f"{where}: expected token ids such as 1,2,3, got '{shown(text, 40)}'")
    return np.array([int(part) for part in parts], np.int64)


def read_tokens(path: Path) -> np.ndarray:
    """Token ids from a text or JSON file."""
    data = read_bytes(path, _MAX_FILE_BYTES)
    try:
        return parse_tokens(data.decode("utf-8"), str(path))
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file of token ids") from None


def encode(prompt: str, folder: Path) -> np.ndarray:
    """The prompt's ids by the checkpoint's `tokenizer.json`, special tokens as that file says."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(f"{folder}: no tokenizer.json, which --prompt needs; give --tokens")
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(path)).encode(prompt).ids
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot read
        raise InputError(f"{path}: not a readable tokenizer: {shown(error)}") from None
    if not ids:
        raise UsageError("--prompt gives no token; write some text")
    return np.array(ids, np.int64)


def check_tokens(tokens: Sequence[int] | np.ndarray, vocabulary: int) -> np.ndarray:
    """`tokens` as int64, each below the vocabulary's size; `UsageError` naming the first that is not."""
    ids = np.asarray(tokens, np.int64)
    bad = np.flatnonzero((ids < 0) | (ids >= vocabulary))
    if bad.size:
        raise UsageError(f"token {int(ids[bad[0]])} at position {int(bad[0])}: the vocabulary has {vocabulary} ids")
    return ids


class TokenOptions(Protocol):
    """The options of a command that say which tokens it runs on."""

    @property
    def tokens(self) -> str | None: ...

    @property
    def tokens_file(self) -> Path | None: ...

    @property
    def prompt(self) -> str | None: ...


def token_ids(command: TokenOptions, checkpoint: Checkpoint) -> np.ndarray:
    """The run's token ids, from whichever option gave them; a default list when none did."""
    given = [x for x in (command.tokens, command.tokens_file, command.prompt) if x is not None]
    if len(given) > 1:
        raise UsageError("give one of --tokens, --tokens-file, --prompt")
    if command.tokens is not None:
        ids = parse_tokens(command.tokens)
    elif command.tokens_file is not None:
        ids = read_tokens(command.tokens_file)
    elif command.prompt is not None:
        ids = encode(command.prompt, checkpoint.path)
    else:
        ids = np.array(DEFAULT_TOKENS)
    return check_tokens(ids, checkpoint.config.vocab_size)
