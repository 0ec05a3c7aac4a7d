"""The graph from pixels to embeddings: what it sees, and files that do the same."""

import collections
import hashlib
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from tiny import THREADS

from metric_kd.data.transforms import resize
from metric_kd.deploy import exported as running
from metric_kd.deploy.embedder import Embedder
from metric_kd.deploy.export import WRITERS, EmbeddingGraph, describe, write_onnx, write_pt2
from metric_kd.deploy.exported import Exported
from metric_kd.deploy.int8 import before_the_layers, quantise_dynamic, quantise_static
from metric_kd.deploy.parity import TOLERANCE, check_parity, run_graph
from metric_kd.errors import UserError
from metric_kd.models import NetworkSpec, build_network
from metric_kd.models.backbone import Pixels

SMALL = "resnet8_x0.5:stem_stride=2"


def pixels(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def graph_of(base=SMALL, size=32, **options):
    """A network whose statistics are those of some images, so that embeddings differ."""
    torch.manual_seed(0)
    network = build_network(NetworkSpec(base, **{"embedding_size": 8, "input_size": size, **options}))
    if base.startswith("vit"):
        network.base.encoder.layers = network.base.encoder.layers[:1]
        torch.nn.init.normal_(network.base.encoder.pos_embedding)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the average of what follows
    with torch.no_grad():
        for k in range(2):
            network.train()(pixels(8, 3, size, size, seed=k))
    return EmbeddingGraph(network.eval().requires_grad_(False)).eval()


def metadata(graph, name="x"):
    return describe(graph, name, "0.0.0")


@pytest.fixture(scope="module")
def graph():
    torch.set_num_threads(int(THREADS))
    return graph_of()


@pytest.fixture(scope="module")
def files(graph, tmp_path_factory):
    """Form -> an exported file of ``graph``."""
    folder = tmp_path_factory.mktemp("exported")
    for form, write in WRITERS.items():
        write(graph, folder / f"x.{form}", metadata(graph))
    return {form: folder / f"x.{form}" for form in WRITERS}


@pytest.mark.parametrize(
    "height, width", [(375, 500), (37, 20), (38, 37), (1, 9), (600, 11), (36, 36), (32, 33), (33, 32)]
)
def test_views_are_those_of_uint8_resizing_up_to_one_level(graph, height, width):
    image = pixels(1, 3, height, width)
    view = graph.view(image)
    assert view.dtype == torch.float32 and view.shape == (1, 3, 32, 32)
    difference = (view - resize(image, 37)[..., 2:34, 2:34].float()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.05
    pillow = np.asarray(Image.fromarray(image[0].permute(1, 2, 0).numpy()).resize((37, 37), Image.Resampling.BILINEAR))
    assert (view[0] - torch.tensor(pillow).permute(2, 0, 1)[:, 2:34, 2:34]).abs().max() <= 1


def test_images_of_the_crops_size_are_taken_as_they_are(graph):
    image = pixels(2, 3, 32, 32)
    assert torch.equal(graph.view(image), image.float())
    same = pixels(1, 3, 37, 37)
    assert torch.equal(graph.view(same), same[..., 2:34, 2:34].float()), "resizing to the size there is moves nothing"


@pytest.mark.parametrize(
    "base, size, form, options",
    [
        pytest.param("inception_v1bn", 64, "onnx", {}, marks=pytest.mark.slow),
        pytest.param("googlenet", 64, "onnx", {"l2normalize": False}, marks=pytest.mark.slow),
        ("vit_b_16", 32, "onnx", {}),
        ("vit_b_16", 32, "pt2", {}),
        ("mobilenet_v2_cifar", 32, "pt2", {"embedding_size": 0, "num_classes": 5}),
        pytest.param(
            *("alexnet_fc", 64, "onnx", {"pixels": Pixels((104, 117, 128), (1, 2, 3), 255.0, True)}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_kind_of_network_keeps_its_embeddings(base, size, form, options, tmp_path):
    graph = graph_of(base, size, **options)
    WRITERS[form](graph, tmp_path / f"x.{form}", metadata(graph))
    exported = Exported(tmp_path / f"x.{form}")
    images = [pixels(3, *sides, seed=k) for k, sides in enumerate([(size, size), (40, 57), (90, 71), (1, 1)])]
    found = check_parity(graph, exported, images)
    assert found.images == 4 and found.difference < TOLERANCE / 2 and found.cosine > 0.98
    vectors = exported.embed(images[:3])
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-4 * np.abs(vectors).max(), "nothing shown by equal embeddings"
    assert exported.dimensions == graph.network.embedding_size == vectors.shape[1]


@pytest.mark.parametrize("form", WRITERS)
def test_a_file_embeds_like_the_embedder(form, graph, files, tmp_path):
    exported = Exported(files[form])
    assert exported.dimensions == 8 and exported.normalised and exported.metadata["input_size"] == "32"
    arrays = [
        pixels(3, *sides, seed=k).permute(1, 2, 0).numpy() for k, sides in enumerate([(40, 30), (32, 32), (40, 30)])
    ]
    Image.fromarray(arrays[0]).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    mixed = [tmp_path / "a.png", arrays[1], tmp_path / "bad.png", Image.fromarray(arrays[2])]
    skipped = []
    found, wanted = exported.embed(mixed, skipped=skipped), Embedder(graph.network).embed(arrays)
    assert skipped == [tmp_path / "bad.png"] and found.shape == (3, 8) and found.dtype == np.float32
    assert np.abs(found - wanted).max() < 0.02  # grey levels that are rounded otherwise
    with pytest.raises(UserError, match="bad.png"):
        exported.embed(mixed)
    assert exported.embed([]).shape == (0, 8)
    assert np.allclose(exported.embed(tmp_path / "a.png"), found[:1], atol=1e-6)


def test_large_images_do_not_wait_for_each_other(files, monkeypatch):
    exported, calls = Exported(files["onnx"]), []
    images = [pixels(3, *sides, seed=k) for k, sides in enumerate([(40, 30), (50, 20), (40, 30), (40, 30), (50, 20)])]
    whole = exported.embed(images)
    monkeypatch.setattr(running, "AT_ONCE", 2500)
    run = exported._run
    exported._run = lambda stack: calls.append(stack.shape) or run(stack)
    assert np.allclose(exported.embed(images), whole, atol=1e-6)
    assert max(shape[0] * shape[2] * shape[3] for shape in calls) <= 2500 and sum(shape[0] for shape in calls) == 5
    calls.clear()
    monkeypatch.setattr(running, "AT_ONCE", 1 << 24)
    exported.embed(images, batch=2)
    assert [shape[0] for shape in calls] == [2, 2, 1]


def test_parity_sees_a_network_that_has_changed(graph, files):
    images = [pixels(3, 50, 40, seed=k) for k in range(3)]
    assert check_parity(graph, Exported(files["onnx"]), images).difference < TOLERANCE
    other = graph_of()
    other.network.linear.bias.data[0] += 0.01
    assert check_parity(other, Exported(files["onnx"]), images).difference > TOLERANCE


def test_an_onnx_file_is_small_plain_and_described(graph, files):
    model = onnx.load(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version >= 17 and len(model.functions) == 0
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said == metadata(graph) and said["normalised"] == "true" and len(said["weights"]) == 16
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert kinds["Resize"] == 0 and kinds["MatMul"] == 2
    dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    assert [type(d) for d in dims] == [str, int, str, str] and dims[1] == 3
    assert (
        str(files["onnx"].parent).encode() not in files["onnx"].read_bytes()
        and b".py" not in files["onnx"].read_bytes()
    )


def test_int8_keeps_resizing_exact_and_embeddings_near(graph, files, tmp_path):
    images = pixels(24, 3, 45, 38)
    wanted = run_graph(graph, images)
    quantise_dynamic(files["onnx"], tmp_path / "d.onnx")
    quantise_static(files["onnx"], tmp_path / "s.onnx", iter([images.numpy()]))
    for kind, operation in (("d", "ConvInteger"), ("s", "DequantizeLinear")):
        model = onnx.load(tmp_path / f"{kind}.onnx")
        nodes = collections.Counter(node.op_type for node in model.graph.node)
        assert nodes[operation] >= 9 and nodes["MatMul"] == 2
        made = {name: node for node in model.graph.node for name in node.output}
        for node in model.graph.node:
            if node.op_type == "MatMul":
                assert {made[name].op_type for name in node.input} <= {"Cast", "Transpose", "Round"}
        exported = Exported(tmp_path / f"{kind}.onnx")
        assert exported.metadata["int8"] == {"d": "dynamic", "s": "static"}[kind]
        assert (exported.run(images) * wanted).sum(1).min() > 0.98
        assert (tmp_path / f"{kind}.onnx").stat().st_size < 0.8 * files["onnx"].stat().st_size
    assert "node_matmul_1" in before_the_layers(onnx.load(files["onnx"]))


def test_files_of_others_are_refused(files, tmp_path):
    def refusal(path):
        with pytest.raises(UserError) as caught:
            Exported(path)
        return str(caught.value)

    assert "does not exist" in refusal(tmp_path / "no.onnx") and ".onnx or .pt2" in refusal(tmp_path / "x.bin")
    for form in WRITERS:
        for name, content in (("cut", files[form].read_bytes()[:-2000]), ("text", b"hello"), ("empty", b"")):
            (tmp_path / f"{name}.{form}").write_bytes(content)
            assert "damaged" in refusal(tmp_path / f"{name}.{form}")
    for key, word in (("x", "other inputs"), ("images", "does not say its name")):
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in (key, "y")]
        inner = helper.make_graph([helper.make_node("Identity", [key], ["y"])], "g", values[:1], values[1:])
        foreign = helper.make_model(inner, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        onnx.save(foreign, tmp_path / "f.onnx")
        assert word in refusal(tmp_path / "f.onnx")


@pytest.mark.parametrize("form", list(WRITERS))
def test_wrong_bytes_anywhere_in_an_exported_file_are_refused(form, graph, files, tmp_path):
    whole, file = files[form].read_bytes(), tmp_path / f"x.{form}"
    images, refused = pixels(2, 3, 32, 32), 0
    wanted = Exported(files[form]).run(images)
    generator = np.random.default_rng(0)
    places = [*np.linspace(0, len(whole) - 85, 60).astype(int), *range(len(whole) - 85, len(whole) - 3)]
    damaged = [bytearray(whole) for _ in places]
    for copy, at in zip(damaged, places, strict=True):
        copy[at : at + 4] = bytes(copy[at + k] ^ int(generator.integers(1, 256)) for k in range(4))
    cut = [whole[: len(whole) - k] for k in (1, 64, 81, 83, 84, 100, 2000, len(whole) // 2)]
    for content in (*damaged, *cut, whole + b"x", whole + whole):
        file.write_bytes(content)
        try:
            opened = Exported(file)  # it may, where the seal alone is wrong and no longer looks like one
        except UserError as error:
            refused += 1
            assert re.fullmatch(rf".*x\.{form} .*damaged.* again\.", str(error))
        else:
            assert np.array_equal(opened.run(images), wanted) and opened.metadata == metadata(graph)
    assert refused >= 60 + len(cut)
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match="is no file"):
        Exported(file)


def test_a_digest_covers_int8_and_every_byte(files, tmp_path):
    quantise_dynamic(files["onnx"], tmp_path / "d.onnx")
    for file in (*files.values(), tmp_path / "d.onnx"):
        content = file.read_bytes()
        assert content[-64:].decode() == hashlib.sha256(content[:-64]).hexdigest()
        assert Exported(file).sha256 == hashlib.sha256(content).hexdigest()


def test_onnx_files_that_others_wrote_or_changed_open_without_a_digest(files, tmp_path):
    images = pixels(2, 3, 32, 32)
    wanted = Exported(files["onnx"]).run(images)
    model = onnx.load(files["onnx"])
    onnx.save(model, tmp_path / "again.onnx")
    onnx.save(model, tmp_path / "beside.onnx", save_as_external_data=True, location="weights", size_threshold=4096)
    model.ClearField("doc_string")
    onnx.save(model, tmp_path / "foreign.onnx")
    for name in ("again", "beside", "foreign"):
        assert np.array_equal(Exported(tmp_path / f"{name}.onnx").run(images), wanted)


@pytest.mark.parametrize("place", ["../secret", "{outside}/secret", "link"])
def test_weights_outside_the_folder_of_an_onnx_file_are_not_read(files, tmp_path, place):
    (tmp_path / "in").mkdir()
    model = onnx.load(files["onnx"])
    onnx.save(model, tmp_path / "in/x.onnx", save_as_external_data=True, location="weights", size_threshold=4096)
    Exported(tmp_path / "in/x.onnx")
    (tmp_path / "in/weights").rename(tmp_path / "secret")
    (tmp_path / "in/link").symlink_to("../secret")
    model = onnx.load(tmp_path / "in/x.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = place.format(outside=tmp_path)
    (tmp_path / "in/x.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match=r"x\.onnx cannot be read"):
        Exported(tmp_path / "in/x.onnx")


def test_what_cannot_be_exported_is_said_in_one_sentence(graph, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("operation x has no translation.\nand more")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    monkeypatch.setattr(torch.export, "export", refuse)
    for write in (write_onnx, write_pt2):
        with pytest.raises(
            UserError, match=r"cannot be exported .*\(operation x has no translation\); try the other --to"
        ):
            write(graph, tmp_path / "x", metadata(graph))
    monkeypatch.setattr("metric_kd.deploy.export.LARGEST", 100)
    with pytest.raises(UserError, match="ends at 2 GiB"):
        write_onnx(graph, tmp_path / "x", metadata(graph))
    assert not list(tmp_path.iterdir())


def test_what_a_file_does_not_run_on_is_said(graph, files):
    for file in files.values():
        running_file = Exported(file)
        none = running_file.run(np.zeros((0, 3, 32, 32), np.uint8))
        assert none.shape == running_file.embed([]).shape == (0, 8)
        for images in (pixels(3, 5, 5), pixels(2, 5, 5, 3), pixels(2, 3, 5, 5).float(), pixels(2, 3, 0, 5)):
            with pytest.raises(UserError, match=r"runs on \(N, 3, H, W\) uint8, got"):
                running_file.run(images)
        with pytest.raises(UserError, match="batch is 0"):
            running_file.embed([], batch=0)
        np.testing.assert_array_equal(running_file.embed(pixels(3, 9, 7)), running_file.embed([pixels(3, 9, 7)]))
