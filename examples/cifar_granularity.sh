#!/usr/bin/env bash
# CIFAR-100 in Shao and Chen, Multi-granularity for Knowledge Distillation (2021, arXiv 2108.06681): seven pairs, each method
# alone, with MAG and with MAS. Needs CIFAR-100 (downloaded into data/ if it can be) and a GPU; from the repository root.
#
# Published accuracy in %: best epoch on the test images, one seed, which flatters them all; here the last epoch counts.
#
# teacher        wrn_40_2  wrn_40_2  resnet56  resnet110  resnet110  resnet32_x4  vgg13
# student        wrn_16_2  wrn_40_1  resnet20  resnet20   resnet32   resnet8_x4   vgg8
# teacher        75.61     75.61     72.34     74.31      74.31      79.42        74.64
# student alone  73.26     71.98     69.06     69.06      71.14      72.50        70.36
# KD             73.59     73.58     71.05     70.90      73.34      73.27        73.18
#   MAG          75.09     74.10     71.43     71.53      73.55      73.82        73.63
#   MAS          75.35     74.42     71.08     71.03      73.54      74.20        74.18
# FitNet         73.82     72.32     69.33     68.96      71.07      73.62        71.14
#   MAG          75.30     73.99     70.29     70.31      72.73      74.88        73.06
#   MAS          75.17     74.43     71.08     70.69      73.18      75.76        73.59
# AT             74.39     72.82     70.39     70.36      72.60      73.53        71.41
#   MAG          75.28     73.81     70.99     70.57      73.56      74.56        72.11
#   MAS          75.98     74.90     71.78     71.34      73.29      74.92        73.38
# SP             74.01     73.00     70.28     70.29      72.74      73.28        72.94
#   MAG          74.30     73.71     71.13     70.79      73.44      73.58        73.20
#   MAS          75.37     73.79     70.97     71.78      73.66      74.26        73.64
# VID            74.19     73.23     70.53     70.68      72.67      73.24        71.41
#   MAG          74.84     73.35     71.14     70.69      73.00      74.73        72.92
#   MAS          75.63     74.49     71.28     71.61      73.32      74.86        73.56
# RKD            73.37     72.10     69.67     69.44      72.24      72.03        71.35
#   MAG          75.73     73.59     71.51     71.11      73.71      74.23        73.44
#   MAS          75.31     74.30     71.91     71.06      73.17      74.39        73.06
# CRD            75.52     74.24     71.38     71.34      73.55      75.32        73.9
#   MAG          75.84     74.53     71.77     71.91      74.00      75.89        74.29
#   MAS          75.87     74.80     71.52     71.52      74.06      75.41        74.06
# AFD            75.41     73.66     71.32     71.20      73.46      74.72        73.57
#   MAG          75.53     74.53     71.62     71.40      73.57      74.75        73.89
#   MAS          75.55     74.12     71.49     71.22      74.00      75.03        73.62
#
# The rows of a method without MAG or MAS have no logit target, while MAG and MAS add one with weight 1 to all but KD: so do
# the paper's scripts. A gain over the plain row is therefore not of the granularity alone; run LOSS with st:1,temperature=4
# and without --granularity for the row between. Weights are those of the scripts, or where they have none, of the
# Knowledge-Distillation-Zoo (afd).
set -euo pipefail

pairs="wrn_40_2/wrn_16_2 wrn_40_2/wrn_40_1 resnet56/resnet20 resnet110/resnet20 resnet110/resnet32 resnet32_x4/resnet8_x4
    vgg13_cifar/vgg8_cifar"
for pair in $pairs; do
    teacher="runs/mgd-${pair%/*}"
    coders="$teacher-coders"
    student="${pair#*/}"
    run="runs/mgd-${pair/\//-}"
    python run.py --preset mgd_teacher --dataset cifar100 --base "${pair%/*}" --save_dir "$teacher"
    metric-kd granularity --teacher_load "$teacher" --save_dir "$coders"
    python run.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" --save_dir "$run-alone"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:0.2 --loss st:0.8,temperature=4 \
        --save_dir "$run-kd"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:0.2 --loss st:0.8,temperature=4 \
        --granularity mag --granularity_load "$coders" --save_dir "$run-kd-mag"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:0.2 --loss st:0.8,temperature=4 \
        --granularity mas --granularity_load "$coders" --save_dir "$run-kd-mas"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss fitnet:100,layers=2,embedding=false,connector=regressor \
        --save_dir "$run-fitnet"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss fitnet:100,layers=2,embedding=false,connector=regressor \
        --loss st:1,temperature=4 \
        --granularity mag --granularity_load "$coders" --save_dir "$run-fitnet-mag"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss fitnet:100,layers=2,embedding=false,connector=regressor \
        --loss st:1,temperature=4 \
        --granularity mas --granularity_load "$coders" --save_dir "$run-fitnet-mas"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss at:1000 \
        --save_dir "$run-at"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss at:1000 --loss st:1,temperature=4 \
        --granularity mag --granularity_load "$coders" --save_dir "$run-at-mag"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss at:1000 --loss st:1,temperature=4 \
        --granularity mas --granularity_load "$coders" --save_dir "$run-at-mas"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss sp:3000 \
        --save_dir "$run-sp"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss sp:3000 --loss st:1,temperature=4 \
        --granularity mag --granularity_load "$coders" --save_dir "$run-sp-mag"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss sp:3000 --loss st:1,temperature=4 \
        --granularity mas --granularity_load "$coders" --save_dir "$run-sp-mas"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss vid:1 \
        --save_dir "$run-vid"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss vid:1 --loss st:1,temperature=4 \
        --granularity mag --granularity_load "$coders" --save_dir "$run-vid-mag"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss vid:1 --loss st:1,temperature=4 \
        --granularity mas --granularity_load "$coders" --save_dir "$run-vid-mas"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss rkd:1,distance=25,angle=50 \
        --save_dir "$run-rkd"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss rkd:1,distance=25,angle=50 --loss st:1,temperature=4 \
        --granularity mag --granularity_load "$coders" --save_dir "$run-rkd-mag"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss rkd:1,distance=25,angle=50 --loss st:1,temperature=4 \
        --granularity mas --granularity_load "$coders" --save_dir "$run-rkd-mas"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss crd:0.8 \
        --save_dir "$run-crd"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss crd:0.8 --loss st:1,temperature=4 \
        --granularity mag --granularity_load "$coders" --save_dir "$run-crd-mag"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss crd:0.8 --loss st:1,temperature=4 \
        --granularity mas --granularity_load "$coders" --save_dir "$run-crd-mas"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss afd:500 \
        --save_dir "$run-afd"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss afd:500 --loss st:1,temperature=4 \
        --granularity mag --granularity_load "$coders" --save_dir "$run-afd-mag"
    python run_distill.py --preset mgd --dataset cifar100 --base "$student" --student_init "$run-start.pth" \
        --teacher_load "$teacher" --loss cross_entropy:1 --loss afd:500 --loss st:1,temperature=4 \
        --granularity mas --granularity_load "$coders" --save_dir "$run-afd-mas"
done
