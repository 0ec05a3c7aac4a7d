"""`metric-kd analyse RUN --against TEACHER`: how alike student and teacher are inside, on the test images.

Writes analysis.json and cka.png into the run's directory: linear CKA of every layer with every layer, and the noise of
the probabilities of all classes but the likeliest.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from metric_kd.cli.config import DistillConfig, known_keys
from metric_kd.cli.embedding import loader_for
from metric_kd.cli.goals import goal_of, network_spec
from metric_kd.cli.networks import teacher_of
from metric_kd.cli.parse import read_words
from metric_kd.cli.plugins import add_plugins, load_plugins
from metric_kd.cli.session import Session, build, measuring_of
from metric_kd.cli.stored import run_of
from metric_kd.distill.granularity import CodedTeacher, Encoders
from metric_kd.engine.checkpoint import find_checkpoint, read_checkpoint, restore_network, write_atomically, write_text
from metric_kd.errors import UserError
from metric_kd.evaluation.analysis import linear_cka, non_target_noise, representations
from metric_kd.models.backbone import Pixels
from metric_kd.models.network import Network
from metric_kd.report.heat_map import heat_map
from metric_kd.types import Output

LAYERS = ("maps", "pooled", "codes", "embedding", "logits")


class Encoded(nn.Module):
    """A student and the encoders with which it was trained."""

    def __init__(self, network: Network, encoders: Encoders):
        super().__init__()
        self.network, self.encoders = network, encoders
        self.spec, self.provides = network.spec, network.provides | {"codes"}

    def forward(self, images: Tensor, want: tuple[str, ...]) -> Output:
        output = self.network(images, want=tuple({*want, "pooled"} - {"codes"}))
        return output._replace(codes=self.encoders(output.pooled)) if "codes" in want else output


def main(arguments: Sequence[str], program: str | None = None) -> int:
    options = read_words(_parser(program), arguments)
    load_plugins(options.plugins)
    find_checkpoint(options.run)
    run = run_of(options.run)
    config = run.stored_config() or {}
    against = options.against or config.get("teacher_load")
    if against is None:
        raise UserError(f"{options.run} was trained without a teacher; name a network, as in --against RUN_OR_FILE.")
    if Path(against).suffix == ".npy":
        raise UserError(
            f"{against} holds embeddings, which have no layers; name a network, as in --against RUN_OR_FILE."
        )
    if config.get("unlabelled"):
        raise UserError(
            f"{options.run} was trained without labels and has no test images; analyse a run that has some."
        )
    find_checkpoint(against, "teacher")
    run.check_outputs("analysis.json", "cka.png")
    flags = {key: getattr(options, key) for key in ("batch", "device", "pack", "pack_jpeg")}
    session = build(measuring_of(options.run, config, program, options.plugins, **flags))
    for note in session.notes:
        print(note)
    try:
        student, teacher = _networks(session, options.run, against, config)
        found = analysis(session, student, teacher)
    finally:
        session.close()
    report = {"student": str(options.run), "teacher": str(against), **found}
    title = f"Linear CKA on {found['images']} test images of {session.config.dataset}"
    picture = heat_map(found["cka"], found["student_layers"], found["teacher_layers"], (title, "student", "teacher"))
    files = [run.claim_output(name) for name in ("analysis.json", "cka.png")]
    write_text(files[0], json.dumps(report, indent=2) + "\n")
    write_atomically(files[1], lambda file: file.write(picture))
    for name, value in found["noise"].items():
        print(f"noise of {name}: {value:.4f}")
    print(f"linear CKA of the pooled features: {found['pooled_cka']:.4f}")
    print(f"wrote {run.path / 'analysis.json'} and {run.path / 'cka.png'}")
    return 0


def analysis(session: Session, student: nn.Module, teacher: nn.Module) -> dict[str, Any]:
    """Plain numbers: "cka"[student layer][teacher layer], "pooled_cka", and the mean "noise" of each that gives logits."""
    ours = _layers(session, student)
    theirs = _layers(session, teacher)
    noise = {"student": ours, "teacher": theirs}
    values = {name: non_target_noise(layers["logits"]) for name, layers in noise.items() if "logits" in layers}
    if isinstance(teacher, CodedTeacher) and teacher.coders.spec.decodes == "logits":
        teacher.stable = True
        stable = _layers(session, teacher, ("logits",))
        values["stable target"] = non_target_noise(stable["logits"])
    return {
        "images": len(ours["pooled"]),
        "student_layers": list(ours),
        "teacher_layers": list(theirs),
        "cka": [[float(linear_cka(x, y)) for y in theirs.values()] for x in ours.values()],
        "pooled_cka": float(linear_cka(ours["pooled"], theirs["pooled"])),
        "noise": {name: float(value.mean()) for name, value in values.items()},
    }


def _layers(session: Session, network: Any, fields: tuple[str, ...] = LAYERS) -> dict[str, Tensor]:
    want = [field for field in fields if field in network.provides]
    if network.spec.embedding_size == 0 and "embedding" in want:
        want.remove("embedding")  # the pooled feature itself
    batch = session.config.batch
    with loader_for(session, network) as loader:
        total = -(-len(loader.records) // batch)
        return representations(
            network, loader.test(batch), want, device=session.device, progress="looking", total=total
        )


def _networks(session: Session, path: str, against: str, stored: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Student and teacher, each with its encoders where the run was trained with coders of this teacher."""
    student: nn.Module = session.student
    own = stored.get("teacher_load")
    if own is None or not Path(own).exists() or find_checkpoint(against) != find_checkpoint(own):
        teacher: nn.Module | None = restore_network(
            against, network_spec(session.config, "", Pixels(), {}), {}, "teacher"
        )
    else:  # as the run itself read it, from a plain state dict too
        config = DistillConfig(**{key: stored[key] for key in known_keys("distill") if key in stored})
        if config.granularity_load is not None and not Path(config.granularity_load).exists():
            print(f"{config.granularity_load} is not there any more; codes are left out")
            config = replace(config, granularity_load=None)
        teacher = teacher_of(config, frozenset(), goal_of(config).head(session.test.records.num_classes))
    assert teacher is not None
    if isinstance(teacher, CodedTeacher):
        teacher.stable = False  # the target of MAS is looked at on its own
        assert isinstance(student, Network)
        encoders = _encoders(path, student) if stored.get("select") == "last" else None
        student = student if encoders is None else Encoded(student, encoders)
    return student.to(session.device), teacher.to(session.device).eval().requires_grad_(False)


def _encoders(path: str, student: Network) -> Encoders | None:
    """The student's encoders: they lie in last.pth, which belongs to the result only where that is the last epoch."""
    last = run_of(path).last
    if not last.is_file():
        return None
    start = "objective.terms.granularity.encoders."
    state = {
        key.removeprefix(start): value for key, value in read_checkpoint(last)["task"].items() if key.startswith(start)
    }
    if not state:
        return None
    encoders = Encoders(student.pooled_size, len(state["abstract.2.bias"]), len(state["detailed.2.bias"]))
    encoders.load_state_dict(state)
    return encoders


def _parser(program: str | None) -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=program, description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("run", type=str, help="run directory or checkpoint of the student")
    parser.add_argument("--against", type=str, default=None, help="the other network; default the run's teacher")
    parser.add_argument("--batch", type=int, default=256, help="images per forward pass")
    parser.add_argument("--pack", type=str | None, default=None, help="read the images from it, as run.py does")
    parser.add_argument("--pack_jpeg", type=int | None, default=None, help="quality of a --pack of JPEG images")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add_plugins(parser)
    return parser
