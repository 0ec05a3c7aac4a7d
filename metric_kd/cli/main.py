"""The console script, and what turns an exception into a sentence and an exit status."""

import errno
import importlib
import os
import select
import sys
from collections.abc import Callable, Sequence

from metric_kd.errors import UserError, one_of

COMMANDS = {
    "train": "train a network (run.py)",
    "eval": "what a checkpoint achieves on the test images",
    "distill": "distil a teacher into a student (run_distill.py)",
    "granularity": "fit the coders of a teacher for run_distill.py --granularity",
    "probe": "a linear classifier on the frozen backbone of a run, on another data set",
    "compare": "methods, weights and seeds of a YAML file, as one table",
    "analyse": "how alike a student and its teacher are inside",
    "evidence": "how sure a student's figures are, and what it kept of its teacher",
    "quantify": "what distillation taught, by the concepts in a layer",
    "pack": "all images of a data set in one file, for --pack",
    "embed": "write the embeddings of a folder of images",
    "report": "trained runs and their teachers as one page: figures, curves, galleries, maps, cost",
    "export": "one file from pixels to embeddings (ONNX, torch.export), checked, with a model card",
    "index": "a folder of images as one file that can be searched, kept up to date by the same command",
    "search": "the images of an index that are nearest to others",
    "list": "names of datasets, backbones, samplers, losses or methods",
}
_MODULES = {"eval": "evaluate", "list": "listing"}
ALONE = ("analyse", "evidence", "quantify", "report", "pack", "embed", "export", "index", "search", "list")
"""Commands of one process: several would do the same and write the same files."""


def main(arguments: Sequence[str] | None = None) -> int:
    """`metric-kd COMMAND ...`: 0 done, 2 bad input, 130 or 143 stopped by a signal after saving."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: metric-kd COMMAND [flags]; metric-kd COMMAND --help\n")
        print("\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items()))
        return 0

    def command(rest: Sequence[str], program: str | None) -> int:
        from metric_kd.distributed import announced

        if arguments[0] not in COMMANDS:
            raise one_of("command", arguments[0], list(COMMANDS))
        if arguments[0] in ALONE and announced() > 1:
            raise UserError(f"{arguments[0]} works in one process; start it without torchrun.")
        module = importlib.import_module(f"metric_kd.cli.{_MODULES.get(arguments[0], arguments[0])}")
        return int(module.main(rest, program))

    return run(command, arguments[1:], f"metric-kd {arguments[0]}")


def _stdout_is_broken() -> bool:
    """Whether whoever read what we print has read enough and gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def run(command: Callable[[Sequence[str], str | None], int], arguments: Sequence[str], program: str) -> int:
    """Run a command; bad input becomes one sentence on standard error and status 2."""
    from metric_kd import distributed
    from metric_kd.engine.interruption import Interrupted

    try:
        status = command(arguments, program)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        starts_over = "never" in arguments or "--resume=never" in arguments
        how = "the same command with --resume auto goes on" if starts_over else "the same command goes on"
        print(f"stopped by {stop}; everything is saved, {how}.", file=sys.stderr)
        return 128 + stop.signum
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to print goes nowhere
        return 1
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    except RuntimeError as error:
        sentence = distributed.lost(error)
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        print(
            f"error: {error.strerror}: {error.filename or 'a file of the run'}; make room or permit it.",
            file=sys.stderr,
        )
        return 2
    finally:
        distributed.stop()
