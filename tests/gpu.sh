#!/bin/bash
# The rows of the results table that need a GPU, in the order of their worth. First five minutes that prove the code on
# CUDA: the tests that skip themselves elsewhere, and the benchmark with its check of gradients. Then a teacher of few
# epochs for few images per class (tests/RESULTS.md, "teachers"), real images, the paper's settings and ours, three
# students each; then the paper's own teacher at IPC 50. Nothing is timed in advance: each stage prints its seconds.
#     bash tests/gpu.sh                                      all of it; run it again after a kill, it resumes
#     ROWS=toy:2:3 NETWORK=convnet bash tests/gpu.sh         a rehearsal of one row, minutes on a CPU
# A row is DATASET:IPC:EPOCHS of the teacher. Flags of squeeze.py (--data DIR) can follow.
set -e
network=${NETWORK:-resnet18}
if [[ -z $ROWS ]]; then
    pytest -q tests -k "cuda or resume or pipeline"
    python tests/bench.py --cases convnet-32-100 resnet18-32-100 resnet18-64-200 resnet18-224-500
fi
for row in ${ROWS:-cifar10:1:8 cifar10:10:16 cifar100:1:10 cifar100:10:20 cifar10:50:200 cifar100:50:100 tiny:100:50}; do
    IFS=: read -r dataset ipc epochs <<< "$row"
    python squeeze.py --dataset "$dataset" --network "$network" --epochs "$epochs" --resume "$@"
    teacher=runs/$dataset-$network-epochs$epochs
    [[ -d $teacher ]] || teacher=runs/$dataset-$network    # the preset's epochs are not in the name
    python recover.py --teacher "$teacher" --ipc "$ipc" --iterations 0 --resume
    python recover.py --teacher "$teacher" --ipc "$ipc" --preset paper --resume
    python recover.py --teacher "$teacher" --ipc "$ipc" --resume
    python eval.py "$teacher"/{real-ipc$ipc,cfm-ipc$ipc-presetpaper,cfm-ipc$ipc} --resume
    add() { python tests/render.py --add "$network" "$1" "$dataset, IPC $ipc" "$teacher/$2"; }      # the records
    add "real images" "real-ipc$ipc"
    add "CFM, the paper's settings" "cfm-ipc$ipc-presetpaper"
    add "CFM, our settings" "cfm-ipc$ipc"
done
