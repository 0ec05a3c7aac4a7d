"""Relational distillation in a hand-written loop: no trainer, no config, on the embedded glyphs.

    python examples/minimal_loop.py [--steps 100] [--teacher RUN]

Without --teacher an untrained network stands in for one, which shows the loop but teaches nothing of use.
"""

import argparse

import torch

import metric_kd
import metric_kd.functional as KD
from metric_kd.data import ClassBalancedBatches, Geometry, ImageLoader, load_dataset
from metric_kd.evaluation.embed import embed
from metric_kd.evaluation.retrieval import evaluate_retrieval
from metric_kd.models import NetworkSpec, build_network

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--teacher", help="a run that `make demo` or run.py left, for example demo/teacher")
options = parser.parse_args()

torch.manual_seed(0)
splits = load_dataset("glyphs", "data")
train = ImageLoader(splits.train, Geometry(input_size=32))
test = ImageLoader(splits.test, Geometry(input_size=32))
teacher = build_network(NetworkSpec("resnet8_x2:stem_stride=2")).eval().requires_grad_(False)
if options.teacher:
    teacher = metric_kd.load(options.teacher).network
student = build_network(NetworkSpec("resnet8_x0.5:stem_stride=2", embedding_size=16))
optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, fused=True)

batches = ClassBalancedBatches(splits.train.labels, batch=100, per_class=5, iterations=options.steps, seed=0)
student.train()
for batch in train.train(batches.epoch(1), epoch=1):
    s, t = student(batch.images).embedding, teacher(batch.images).embedding
    loss = KD.rkd_distance(s, t) + 2 * KD.rkd_angle(s, t)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

metrics, _ = evaluate_retrieval(embed(student, test.test(250)), [1, 4])
print(f"loss {loss.item():.4f}, Recall@1 {100 * metrics['recall@1']:.2f}, Recall@4 {100 * metrics['recall@4']:.2f}")
