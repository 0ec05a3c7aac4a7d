"""Fixed views: the same pixels for the same image and view, whatever else happens; and which of them an epoch shows."""

import numpy as np
import pytest
import torch

from metric_kd.data.loading import ImageLoader
from metric_kd.data.records import ImageRecords
from metric_kd.data.transforms import Geometry
from metric_kd.data.views import Views


@pytest.fixture
def small():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 40, 3), dtype=np.uint8)
    return ImageRecords("small", np.arange(20) % 5, tuple("abcde"), pixels=pixels)


@pytest.fixture
def files(tmp_path, picture):
    paths = [tmp_path / "images" / f"{k:02d}.png" for k in range(6)]
    for k, path in enumerate(paths):
        picture(path, (120, 130), seed=k)
    return ImageRecords("files", np.arange(6) % 2, ("a", "b"), paths=tuple(map(str, paths)))


def by_view(batches) -> dict:
    """(row, view) -> pixels, all of which must agree."""
    found: dict = {}
    for batch in batches:
        for image, row, view in zip(batch.images, batch.indices.tolist(), batch.views.tolist(), strict=True):
            assert torch.equal(found.setdefault((row, view), image), image)
    return found


def test_a_view_is_the_crop_that_its_seed_row_and_number_draw(small):
    geometry = Geometry(32, resize=40)
    loader = ImageLoader(small, geometry, seed=3, views=Views(4, seed=9))
    batch = loader.fixed(np.array([7, 2, 7]), np.array([0, 3, 2]))
    assert batch.views.tolist() == [0, 3, 2] and batch.indices.tolist() == [7, 2, 7]
    for image, row, view in zip(batch.images, [7, 2, 7], [0, 3, 2], strict=True):
        top, left, flip = (int(column[0]) for column in geometry.draw(9, view, np.array([row]), 40))
        crop = small.pixels[row, top : top + 32, left : left + 32]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), crop[:, ::-1] if flip else crop)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_pixels_in_every_epoch_batch_process_and_run(files, workers):
    geometry = Geometry(96, teacher_input_size=48)
    loader = ImageLoader(files, geometry, seed=1, workers=workers, views=Views(3))
    orders = ([np.arange(6)], [np.array([5, 1]), np.array([0, 2, 4, 3])])
    epochs = [batch for epoch in range(1, 9) for batch in loader.train(orders[epoch % 2], epoch)]
    loader.close()
    other = ImageLoader(files, geometry, seed=2, views=Views(3))
    found = by_view([*epochs, *other.train([np.arange(6)], 1), *other.every_view([np.arange(4), np.arange(4, 6)])])
    assert len(found) == 18, "every view of every image"
    different = {image.numpy().tobytes() for image in found.values()}
    assert len(different) == 18, "the views differ"


def test_every_view_stands_row_by_row(small):
    loader = ImageLoader(small, Geometry(32), views=Views(3))
    batches = list(loader.every_view([np.array([4, 5]), np.array([6])]))
    assert batches[0].indices.tolist() == [4, 4, 4, 5, 5, 5] and batches[0].views.tolist() == [0, 1, 2] * 2
    assert len(batches[1].images) == 3
    plain = ImageLoader(small, Geometry(32))
    (batch,) = plain.every_view([np.array([4, 5])])
    assert batch.views is None and torch.equal(batch.images, plain.fixed(np.array([4, 5]), None).images)
    assert torch.equal(batch.images, next(plain.test(20)).images[4:6]), "without views it is the test view"


def test_one_view_never_moves_and_without_views_each_epoch_is_new(small):
    rows = [np.arange(20)]

    def shown(views, epoch):
        return next(iter(ImageLoader(small, Geometry(32), views=views).train(rows, epoch)))

    assert torch.equal(shown(Views(1), 1).images, shown(Views(1), 2).images)
    assert shown(Views(1), 2).views.tolist() == [0] * 20
    assert not torch.equal(shown(None, 1).images, shown(None, 2).images) and shown(None, 1).views is None


def test_which_view_is_shown_is_drawn_evenly_and_anew_by_seed_epoch_and_row():
    rows, views = np.arange(6000), Views(5)
    shown = views.shown(3, 7, rows)
    counts = np.bincount(shown, minlength=5)
    assert len(counts) == 5 and (abs(counts - 1200) < 5 * np.sqrt(1200 * 0.8)).all()
    for other in (views.shown(4, 7, rows), views.shown(3, 8, rows), views.shown(3, 7, rows + 6000)):
        assert abs((other == shown).mean() - 0.2) < 5 * np.sqrt(0.16 / 6000)
    assert np.array_equal(views.shown(3, 7, rows[::-1])[::-1], shown), "a function of the row, not of its place"
    assert np.array_equal(shown, Views(5, seed=8).shown(3, 7, rows)), "the seed of the crops does not choose"
    # The choice must not follow the crop of the chosen view: a run's seed may be that of the views.
    top = Geometry(32).draw(3, 2, rows, 37).top
    chosen = top[Views(5, seed=3).shown(3, 2, rows) == 2]
    assert abs(chosen.mean() - top.mean()) < 0.3


def test_without_the_teacher_the_student_sees_the_same(small):
    loader = ImageLoader(small, Geometry(24, teacher_input_size=32), views=Views(2))
    before = next(iter(loader.train([np.arange(5)], 1)))
    loader.forget_teacher()
    after = next(iter(loader.train([np.arange(5)], 1)))
    assert before.teacher_images.shape[-1] == 32 and after.teacher_images is None
    assert torch.equal(before.images, after.images) and torch.equal(before.views, after.views)


def test_workers_that_are_kept_forget_the_teacher_too(files):
    loader = ImageLoader(files, Geometry(96, teacher_input_size=112), workers=2)
    assert all(batch.teacher_images is not None for batch in loader.train([np.arange(3), np.arange(3, 6)], 0))
    loader.forget_teacher()
    assert all(batch.teacher_images is None for batch in loader.train([np.arange(3), np.arange(3, 6)], 1))
    loader.close()


def test_the_first_view_or_the_test_view(small):
    rows = np.array([4, 2])
    for views in (Views(3), None):
        loader = ImageLoader(small, Geometry(24, teacher_input_size=32), views=views)
        batch, fixed = loader.first_view(rows), loader.fixed(rows, None if views is None else np.zeros(2, np.int64))
        assert torch.equal(batch.images, fixed.images) and batch.indices.tolist() == [4, 2]
        assert (batch.views is None) if views is None else batch.views.tolist() == [0, 0]
        assert batch.seen_by_teacher is batch.teacher_images
        loader.forget_teacher()
        alone = loader.first_view(rows)
        assert alone.seen_by_teacher is alone.images
