#!/usr/bin/env bash
# A small network that lays out your photographs as a large one does, without labels: examples/unlabelled.sh PHOTOS TEACHER
# PHOTOS: any folder of images. TEACHER: a run of run.py, or FILE.npy of embeddings with their paths in FILE.csv.
# From the repository root.
set -euo pipefail
photos=${1:?give a folder of images}
teacher=${2:?give a run, or FILE.npy beside FILE.csv}

if [[ $teacher != *.npy ]]; then
    metric-kd embed "$teacher" --images "$photos" --out vectors.npy
    teacher=vectors.npy
fi
python run_distill.py --data "$photos" --unlabelled --teacher_load "$teacher" --base resnet18 --embedding_size 128 \
    --dist_ratio 1 --angle_ratio 2 --batch 128 --epochs 40 --select val --save_dir student
metric-kd embed student --images "$photos" --out student.npy
