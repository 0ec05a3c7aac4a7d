"""The benchmarks' table, their merging of results, and the plain formulas that they compare with. Nothing is timed."""

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import ROOT, THREADS, write_images

HERE = ROOT / "benchmarks"
MACHINE = {
    "cpu": "A CPU", "cores": 2, "gpu": None, "torch": "2.9", "python": "3.12", "date": "2026-01-02",
    "revision": "abc1234+", "quick": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    """name -> module of benchmarks/; "run" is not the script of that name in the root."""
    sys.path.insert(0, str(HERE))
    found = {}

    def module(name: str):
        if name != "run":
            return importlib.import_module(name)
        if name not in found:
            spec = importlib.util.spec_from_file_location("benchmarks_run", HERE / "run.py")
            found[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(found[name])
        return found[name]

    yield module
    sys.path.remove(str(HERE))


def entry(bench, module="angle", allocator="default", rows=(), **machine):
    plain = [bench("table").plain(row) for row in rows]
    return {"module": module, "allocator": allocator, "machine": {**MACHINE, **machine}, "rows": plain}


def row(bench, name="angle", ratio=20.0, target=None, **more):
    measure = bench("measure")
    values = {"size": "N=8", "ours": 1.5, "peer": 30.0, "against": "formula", **more}
    return measure.Row(name=name, ratio=ratio, target=target or measure.Target(time=18, tuned=15), **values)


def test_every_benchmark_has_rows(bench):
    for name in bench("run").MODULES:
        assert callable(bench(f"bench_{name}").rows), name


def test_a_row_survives_json(bench):
    table = bench("table")
    for one in (row(bench), row(bench, ratio=None, peer=None, memory_ratio=2.0, target=bench("measure").Target())):
        assert table.restored(json.loads(json.dumps(table.plain(one)))) == one


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123, "0.00123"), (0.5, "0.5"), (1.234, "1.23"), (12.34, "12.3"), (99.96, "100"), (1234.5, "1,234"), (3, "3")],
)
def test_figures_have_three_digits_and_no_exponent(bench, value, text):
    assert bench("table").figure(value) == text


def test_one_line_for_both_allocators(bench):
    rows = {"default": row(bench, ratio=20.0), "tuned": row(bench, ratio=16.0, ours=9.0)}
    line = bench("table").line(rows)
    assert line == "| angle | N=8 | 1.5 ms | 30 ms (formula) | 20 / 16 | - | 18 times as fast (15 tuned) | yes |"
    alone = bench("table").line({"tuned": row(bench, ratio=14.0)})
    assert "| - / 14 |" in alone and alone.endswith("| no |")


@pytest.mark.parametrize(
    ("target", "default", "tuned", "expected"),
    [
        ({}, {"ratio": 1.0}, None, ""),
        ({"time": 18, "tuned": 15}, {"ratio": 18.0}, {"ratio": 15.0}, "yes"),
        ({"time": 18, "tuned": 15}, {"ratio": 17.9}, {"ratio": 15.0}, "tuned allocator only"),
        ({"time": 18, "tuned": 15}, {"ratio": 18.0}, {"ratio": 14.9}, "default allocator only"),
        ({"time": 18}, {"ratio": 18.0}, {"ratio": 17.0}, "default allocator only"),  # one target for both
        ({"time": 2, "memory": 10}, {"ratio": 3.0, "memory_ratio": 9.0}, None, "no"),
        ({"time": 2, "memory": 10}, {"ratio": 3.0}, None, "no"),  # not measured is not reached
        ({"time": 2}, {"ratio": None}, None, "no"),
        ({"time": 2}, {"ratio": 1.0}, {"ratio": 1.0}, "no"),
        ({"most": 128}, {"ratio": None, "ours": 128.0}, {"ratio": None, "ours": 129.0}, "default allocator only"),
        ({"most": 128}, {"ratio": None, "ours": 128.0}, None, "yes"),
    ],
)
def test_reached(bench, target, default, tuned, expected):
    rows = {"default": row(bench, target=bench("measure").Target(**target), **default)}
    if tuned is not None:
        rows["tuned"] = row(bench, target=bench("measure").Target(**target), **tuned)
    assert bench("table").reached(rows) == expected


def test_targets_in_words(bench):
    table, target = bench("table"), bench("measure").Target
    assert table.words(target(time=1 / 1.4), "ms") == "at most 1.4 times its time"
    assert table.words(target(time=7, memory=12), "ms") == "7 times as fast, 12 times less memory"
    assert table.words(target(most=128), "MiB") == "at most 128 MiB"
    assert table.words(target(), "ms") == ""


