"""Adding a loss or a method touches its own file and one line of functional.py."""

import importlib
import inspect
import pkgutil

import metric_kd.distill
import metric_kd.functional
import metric_kd.losses
from metric_kd.losses.term import TERMS


def modules():
    for package in (metric_kd.losses, metric_kd.distill):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(info.name)


def test_every_pure_function_is_in_functional():
    missing = []
    for name in TERMS:
        module = inspect.getmodule(TERMS[name])
        if module is None or not module.__name__.startswith("metric_kd."):
            continue  # registered by another test
        if inspect.isfunction(getattr(module, name, None)) and getattr(metric_kd.functional, name, None) is None:
            missing.append(f"from {module.__name__} import {name}")
    assert not missing, "add to metric_kd/functional.py:\n" + "\n".join(missing)
    assert sorted(metric_kd.functional.__all__) == metric_kd.functional.__all__
    assert all(inspect.isfunction(getattr(metric_kd.functional, name)) for name in metric_kd.functional.__all__)


def test_importing_the_package_registers_every_method_under_its_file_name():
    for module in modules():
        parts = module.__name__.split(".")
        if len(parts) == 4 and parts[2] in ("logit", "feature", "relational"):
            assert parts[3] in TERMS, f"{module.__file__} registers no term named {parts[3]!r}"
            term = TERMS[parts[3]]
            assert inspect.getmodule(term) is module
            assert term.family == parts[2] and term.reads_teacher and term.paper and term.cost


def test_the_terms_of_the_rkd_paper_are_there():
    wanted = {"l1_triplet", "l2_triplet", "contrastive", "cross_entropy", "softmax"}
    wanted |= {"rkd_distance", "rkd_angle", "dark_rank", "at", "fitnet"}
    assert all(name in TERMS for name in wanted)


def test_options_have_annotations_and_defaults():
    for name in TERMS:
        if "__init__" in vars(TERMS[name]):
            for option in list(inspect.signature(TERMS[name].__init__).parameters.values())[1:]:
                assert option.default is not inspect.Parameter.empty, f"{name}: {option.name} has no default"
                assert option.annotation is not inspect.Parameter.empty, f"{name}: {option.name} has no annotation"


def test_every_method_says_its_default_weight():
    for name in TERMS:
        term = TERMS[name]
        if term.reads_teacher and term.__module__.startswith("metric_kd."):
            assert f"efault weight {term.default_weight:g}" in " ".join((term.__doc__ or "").split()), name
