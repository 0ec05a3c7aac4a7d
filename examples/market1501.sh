#!/usr/bin/env bash
# Re-identification on Market-1501 with multi-granularity distillation and RKD (Shao and Chen, Multi-granularity for Knowledge
# Distillation, 2021, arXiv 2108.06681, table rows 9 and 10). Needs Market-1501 in data/ (put there by hand: its public links
# are gone) and a GPU; from the repository root. Every run prints CMC Rank-1/5/10 and mAP across cameras.
#
# The paper's rows are MAS with RKD: `--classifier true` gives teacher and student a classifier of the 751 training people
# beside the embedding, whose logits the stable target averages; what ships and is measured is the embedding. Images become
# squares of 256 px, not 256 x 128. The program that comes with the paper has no re-identification, so the networks, the
# optimiser and the schedule below are ours. A batch is 16 people with 4 images each.
set -euo pipefail

python run.py --dataset market1501 --base resnet50 --embedding_size 512 --input_size 256 --batch 64 \
    --num_image_per_class 4 --classifier true --loss cross_entropy:1 --loss l2_triplet:1,sample=hard,margin=0.3 \
    --lr 1e-4 --epochs 60 --iter_per_epoch 200 \
    --lr_decay_epochs 30 45 --lr_decay_gamma 0.1 --save_dir runs/market1501-teacher
metric-kd granularity --teacher_load runs/market1501-teacher --save_dir runs/market1501-coders

# Row by row: the student alone, with RKD, and with MAS and RKD; all start from the same weights.
python run.py --dataset market1501 --base resnet18 --embedding_size 128 --input_size 256 --batch 64 \
    --num_image_per_class 4 --classifier true --loss cross_entropy:1 --loss l2_triplet:1,sample=hard,margin=0.3 \
    --lr 1e-4 --epochs 60 --iter_per_epoch 200 \
    --lr_decay_epochs 30 45 --lr_decay_gamma 0.1 --student_init runs/market1501-start.pth \
    --save_dir runs/market1501-alone
python run_distill.py --dataset market1501 --base resnet18 --embedding_size 128 --input_size 256 --batch 64 \
    --num_image_per_class 4 --teacher_load runs/market1501-teacher --classifier true \
    --loss cross_entropy:1 --dist_ratio 1 --angle_ratio 2 \
    --triplet_ratio 1 --triplet_sample hard --triplet_margin 0.3 --lr 1e-4 --epochs 60 --iter_per_epoch 200 \
    --lr_decay_epochs 30 45 --lr_decay_gamma 0.1 --student_init runs/market1501-start.pth \
    --save_dir runs/market1501-rkd
python run_distill.py --dataset market1501 --base resnet18 --embedding_size 128 --input_size 256 --batch 64 \
    --num_image_per_class 4 --teacher_load runs/market1501-teacher --classifier true \
    --loss cross_entropy:1 --dist_ratio 1 --angle_ratio 2 \
    --granularity mas --granularity_load runs/market1501-coders --loss st:0.8,temperature=4 \
    --triplet_ratio 1 --triplet_sample hard --triplet_margin 0.3 --lr 1e-4 --epochs 60 --iter_per_epoch 200 \
    --lr_decay_epochs 30 45 --lr_decay_gamma 0.1 --student_init runs/market1501-start.pth \
    --save_dir runs/market1501-mas-rkd
