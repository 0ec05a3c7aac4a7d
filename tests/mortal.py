"""attempt: some work in a child that kills itself at a chosen moment."""

import itertools
import os
import signal
from collections.abc import Callable
from typing import Any

import torch

Calls = dict[tuple[Any, str], Callable | None]
"""(module or class, name of a function in it) -> what does half of a call first, given the function and its arguments."""


def half_of_pwrite(pwrite, handle, data, offset):
    pwrite(handle, data[: len(data) // 2], offset)


ON_DISK: Calls = {(os, "pwrite"): half_of_pwrite, (os, "fsync"): None, (os, "replace"): None, (os, "unlink"): None}


def fork() -> int:
    """``os.fork`` on one thread: of several, OpenMP's would be missing in the child, which would wait for them for ever."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    child = os.fork()
    if child:
        torch.set_num_threads(threads)
    return child


def attempt(work: Callable[[], Any], kill_at: int | None = None, calls: Calls = ON_DISK) -> int:
    """Run ``work`` in a child that SIGKILLs itself at the n-th of these calls, half of it done; its status, as of waitpid."""
    child = fork()
    if child == 0:
        count = itertools.count(1)

        def mortal(call, half):
            def wrapped(*arguments, **named):
                if next(count) == kill_at:
                    if half is not None:
                        half(call, *arguments, **named)
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **named)

            return wrapped

        for (owner, name), half in calls.items():
            setattr(owner, name, mortal(getattr(owner, name), half))
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1]
