#!/usr/bin/env bash
# Every method of the Knowledge-Distillation-Zoo on CIFAR-100, resnet110 -> resnet20: the teacher, then one table over
# three seeds, beside the student alone and alone for longer. Published figures: comments in examples/cifar_zoo.yaml.
# Needs CIFAR-100 (downloaded into data/ if it can be) and a GPU; from the repository root. It may be stopped and started
# again; `metric-kd compare examples/cifar_zoo.yaml --dry_run` shows how far it is.
set -euo pipefail
python run.py --task classification --preset zoo --dataset cifar100 --base resnet110 --save_dir runs/cifar100-resnet110
metric-kd compare examples/cifar_zoo.yaml
