"""A .pt2 file is looked at before PyTorch opens it, which would unpickle and evaluate what is in it."""

import contextlib
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

import metric_kd
from metric_kd.deploy.export import EmbeddingGraph, write_pt2
from metric_kd.deploy.exported import Exported
from metric_kd.deploy.program import check_program
from metric_kd.errors import UserError
from metric_kd.models.backbone import Pixels
from metric_kd.models.network import NetworkSpec, build_network


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    spec = NetworkSpec(
        base="resnet8_x0.5:stem_stride=2",
        embedding_size=4,
        l2normalize=True,
        num_classes=None,
        pixels=Pixels(),
        input_size=32,
    )
    path = tmp_path_factory.mktemp("program") / "whole.pt2"
    write_pt2(EmbeddingGraph(build_network(spec)).eval(), path, {})
    return path


def changed(program, place, change):
    """A copy of the program whose members went through ``change``, and what it adds."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(place, "w") as new:
        members = {name: old.read(name) for name in old.namelist()}
        change(members)
        for name, content in members.items():
            new.writestr(name, content)
    return place


def model_with(old, new):
    def change(members):
        name = next(name for name in members if name.endswith("models/model.json"))
        text = members[name].decode()
        assert old in text
        members[name] = text.replace(old, new).encode()

    return change


def test_a_program_of_ours_is_opened(program):
    check_program(program, program.read_bytes())


def planted(program, mark):
    """What others could write into a program of ours -> the change that writes it."""
    call = f"__import__('pathlib').Path('{mark}').touch()"
    top = zipfile.ZipFile(program).namelist()[0].split("/")[0]

    def inputs(members):
        name = next(name for name in members if "/sample_inputs/" in name)
        members[name] = pickle.dumps(Evil(mark))

    def library(members):
        members[f"{top}/data/aotinductor/model/kernel.so"] = b"\x7fELF"

    def pickled(members):
        name = next(name for name in members if name.endswith("weights_config.json"))
        content = json.loads(members[name])
        first = next(iter(content["config"].values()))
        first["use_pickle"] = True
        members[name] = json.dumps(content).encode()
        members[f"{top}/data/weights/{first['path_name']}"] = pickle.dumps(Evil(mark))

    text = zipfile.ZipFile(program).read(f"{top}/models/model.json").decode()
    symbol = text[text.index("Symbol('") :].split(")")[0] + ")"
    none = '"guards_code": []'
    leaf = {"type": None, "context": None, "children_spec": []}
    enum = json.dumps([{"__enum__": True, "fqn": "planted:Colour", "name": "RED"}])
    tree = json.dumps([1, {"type": "builtins.dict", "context": enum, "children_spec": [leaf]}])
    whole = json.loads(text)
    own = whole["graph_module"]["module_call_graph"][0]["signature"]["out_spec"]
    argument = "images"
    weight = "network.base.conv1.weight"
    assert weight in text
    return {
        "expression": model_with(symbol, call),
        "attribute": model_with(symbol, "Symbol.mro()"),
        "call": model_with("torch.ops.aten.relu.default", "torch.hub.os.system"),
        "operator": model_with("torch.ops.aten.relu.default", "_operator.methodcaller"),
        "inputs": inputs,
        "library": library,
        "pickled": pickled,
        "condition": model_with(none, json.dumps({"guards_code": [f"{call} is None"]})[1:-1]),
        "message": model_with(none, json.dumps({"guards_code": ['L["x\\" + f() + \\""] >= 2']})[1:-1]),
        "enum": model_with(json.dumps(own), json.dumps(tree)),
        "argument": model_with(f'"{argument}"', f'"{argument}={call}"'),
        "weight": model_with(weight, f'network.base.conv1.x\\", {call}) #'),
        "object": model_with(
            '"custom_obj_values": {}', '"custom_obj_values": {"x": {"name": "x", "class_fqn": "os.system"}}'
        ),
    }


def test_programs_that_could_run_code_are_refused(program, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    (tmp_path / "planted.py").write_text(f"open({str(mark)!r}, 'w')\nclass Colour: RED = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, change in planted(program, mark).items():
        file = changed(program, tmp_path / f"{name}.pt2", change)
        with pytest.raises(UserError, match="could run code"):
            Exported(file)
        assert not mark.exists(), name


@pytest.mark.parametrize("name", ["condition", "enum", "argument"])
def test_pytorch_itself_would_run_what_is_planted(program, tmp_path, monkeypatch, name):
    mark = tmp_path / "mark"
    (tmp_path / "planted.py").write_text(f"open({str(mark)!r}, 'w')\nclass Colour: RED = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    file = changed(program, tmp_path / "planted.pt2", planted(program, mark)[name])
    with contextlib.suppress(Exception):
        torch.export.load(file).module()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    if not mark.exists():
        pytest.skip(f"torch {torch.__version__} does not run it any more; the check may go")


def test_a_program_does_not_say_where_its_source_lay(program):
    archive = zipfile.ZipFile(program)
    source = str(Path(torch.__file__).parent).encode()
    assert not [name for name in archive.namelist() if source in archive.read(name)]
    assert not [
        name for name in archive.namelist() if str(Path(metric_kd.__file__).parent).encode() in archive.read(name)
    ]


def test_conditions_on_sizes_are_opened(program, tmp_path):
    guard = "L['images'].size()[0] >= 2 and L['images'].size()[2] + 1 < 4096"
    file = changed(program, tmp_path / "guarded.pt2", model_with('"guards_code": []', f'"guards_code": ["{guard}"]'))
    check_program(file, file.read_bytes())
