"""Train or evaluate one embedding network: ten lines over metric_kd.cli.train."""

import sys

from metric_kd.cli.main import run
from metric_kd.cli.train import main

if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], program="run.py"))