def test_tables_by_clock_join_the_allocators(bench):
    wall = bench("measure").WALL
    entries = [
        entry(bench, allocator="tuned", rows=[row(bench, ratio=16.0)]),
        entry(bench, rows=[row(bench, ratio=20.0), row(bench, name="step", clock=wall)]),
    ]
    first, second = bench("table").tables(entries).split("\n\n2 threads")
    assert first.startswith(
        "1 thread, CPU time; A CPU, 2 cores, PyTorch 2.9, 2026-01-02, revision abc1234 with changes."
    )
    assert first.count("| angle |") == 1 and "| 20 / 16 |" in first
    assert "| step |" in second and "| step |" not in first


def test_merging_replaces_the_rows_that_were_run(bench):
    run = bench("run")
    old = entry(bench, rows=[row(bench, ratio=1.0), row(bench, name="kept", ratio=2.0)], date="2025-01-01")
    others = [entry(bench, "pairs", rows=[row(bench)]), entry(bench, allocator="tuned", rows=[row(bench, ratio=3.0)])]
    new = entry(bench, rows=[row(bench, ratio=9.0)])
    found = run.merged([old, *others], new)
    assert [(e["module"], e["allocator"], [r["ratio"] for r in e["rows"]]) for e in found] == [
        ("angle", "default", [2.0]),
        ("angle", "default", [9.0]),
        ("angle", "tuned", [3.0]),
        ("pairs", "default", [20.0]),
    ]
    assert found[0]["machine"]["date"] == "2025-01-01"
    assert run.merged(found, entry(bench, rows=[])) == found


def test_results_and_readme_are_written_and_read_again(bench, tmp_path):
    run, results, readme = bench("run"), tmp_path / "results.json", tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    entries = [entry(bench, rows=[row(bench)])]
    run.write(entries, results, readme)
    assert run.read(results) == entries
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks -->\n\n1 thread") and text.endswith(
        "\n<!-- /benchmarks -->\nafter\n"
    )
    assert "old" not in text
    run.write(entries, results, readme)
    assert readme.read_text() == text
    assert run.read(tmp_path / "none.json") == []


def test_a_run_merges_and_names_what_failed(bench, tmp_path, monkeypatch, capsys):
    run, results = bench("run"), tmp_path / "results.json"
    asked = []

    def measured(module, allocator, quick, photos):
        asked.append((module, allocator, quick))
        return None if allocator == "tuned" else [bench("table").plain(row(bench, name=module))]

    monkeypatch.setattr(run, "measured", measured)
    assert run.main(["--quick", "--only", "pairs", "--results", str(results), "--allocator", "default"]) == 0
    assert run.main(["--quick", "--only", "angle", "--results", str(results)]) == 1
    assert asked == [("pairs", "default", True), ("angle", "default", True), ("angle", "tuned", True)]
    assert [e["module"] for e in run.read(results)] == ["angle", "pairs"]
    said = capsys.readouterr()
    assert "angle (tuned) failed" in said.err and "| pairs |" in said.out


