"""tests/machines.py: each level reaches the libraries, and its table tells what passed from what did not."""

import subprocess
import sys

import machines
import pytest
from tiny import ROOT


def test_a_level_reaches_the_libraries():
    code = (
        "import torch\n"
        "from numpy._core import _multiarray_umath as core\n"
        "used = [name for name in core.__cpu_dispatch__ if core.__cpu_features__[name]]\n"
        "print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), used)\n"
    )
    environment = machines.variables(machines.LEVELS["default"], 2)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["DEFAULT", "2", "[]"]


CASES = {
    "well": (["assert os.environ['METRIC_KD_TEST_THREADS'] == '2'", "pytest.skip('why')"], 0, ["2", "1", "0", "1"]),
    "failed": (["assert False", "assert True", "assert True"], 1, ["2", "2", "1", "0"]),
    "died": (["os._exit(3)"], 1, ["2", "pytest", "ended", "with", "3"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_table_and_the_exit_status(case, tmp_path):
    tests, status, columns = CASES[case]
    file = tmp_path / "test_it.py"
    file.write_text("import os, pytest\n" + "".join(f"def test_{k}(): {line}\n" for k, line in enumerate(tests)))
    words = [sys.executable, "tests/machines.py", "--only", "default", "--threads", "2", "-n", "0", str(file)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].split()[1 : 1 + len(columns)] == columns


def test_what_this_processor_has_not_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["machines.py"])
    monkeypatch.setattr(machines, "processor", lambda: "avx2")
    monkeypatch.setattr(machines, "suite", lambda level, threads, arguments: (True, f"{threads:>8}"))
    assert machines.main() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]
    assert [line[:2] for line in lines[:4]] == [["default", "1"], ["default", "2"], ["avx2", "1"], ["avx2", "2"]]
    assert lines[4][:3] == ["avx512", "not", "run:"]
