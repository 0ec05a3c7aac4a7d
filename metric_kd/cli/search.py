"""`metric-kd search FILE --query IMAGE`: the nearest images of an index."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from metric_kd.cli.parse import read_words
from metric_kd.cli.plugins import add_plugins, load_plugins
from metric_kd.data.decode import decode
from metric_kd.deploy.names import shown
from metric_kd.deploy.searcher import Hit, Searcher, check_k
from metric_kd.devices import check_device
from metric_kd.errors import UserError


def main(arguments: Sequence[str], program: str | None = None) -> int:
    options = read_words(_parser(program), arguments)
    load_plugins(options.plugins)
    check_device(options.device)
    if not (options.query or options.measure):
        raise UserError("there is nothing to search for; give --query IMAGE, or --measure.")
    if options.page is not None and not options.query:
        raise UserError("--page shows what queries find; give --query IMAGE.")
    if options.page is not None and (Path(options.page).is_dir() or Path(options.page).suffix not in (".html", ".htm")):
        raise UserError(f"--page {options.page} must be a file that ends in .html.")
    if options.json and options.measure:
        raise UserError("--json is for what queries find, and --measure prints a sentence; give one of them.")
    _check_readable(options.query)
    searcher = Searcher(options.file, options.model, options.images, options.device, options.bridge)
    if options.query:
        check_k(options.k, len(searcher))
    searcher.check_nprobe(options.nprobe)
    if options.query:
        found = searcher.search(list(options.query), options.k, options.nprobe)
        page = None if options.page is None else _write_page(Path(options.page), searcher, options.query, found)
        print(_as_json(options.query, found) if options.json else _as_text(options.query, found, options.k))
        if page is not None and not options.json:
            print(f"wrote {shown(page)}")
    if options.measure:
        print(searcher.measure(options.nprobe).sentence(searcher.factory))
    return 0


def _check_readable(queries: Sequence[str]) -> None:
    for query in queries:
        try:
            decode(query)
        except UserError as error:
            reason = str(error).removeprefix(f"cannot read the image {query} (").partition("); repair")[0]
            raise UserError(f"cannot read the query {shown(query)} ({reason}); give a whole image file.") from error


def _as_text(queries: Sequence[str], found: Sequence[Sequence[Hit]], k: int) -> str:
    lines = []
    for query, hits in zip(queries, found, strict=True):
        if len(queries) > 1:
            lines.append(f"{shown(query)}:")
        lines += [f"{rank:>3}  {hit.distance:.4f}  {shown(hit.path)}" for rank, hit in enumerate(hits, 1)]
        if len(hits) < k:
            lines.append(f"only {len(hits)} of {k} were found; look further with a larger --nprobe")
    return "\n".join(lines)


def _as_json(queries: Sequence[str], found: Sequence[Sequence[Hit]]) -> str:
    def hits(of: Sequence[Hit]) -> list[dict[str, Any]]:
        return [{"rank": n, "distance": hit.distance, "path": hit.path} for n, hit in enumerate(of, 1)]

    return json.dumps([{"query": query, "found": hits(of)} for query, of in zip(queries, found, strict=True)], indent=1)


def _write_page(path: Path, searcher: Searcher, queries: Sequence[str], found: Sequence[Sequence[Hit]]) -> Path:
    from metric_kd.report.search_page import Asked, Found, write_search_page

    about = searcher.about

    def name(hit: Hit) -> str:
        return os.path.relpath(hit.path, searcher.images)

    asked = [
        Asked(shown(Path(query).name), query, tuple(Found(shown(name(hit)), hit.path, hit.distance) for hit in hits))
        for query, hits in zip(queries, found, strict=True)
    ]
    asking = searcher.model()
    by_student = {"Queries by": f"{asking.what} ({shown(asking.path)})"} if asking.digest != about.model_digest else {}
    facts = {
        "Images": f"{len(searcher):,} in {shown(searcher.images)}",
        "Model": f"{about.model} ({shown(about.model_path)})",
        **by_student,
        "Index": f"{shown(str(searcher.file))}, {searcher.factory}",
        "Embeddings": f"{about.dimensions} numbers each" + (", of length 1" if about.normalised else ""),
    }
    return write_search_page(path, asked, count=len(searcher), facts=facts)


def _parser(program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("file", type=str, help="what metric-kd index wrote")
    parser.add_argument("--query", type=str, nargs="+", default=[], help="image files to search for")
    parser.add_argument("--k", type=int, default=10, help="images to find for each")
    parser.add_argument(
        "--nprobe", type=int | None, default=None, help="lists to look into (IVF) or candidates to follow (HNSW)"
    )
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="the model of the index, moved or exported; or a student of it",
    )
    parser.add_argument("--bridge", action="store_true", help="through the bridge that is stored with the student")
    parser.add_argument("--images", type=str | None, default=None, help="the folder of the images, where it has moved")
    parser.add_argument("--page", type=str | None, default=None, help="also write what was found as one HTML page")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--measure", action="store_true", help="what the index loses against exact search, and its cost"
    )
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add_plugins(parser)
    return parser
