"""Token ids of a forward run: given, from a file, or a prompt through the checkpoint's own tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from stages.errors import InputError, NotFoundError, UsageError, shown
from stages.files.confined import Limits, ask
from stages.files.jsonio import read_bytes
from stages.files.source import ModelSource

# The built-in run: long enough for attention to matter, and no two ids alike.
DEFAULT_TOKENS = (3, 141, 59, 26, 53, 58, 97, 93)
# One id a line of a prompt of 2^24 tokens is about this much.
_MAX_FILE_BYTES = 256 * 1024 * 1024

# The largest published tokenizer.json has 33 MB.
_MAX_TOKENIZER_BYTES = 128 * 1024 * 1024
# Address space: the library's own, and what a file becomes in memory.
_TOKENIZER_MEMORY, _MEMORY_PER_BYTE = 1024**3, 40
# Processor time; a file of 11 MB and a prompt of 100 KB take 1 s.
_TOKENIZER_SECONDS = 10
# A byte of text is one id at most, but for what normalizing makes of a few characters; and special tokens around it.
_IDS_PER_BYTE, _MORE_IDS = 16, 1024


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
    """The prompt's ids by the checkpoint's `tokenizer.json`, special tokens as that file says.

    The file is run in a confined process; `InputError` for one that is damaged, or that takes more time or memory, or
    gives more ids, than a tokenizer does.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise NotFoundError(f"{folder}: no tokenizer.json, which --prompt needs; give --tokens")
    size = path.stat().st_size
    if size > _MAX_TOKENIZER_BYTES:
        raise InputError(f"{path}: {size} bytes, more than the {_MAX_TOKENIZER_BYTES} that a tokenizer may have")
    text = prompt.encode("utf-8", "replace").decode()  # bytes of a terminal that are no text
    request = {"path": str(path), "prompt": text, "most": _IDS_PER_BYTE * len(text.encode()) + _MORE_IDS}
    limits = Limits(_TOKENIZER_MEMORY + _MEMORY_PER_BYTE * size, _TOKENIZER_SECONDS, 10 * _TOKENIZER_SECONDS)
    ids = ask("stages.files.tokenizer_child", request, path, limits, plain="a model's tokenizer")["ids"]
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


def token_ids(command: TokenOptions, checkpoint: ModelSource) -> np.ndarray:
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
