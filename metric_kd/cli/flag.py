"""How a dataclass says what its flags are."""

from dataclasses import field
from typing import Any


def flag(default: Any, text: str) -> Any:
    """A field with its help text."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})
