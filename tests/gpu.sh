#!/bin/bash
# The rows of the results table that need a GPU, in the order of their worth. First what proves the code on CUDA: the
# whole suite, the benchmark and its check of gradients. Then, three students each: real images,
# RDED, the paper's settings and ours, under a teacher of as few epochs as recover.py makes it, one for all four;
# and under the paper's teacher at IPC 50. Each stage prints its seconds and the time left. Measured on an H100, with jobs
# beside it: the suite 1 minute (in 12 processes; here it is one), the benchmark 20 s a case; ResNet-18 on CIFAR 3-7 s an epoch and 11 s of
# statistics, so a teacher of 13 epochs 1-2 minutes; IPC 10 in our settings 35-48 s to recover, 10-15 s to label, 2-3
# minutes a student (10,000 steps).
#     bash tests/gpu.sh                                      all of it; run it again after a kill, it resumes
#     ROWS=toy:1:3 NETWORK=convnet JOBS=1 bash tests/gpu.sh  a rehearsal of one row, minutes on a CPU
# A row is DATASET:IPC:EPOCHS of the teacher. Flags of squeeze.py (--data DIR) can follow.
set -e
network=${NETWORK:-resnet18}
if [[ -z $ROWS ]]; then
    pytest -q tests
    python tests/bench.py --cases convnet-32-10 convnet-32-100 resnet18-32-100 resnet18-64-200 resnet18-224-500
    python squeeze.py --dataset cifar10 --network convnet --epochs 1 --resume "$@"
    python tests/bench.py --parity runs/cifar10-convnet-epochs1
fi
for row in ${ROWS:-cifar10:1:13 cifar10:10:13 cifar100:1:13 cifar100:10:41 cifar10:50:28 cifar100:50:92 cifar10:50:200 tiny:100:50}; do
    IFS=: read -r dataset ipc epochs <<< "$row"
    python squeeze.py --dataset "$dataset" --network "$network" --epochs "$epochs" --resume "$@"
    teacher=runs/$dataset-$network-epochs$epochs
    [[ -d $teacher ]] || teacher=runs/$dataset-$network    # the preset's epochs are not in the name
    python recover.py --teacher "$teacher" --ipc "$ipc" --iterations 0 --resume
    python recover.py --teacher "$teacher" --ipc "$ipc" --preset paper --resume
    python recover.py --teacher "$teacher" --ipc "$ipc" --resume
    python baselines.py --method rded --teacher "$teacher" --ipc "$ipc" --resume
    printf '%s\n' {real-ipc$ipc,rded-ipc$ipc,cfm-ipc$ipc-presetpaper,cfm-ipc$ipc} |
        xargs -P "${JOBS:-4}" -I RUN python eval.py "$teacher"/RUN --resume
    add() { python tests/render.py --add "$network" "$1" "$dataset, IPC $ipc, $epochs epochs" "$teacher/$2"; }  # records
    add "real images" "real-ipc$ipc"
    add "RDED" "rded-ipc$ipc"
    add "CFM, the paper's settings" "cfm-ipc$ipc-presetpaper"
    add "CFM, our settings" "cfm-ipc$ipc"
done
