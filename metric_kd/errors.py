"""The one exception that a user is meant to read."""


class UserError(ValueError):
    """Something the user can mend: one sentence that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2; a library caller can catch it as a
    ``ValueError``.
    """


class UnknownName(UserError):
    """A name that nothing has, perhaps because the module that registers it was not imported."""


def one_of(kind: str, name: str, known: "list[str] | tuple[str, ...]") -> UnknownName:
    """An unknown name, with the nearest known one where there is one."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of: {', '.join(sorted(known))}."
    return UnknownName(f"unknown {kind} {name!r}; {hint}")
