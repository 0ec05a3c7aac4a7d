#!/usr/bin/env bash
# Table 1 of Park et al., Relational Knowledge Distillation (CVPR 2019, arXiv 1904.05068), Cars-196.
# Needs the data set (downloaded into data/ if it can be) and a GPU; from the repository root.
set -euo pipefail
python run.py --mode train --dataset cars196 --base resnet50 --sample distance --margin 0.2 --embedding_size 512 \
    --batch 128 --epochs 40 --lr 1e-5 --lr_decay_epochs 25 30 35 --lr_decay_gamma 0.5 --save_dir runs/cars196-teacher
for size in 16 32 64 128; do
    python run_distill.py --dataset cars196 --base resnet18 --embedding_size "$size" --l2normalize false \
        --teacher_load runs/cars196-teacher --dist_ratio 1 --angle_ratio 2 \
        --batch 128 --epochs 80 --lr 1e-4 --lr_decay_epochs 40 60 --lr_decay_gamma 0.1 --save_dir "runs/cars196-resnet18-$size"
done
# Self-distillation (table 2): the student is a ResNet-50 as well.
python run_distill.py --dataset cars196 --base resnet50 --embedding_size 512 --l2normalize false \
    --teacher_load runs/cars196-teacher --dist_ratio 1 --angle_ratio 2 \
    --batch 128 --epochs 80 --lr 1e-4 --lr_decay_epochs 40 60 --lr_decay_gamma 0.1 --save_dir runs/cars196-resnet50-self
