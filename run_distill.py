"""Distil a teacher into a student: ten lines over metric_kd.cli.distill."""

import sys

from metric_kd.cli.distill import main
from metric_kd.cli.main import run

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], program="run_distill.py"))
