"""By hand: SIGKILL every stage at a random moment, then in the middle of a random write, then let it go on to its end.

    python tests/kill.py --rounds 14            up to 8 kills a round, at 1 and 2 threads in turn

Prints how many runs ended with other bytes than an uninterrupted one: 0 is expected. Toy images, two of the stages'
clocks made fast so that students leave checkpoints. Processes are forked, which saves loading PyTorch a thousand times.
"""
import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["CUDA_VISIBLE_DEVICES"] = ""                    # CUDA does not survive a fork, nor add up in one order

import torch  # noqa: E402

import eval as evaluation  # noqa: E402
import recover  # noqa: E402
import relabel  # noqa: E402
import squeeze  # noqa: E402

SQUEEZE = ["--classes", "4", "--epochs", "3", "--precision", "float32"]
TEACHER = squeeze.teacher_folder(squeeze.parse(SQUEEZE))
RUN = TEACHER / "cfm-ipc3-iterations6-batch3"
STAGES = {
    "squeeze": (squeeze, SQUEEZE),
    "recover": (recover, ["--teacher", TEACHER, "--ipc", "3", "--iterations", "6", "--batch", "3"]),
    "relabel": (relabel, [RUN, "--epochs", "12", "--batch", "25"]),
    "eval": (evaluation, [RUN, "--seeds", "2", "--epochs", "12"])}


def die_at(write):
    """At the n-th flush of a file, leave half of a file that has no name yet, and die."""
    real, count = os.fsync, [0]

    def fsync(handle):
        count[0] += 1
        if count[0] == write:
            if os.readlink(f"/proc/self/fd/{handle}").endswith((".pt.tmp", ".json.tmp")):
                os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        real(handle)
    os.fsync = fsync


def start(stage, threads, write=0):
    """The stage with --resume in a child process: its id. write: the flush that it dies at."""
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(threads)
    die_at(write)
    few = lambda root, classes: (*(squeeze.Split(*squeeze.toy(15, 4, seed)) for seed in (0, 1)), list("abcd"))
    squeeze.LOADERS["toy"] = few
    evaluation.time = SimpleNamespace(time=lambda: 1000 * time.time())     # a checkpoint of the student every epoch
    module, flags = STAGES[stage]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            module.main([*map(str, flags), "--resume"])
    except BaseException as error:                         # a child must never come back into the parent's loop
        print(f"{stage}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def artefacts(stage):
    """What the stage is to leave, without the seconds it took."""
    if stage == "eval":
        rows = squeeze.read_json(RUN / "result.json")
        return json.dumps([[(seed["averaged"], seed["raw"]) for seed in row["seeds"].values()] for row in rows.values()])
    names = {"squeeze": [TEACHER / "teacher.pt", TEACHER / "statistics.pt"], "recover": [RUN / "images.pt"],
             "relabel": [RUN / "labels" / "soft_labels.npy"]}[stage]
    return [path.read_bytes() for path in names]


def reference(home, threads):
    """An uninterrupted pipeline: {stage: (bytes, seconds)}, and in home/<stage> what was there before each stage."""
    work, out = home / "work", {}
    work.mkdir(parents=True)
    os.chdir(work)
    for stage in STAGES:
        shutil.copytree(work, home / stage)
        began = time.time()
        assert os.waitpid(start(stage, threads), 0)[1] == 0
        out[stage] = artefacts(stage), time.time() - began
    return out


def kill_twice(stage, home, threads, seconds):
    """Whether the stage, killed twice, still ended; how many of the kills hit it at work."""
    shutil.rmtree(home / "work")
    shutil.copytree(home / stage, home / "work")
    os.chdir(home / "work")
    child = start(stage, threads)
    time.sleep(random.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    hits = os.WIFSIGNALED(os.waitpid(child, 0)[1]) + os.WIFSIGNALED(
        os.waitpid(start(stage, threads, random.randint(1, 12)), 0)[1])
    return os.waitpid(start(stage, threads), 0)[1] == 0, hits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=13)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    random.seed(args.seed)
    home = Path(tempfile.mkdtemp())
    wanted = {threads: reference(home / str(threads), threads) for threads in args.threads}
    first, last = wanted[args.threads[0]], wanted[args.threads[-1]]
    same = [stage for stage in STAGES if first[stage][0] == last[stage][0]]
    print(f"same bytes with {args.threads} threads: {', '.join(same) or 'none'}", flush=True)
    kills = bad = 0
    for n in range(args.rounds):
        threads = args.threads[n % len(args.threads)]
        for stage, (content, seconds) in wanted[threads].items():
            ended, hits = kill_twice(stage, home / str(threads), threads, seconds)
            kills += hits
            if not ended or artefacts(stage) != content:
                bad += 1
                print(f"round {n} {stage}: {'other bytes' if ended else 'did not end'}", flush=True)
        print(f"round {n + 1}/{args.rounds}: {kills} kills, {bad} runs that differ", flush=True)
    os.chdir("/")
    shutil.rmtree(home)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
