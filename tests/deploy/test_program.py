"""A .pt2 file is looked at before PyTorch opens it, which would unpickle and evaluate what is in it."""

import json
import pickle
import zipfile

import pytest

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


def test_programs_that_could_run_code_are_refused(program, tmp_path):
    mark = tmp_path / "mark"
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
    changes = {
        "expression": model_with(symbol, call),
        "attribute": model_with(symbol, "Symbol.mro()"),
        "call": model_with("torch.ops.aten.relu.default", "torch.hub.os.system"),
        "operator": model_with("torch.ops.aten.relu.default", "_operator.methodcaller"),
        "inputs": inputs,
        "library": library,
        "pickled": pickled,
    }
    for name, change in changes.items():
        file = changed(program, tmp_path / f"{name}.pt2", change)
        with pytest.raises(UserError, match="could run code"):
            Exported(file)
        assert not mark.exists(), name
