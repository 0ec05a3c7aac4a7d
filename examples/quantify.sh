#!/usr/bin/env bash
# VGG-11 and its layer fc1 in Cheng, Rao, Chen and Zhang, Explaining Knowledge Distillation by Quantifying the Knowledge
# (CVPR 2020, arXiv 2003.03622): a teacher from ImageNet, a baseline from labels, a student that imitates the teacher's fc1
# without labels, the rest of that student, and what the page says of them. Needs a GPU and a folder of crops,
# data/crops/train/CLASS/*.jpg and data/crops/val/CLASS/*.jpg: the paper cuts objects out 1.2 times as wide and as high as
# their boxes (CUB-200, VOC, ILSVRC mammals). From the repository root.
#
# Rates of --imitate, falling from --lr to --lr times --lr_decay_gamma; `--lr_decay_gamma 1` holds them constant. The paper's
# program names none for conv, nor for AlexNet:
#
#            VGG                                     ResNet
#   fc1      --lr 1e-4 (the preset's), or constant   --lr 10 --lr_decay_gamma 0.01
#   fc2      --lr 1e-3                               --lr 0.1
#   fc3      --lr 1e-3                               --lr 0.1 or 0.01, both with --lr_decay_gamma 1
#
# Rates of the teacher from ImageNet: 1e-3 (VGG), 1e-2 (ResNet); from scratch ten times that, which preset cheng2020 has. The
# head: 1e-3 (VGG, AlexNet), 1e-2 (ResNet). Of AlexNet there is --base alexnet_fc, of ResNets resnet18_fc to resnet152_fc.
#
# Unlike the program: images are cropped at random and mirrored for CUB too; the student's dropout rests while it imitates,
# its statistics are updated once per step; the head's rate falls as all others do, not when the accuracy stands still.
set -euo pipefail

python run.py --preset cheng2020 --dataset folder --data data/crops --base vgg11_fc --lr 1e-3 --save_dir runs/teacher
python run.py --preset cheng2020 --dataset folder --data data/crops --base vgg11_fc --pretrained false \
    --record_weights paper --save_dir runs/baseline
python run_distill.py --preset cheng2020_imitate --dataset folder --data data/crops --base vgg11_fc --pretrained false \
    --teacher_load runs/teacher --imitate fc1 --record_weights paper --save_dir runs/distilled

# What follows fc1 has learnt nothing yet: from the labels, with all before it as it is. Not possible for fc3.
python run.py --preset cheng2020 --dataset folder --data data/crops --base vgg11_fc --load runs/distilled --fit_head auto \
    --epochs 100 --lr 1e-3 --save_dir runs/distilled-head

metric-kd quantify --teacher runs/teacher --distilled runs/distilled --baseline runs/baseline --layer fc1 \
    --images data/crops/train
