#!/usr/bin/env bash
# Table 1 of Park et al., Relational Knowledge Distillation (CVPR 2019, arXiv 1904.05068), Stanford Online Products.
# Needs the data set (downloaded into data/ if it can be) and a GPU; from the repository root.
set -euo pipefail
python run.py --mode train --dataset stanford --base resnet50 --sample distance --margin 0.2 --embedding_size 512 \
    --batch 128 --epochs 40 --iter_per_epoch 1000 --lr 1e-5 --lr_decay_epochs 25 30 35 --lr_decay_gamma 0.5 \
    --save_dir runs/stanford-teacher
python run_distill.py --dataset stanford --base resnet18 --embedding_size 64 --l2normalize false \
    --teacher_load runs/stanford-teacher --dist_ratio 1 --angle_ratio 2 \
    --batch 128 --epochs 120 --iter_per_epoch 500 --lr 1e-4 --lr_decay_epochs 40 80 --lr_decay_gamma 0.1 \
    --save_dir runs/stanford-resnet18-64
