"""Names of files: as they can be printed, and whether a table of UTF-8 can hold them."""

import os
import re

from metric_kd.errors import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def shown(path: "str | os.PathLike[str]") -> str:
    """A path as one line that can be printed: names need not be UTF-8, and may hold a newline."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", os.fsencode(path).decode(errors="replace"))


def check_utf8(names: list[str]) -> None:
    """Raise ``UserError`` that shows the first name which is no UTF-8."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the name of the image {shown(name)} is no UTF-8, as its table must be; rename it."
            ) from error
