#!/bin/bash
# The rows of the results table that need a GPU: real images, CFM, on CIFAR with both presets; three students each.
#     bash tests/gpu.sh                                    all rows; run it again after a kill, it resumes
#     ROWS=toy:2 NETWORK=convnet bash tests/gpu.sh         a rehearsal, four minutes on a CPU
# --data DIR and other flags of squeeze.py and recover.py both can follow.
set -e
network=${NETWORK:-resnet18}
for row in ${ROWS:-cifar10:10 cifar10:50 cifar100:10 cifar100:50 tiny:50 tiny:100}; do
    dataset=${row%:*} ipc=${row#*:}
    runs=runs/$dataset-$network
    python squeeze.py --dataset "$dataset" --network "$network" --resume "$@"
    python recover.py --dataset "$dataset" --network "$network" --ipc "$ipc" --iterations 0 --resume "$@"
    python recover.py --dataset "$dataset" --network "$network" --ipc "$ipc" --resume "$@"
    folders=("$runs/real-ipc$ipc" "$runs/cfm-ipc$ipc")
    if [[ $dataset == cifar* ]]; then                      # elsewhere the default is the paper's
        python recover.py --dataset "$dataset" --network "$network" --ipc "$ipc" --preset paper --resume "$@"
        folders+=("$runs/cfm-ipc$ipc-presetpaper")
    fi
    python eval.py "${folders[@]}" --resume
done
