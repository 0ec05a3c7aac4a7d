"""Distil between two modules of your own: the losses are functions of tensors, and hooks fetch what lies inside.

python examples/distil_any_module.py
"""

import torch
from torch import nn

import metric_kd.functional as KD
from metric_kd.models.taps import Taps, layer_names

torch.manual_seed(0)
teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, 256), nn.ReLU(), nn.Linear(256, 64)).eval().requires_grad_(False)
student = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 8))
print("layers of the teacher:", ", ".join(layer_names(teacher)))

optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
images = torch.rand(64, 3, 4, 4)
for step in range(201):
    with Taps(teacher, ["2"]) as inside, torch.no_grad():
        t = teacher(images)
    s = student(images)
    loss = KD.rkd_distance(s, t) + 2 * KD.rkd_angle(s, t) + 0.1 * KD.rkd_distance(s, inside.values["2"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step:3}  loss {loss.item():.4f}")
