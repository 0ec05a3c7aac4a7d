#!/usr/bin/env bash
# A teacher and a student on several machines with several GPUs each. Start this on every machine, with the same values:
#   HOST=first-machine NODES=4 GPUS=8 bash examples/multi_node.sh
# or under SLURM, one task for each machine:
#   srun --nodes=4 --ntasks-per-node=1 --gpus-per-node=8 examples/multi_node.sh
# All machines must see the same runs/ (where checkpoints go) and the same data/ under the same paths.
#
# The commands are those of one process, --batch counts the images of all processes together, and terms that relate
# images see all of them. If a process dies all others stop; all are started again from the last checkpoint, at most
# RESTARTS times (0). METRIC_KD_TIMEOUT: minutes after which a process that hangs is given up (30). What to expect: docs/scale.md.
set -euo pipefail
cd "$(dirname "$0")/.."
NODES=${NODES:-${SLURM_NNODES:-1}}
GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-1}}
if [ -z "${HOST:-}" ]; then
    HOST=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?give HOST, the name of the first machine}" | head -n 1)
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

python() {
    torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" --max_restarts "${RESTARTS:-0}" \
        --rdzv_backend c10d --rdzv_endpoint "$HOST:${PORT:-29500}" --rdzv_id "${SLURM_JOB_ID:-metric_kd}-$STEP" "$@"
}

STEP=teacher
python run.py --mode train --dataset stanford --base resnet50 --sample distance --margin 0.2 --embedding_size 512 \
    --batch 2048 --epochs 40 --iter_per_epoch 60 --lr 8e-5 --warmup 2 --lr_decay_epochs 25 30 35 --lr_decay_gamma 0.5 \
    --device cuda --precision bf16 --sync_bn true --workers 8 --save_dir runs/stanford-teacher-many

STEP=student
python run_distill.py --dataset stanford --base resnet18 --embedding_size 64 --l2normalize false \
    --teacher_load runs/stanford-teacher-many --dist_ratio 1 --angle_ratio 2 \
    --batch 2048 --epochs 120 --iter_per_epoch 30 --lr 8e-4 --warmup 2 --lr_decay_epochs 40 80 --lr_decay_gamma 0.1 \
    --device cuda --precision bf16 --sync_bn true --workers 8 --save_dir runs/stanford-resnet18-many
