"""Galleries mark right and wrong as the labels say, and count every query once."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from metric_kd.data.records import ImageRecords
from metric_kd.errors import UserError
from metric_kd.report.gallery import pixels_of, retrieval_gallery
from metric_kd.report.pictures import photograph
from metric_kd.types import Neighbours

NAMES = ("zero", "one", "two")


def images(row):
    """A picture that says which row it is."""
    return np.full((8, 8, 3), row, np.uint8)


def row_of(picture):
    kind, content = picture.source.split(";base64,")
    assert kind == "data:image/png"
    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))[0, 0, 0])


def test_groups_and_counts_of_two_networks(labels):
    def found(first):
        indices = torch.tensor([first]).T
        return Neighbours(indices, torch.zeros(6, 1), labels, labels)

    before = found([1, 2, 3, 0, 0, 4])  # right: yes no yes no no yes
    after = found([1, 0, 3, 2, 1, 0])  # right: yes yes yes yes no no
    gallery = retrieval_gallery({"A": before, "B": after}, images, NAMES, compare=("A", "B"), k=1, per_group=9)
    shown = {group.key: sorted(row_of(row.picture) for row in group.rows) for group in gallery.groups}
    assert shown == {"fixed": [1, 3], "broken": [5], "both_right": [0, 2], "both_wrong": [4]}
    assert {group.key: group.count for group in gallery.groups} == {k: len(v) for k, v in shown.items()}
    assert gallery.queries == sum(group.count for group in gallery.groups) == 6


def test_tiles_are_the_neighbours_with_right_and_wrong(networks, labels):
    gallery = retrieval_gallery(networks, images, NAMES, compare=("Alone", "Distilled"), k=3, per_group=6)
    seen = 0
    for group in gallery.groups:
        for row in group.rows:
            query = row_of(row.picture)
            assert row.name == NAMES[labels[query]] and NAMES[labels[query]] in row.picture.alt
            for name, tiles in row.found:
                neighbours = networks[name].indices[query].tolist()
                assert [row_of(tile.picture) for tile in tiles] == neighbours
                for tile, neighbour in zip(tiles, neighbours, strict=True):
                    assert tile.right == bool(labels[neighbour] == labels[query])
                    assert tile.name == NAMES[labels[neighbour]]
                    assert tile.picture.alt.endswith("right" if tile.right else "wrong") and name in tile.picture.alt
                seen += 1
    assert seen == 2 * 6


def test_gallery_images_of_their_own(labels):
    found = Neighbours(torch.tensor([[1, -1]]), torch.tensor([[0.1, torch.inf]]), labels[:1], labels[:2])
    gallery = retrieval_gallery({"Only": found}, images, NAMES, k=2, gallery_images=lambda row: images(100 + row))
    (row,) = gallery.groups[1].rows
    (tile,) = row.found[0][1]  # the missing neighbour has no tile
    assert (row_of(row.picture), row_of(tile.picture), tile.right) == (0, 101, True)
    assert gallery.groups[0].rows == () and gallery.groups[0].count == 0 and gallery.compared is None


def test_queries_are_of_different_classes_and_repeatable():
    labels = torch.arange(5).repeat_interleave(20)
    found = Neighbours(torch.arange(100)[:, None] ^ 1, torch.zeros(100, 1), labels, labels)

    def shown(seed):
        gallery = retrieval_gallery({"A": found}, images, "abcde", k=1, per_group=5, seed=seed)
        return [row_of(row.picture) for row in gallery.groups[1].rows]

    assert {row // 20 for row in shown(0)} == {0, 1, 2, 3, 4}
    assert shown(0) == shown(0) != shown(1)


def test_refuses_what_does_not_fit(networks, labels):
    with pytest.raises(UserError, match="shows 9 neighbours and Alone has 3"):
        retrieval_gallery(networks, images, NAMES, k=9)
    with pytest.raises(UserError, match="give the neighbours of both"):
        retrieval_gallery(networks, images, NAMES, compare=("Alone", "Teacher"), k=1)
    other = networks["Alone"]._replace(query_labels=labels.flip(0))
    with pytest.raises(UserError, match="other images"):
        retrieval_gallery({"Alone": networks["Alone"], "B": other}, images, NAMES, k=1)


def test_images_from_pixels_and_from_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    labels = np.array([0, 0, 1])
    of_pixels = pixels_of(ImageRecords("x", labels, ("a", "b"), pixels=pixels))
    paths = tuple(str(tmp_path / f"{k}.png") for k in range(3))
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    records = ImageRecords("x", labels, ("a", "b"), paths=paths)
    for k in range(3):
        assert np.array_equal(of_pixels(k), pixels[k]) and np.array_equal(pixels_of(records)(k), pixels[k])
    assert np.array_equal(pixels_of(records, np.array([2, 0]))(1), pixels[0])


def test_large_images_become_thumbnails():
    large = photograph(np.zeros((600, 300, 3), np.uint8), "black")
    assert large.source.startswith("data:image/jpeg;base64,") and not large.pixelated and len(large.source) < 5000
    assert photograph(np.zeros((64, 32, 3), np.uint8), "black").pixelated
    with pytest.raises(ValueError, match="uint8"):
        photograph(np.zeros((3, 8, 8)), "wrong")