def test_a_row_goes_through_a_process_of_its_own(bench, tmp_path, monkeypatch):
    (tmp_path / "bench_small.py").write_text(
        "import os\nfrom measure import Row\n\n\ndef rows(quick):\n"
        "    tuned = 'GLIBC_TUNABLES' in os.environ\n"
        "    return [Row('small', 'quick' if quick else 'full', float(tuned), None, None)]\n"
    )
    (tmp_path / "measure.py").symlink_to(HERE / "measure.py")
    (tmp_path / "table.py").symlink_to(HERE / "table.py")
    run = bench("run")
    monkeypatch.setattr(run, "HERE", tmp_path)
    found = run.measured("small", "tuned", True, None)
    assert [(r["name"], r["size"], r["ours"]) for r in found] == [("small", "quick", 1.0)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--only", "angel"], "unknown benchmark 'angel'; did you mean 'angle'?"),
        (["--allocator", "jemalloc"], "invalid choice"),
        (["--photos", "nowhere"], "--photos nowhere is no folder"),
        (["--readme", "nowhere.md"], "--readme nowhere.md does not exist"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
)
def test_wrong_arguments_give_one_sentence(bench, words, sentence, capsys):
    assert bench("run").main(["--quick", *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_files_that_cannot_be_used_are_refused_first(bench, tmp_path, monkeypatch, capsys):
    run = bench("run")
    monkeypatch.setattr(run, "measured", lambda *_: pytest.fail("nothing may be measured"))
    readme, results = tmp_path / "README.md", tmp_path / "results.json"
    for text in ("no marks\n", "<!-- /benchmarks -->\n<!-- benchmarks -->\n"):
        readme.write_text(text)
        assert run.main(["--quick", "--readme", str(readme)]) == 2
        assert "has no place for the table" in capsys.readouterr().err
    for text in ("[]", "{", '{"format": 1, "entries": [{"rows": [{}]}]}'):
        results.write_text(text)
        assert run.main(["--quick", "--results", str(results)]) == 2
        assert "holds no results of this program" in capsys.readouterr().err


def test_the_readme_has_a_place_for_the_table(bench):
    bench("table").check_marks((ROOT / "README.md").read_text(), ROOT / "README.md")


def test_medians_are_of_rounds_and_rounds_go_back_and_forth(bench):
    measure, order, now = bench("measure"), [], [0.0]

    def work(name, seconds):
        def call():
            order.append(name)
            now[0] += seconds

        return call

    found = measure.interleaved({"a": work("a", 1.0), "b": work("b", 3.0)}, 2, 0.05, clock=lambda: now[0])
    assert found == {"a": [1.0, 1.0], "b": [3.0, 3.0]} and order == ["a", "b", "a", "b", "b", "a"]
    got = measure.compared("n", "s", found, "a", "b", measure.Target())
    assert (got.ours, got.peer, got.ratio, got.against) == (1000.0, 3000.0, 3.0, "b")


def test_plain_formulas_of_losses_and_samplers(bench):
    for name in ("bench_angle", "bench_pairs"):
        bench(name).assert_parity()


def test_parity_of_the_gpu_benchmark_can_fail(bench):
    cuda = bench("bench_cuda")
    for name in ("RKD angle", "RKD distance", "DarkRank", bench("bench_pairs").TRIPLETS):
        found = cuda.steps(name, 20, 6, device="cpu")
        cuda.assert_parity(found)
        ours = next(key for key in found if key != "plain")
        value, gradient = found[ours]()
        with pytest.raises(AssertionError):
            cuda.assert_parity({**found, ours: lambda value=value, gradient=gradient: (value, 1.01 * gradient)})


def test_plain_recall(bench):
    recall = bench("bench_recall")
    x = torch.randn(60, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(60) % 6
    assert recall.plain_recall(x, labels) == pytest.approx(recall.recall(x, labels, recall.KS), abs=1e-6)
    out = torch.empty(60, 60)
    buffer = recall.product(x)
    buffer()
    assert torch.mm(x, x.T, out=out).isfinite().all()


def small_networks(bench):
    """(student, teacher), both the smaller of the two."""
    step = bench("bench_step")
    torch.manual_seed(0)
    return [step.build_network(replace(spec, base="resnet18")) for spec in (step.STUDENT, step.TEACHER)]


def test_plain_step_is_ours(bench, monkeypatch):
    step = bench("bench_step")
    monkeypatch.setattr(step, "networks", lambda: small_networks(bench))
    batch = step.batch_of(6, side=64, per_class=2)
    step.assert_parity(batch)
    original = step.plain_rkd_angle
    monkeypatch.setattr(step, "plain_rkd_angle", lambda s, t: 1.1 * original(s, t))
    with pytest.raises(AssertionError):
        step.assert_parity(batch)


@pytest.mark.slow
def test_an_epoch_runs_on_files_that_it_makes(bench, monkeypatch, tmp_path):
    """Both sides, with one iteration and small networks."""
    epoch, step = bench("bench_epoch"), bench("bench_step")
    for module in (epoch, step):
        monkeypatch.setattr(module, "networks", lambda: small_networks(bench))
    monkeypatch.setattr(epoch, "THREADS", 1)
    made = epoch.make_photos(tmp_path / "made", classes=2, per_class=2)
    assert sum(1 for _ in made.rglob("*.jpg")) == 4
    assert 20_000 < np.mean([file.stat().st_size for file in made.rglob("*.jpg")]) < 400_000
    rows = epoch.rows(photos=str(made), plan=epoch.Plan(batch=4, iterations=1, turns=1, views=2))
    assert [row.target.time for row in rows] == [4, None, None, None]
    assert all(row.ours > 0 for row in rows) and rows[0].peer == rows[1].peer
    assert torch.get_num_threads() == int(THREADS)


def test_plain_normalisation_and_chain(bench, tmp_path):
    data = bench("bench_data")
    from metric_kd.data.folder import scan

    records = scan(write_images(tmp_path / "images", classes=2, per_class=2, size=256), "photos")
    assert data.worst_agreement(records) >= 50
    image, label = data.PlainPhotos(records)[0]
    assert image.shape == (3, 224, 224) and label == 0


@pytest.mark.slow
def test_the_million_in_small():
    pytest.importorskip("faiss")
    words = ["--count", "2000", "--dimensions", "8", "--factories", "Flat", "IVF8,PQ4+float16"]
    script = [sys.executable, str(HERE / "index_million.py"), *words]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Flat .* 100\.0% +100\.0%$", done.stdout, re.MULTILINE)
    assert "IVF8,PQ4+float16 " in done.stdout and "the libraries alone" in done.stdout
