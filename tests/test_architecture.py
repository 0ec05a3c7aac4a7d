"""The layout holds: imports run from left to right, and the front door is light."""

import ast
from pathlib import Path

from tiny import succeeds

PACKAGE = Path(__file__).resolve().parent.parent / "metric_kd"
GROUND = {
    "errors",
    "types",
    "registry",
    "distances",
    "distributed",
    "devices",
    "modes",
    "kernels",
    "generators",
    "locks",
    "durable",
    "scratch",
    "plain",
    "version",
}
MAY_IMPORT = {
    "errors": set(),
    "types": set(),
    "registry": {"errors"},
    "distances": {"errors", "types"},
    "distributed": {"errors", "generators"},
    "generators": set(),
    "locks": {"errors", "scratch"},
    "scratch": {"errors"},
    "durable": set(),
    "plain": set(),
    "version": set(),
    "devices": {"errors", "distributed"},
    "modes": set(),
    "kernels": {"errors", "distances"},
    "data": GROUND,
    "models": GROUND,
    "losses": GROUND | {"data", "models"},
    "distill": GROUND | {"data", "models", "losses"},
    "engine": GROUND | {"data", "models", "losses", "distill"},
    "evaluation": GROUND | {"data", "models"},
    "quantify": GROUND | {"data", "models", "losses", "distill", "engine"},
    "report": GROUND | {"data", "models", "evaluation", "quantify"},
    "deploy": GROUND | {"data", "models", "losses", "distill", "engine", "evaluation"},
    "cli": GROUND
    | {"data", "models", "losses", "distill", "engine", "quantify", "evaluation", "report", "deploy", "presets"},
}
FRONT_DOORS = {"functional", "__init__"}


def imports_of(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "metric_kd":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("metric_kd.")}
    return found


def test_imports_run_from_left_to_right():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part in FRONT_DOORS or part == "presets":
            continue
        for target in sorted(imports_of(file) - {part}):
            if target not in MAY_IMPORT[part]:
                wrong.append(f"{file.relative_to(PACKAGE)} imports {target}")
    assert not wrong, wrong


def modules_below() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports anywhere: at the top, in a function, or for its types alone."""
    files = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = file
    found: dict[str, set[str]] = {}
    for module, file in files.items():
        named = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= inner & files.keys() or {node.module}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        found[module] = named & files.keys() - {module}
    return found


def test_no_imports_run_in_a_circle():
    below = modules_below()
    assert "metric_kd.engine.trainer" in below and below["metric_kd.engine.trainer"]
    while free := [module for module, named in below.items() if not named & below.keys()]:
        for module in free:
            del below[module]
    assert not below, f"in a circle, or above one: {sorted(below)}"


def test_import_metric_kd_is_light():
    code = (
        "import sys, torch, metric_kd, metric_kd.functional\n"
        "from metric_kd.kernels import described\n"
        "described(torch.device('cpu'))\n"
        "heavy = {'torchvision', 'faiss', 'matplotlib', 'sklearn', 'h5py', 'scipy', 'jsonargparse',\n"
        "         'pytorch_metric_learning', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    succeeds(code)


def test_no_second_pairwise_distance():
    """distances.py is the only place that computes distances between all rows of one tensor."""
    for file in PACKAGE.rglob("*.py"):
        if file.name != "distances.py" and file.parts[-2] in ("losses", "relational", "feature", "logit", "distill"):
            assert "torch.cdist" not in file.read_text(), f"{file} computes its own distances; use Pairwise."


def test_top_level_scripts_stay_short():
    for name in ("run.py", "run_distill.py"):
        assert len((PACKAGE.parent / name).read_text().splitlines()) <= 12
