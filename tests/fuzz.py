"""By hand: hostile command lines for every script, made of its own flags, in one process.

    python tests/fuzz.py --lines 300            for each of the five scripts; --seed 1 for others

Each must end in success, in the help, or in BadInput with one line. What runs is cut short: a stage that gets past its
checks (it reaches its loop) counts as fine. Prints what ended in any other way; the exit code is their number.
"""
import argparse
import contextlib
import io
import os
import random
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import baselines  # noqa: E402
import eval as evaluation  # noqa: E402
import recover  # noqa: E402
import relabel  # noqa: E402
import squeeze  # noqa: E402

SCRIPTS = dict(squeeze=squeeze, recover=recover, relabel=relabel, eval=evaluation, baselines=baselines)
WORDS = ["", "0", "-1", "1", "2", "3.5", "nan", "inf", "-inf", "1e309", "9" * 30, "0x10", "1_0", "١", "true", "None", "a\nb", "'",
         "\"", "..", "../..", "/", "/dev/null", "/proc/self", "nowhere", "a b", "é", "\udc80", "%s", "{}", "--", "-", "*", "x" * 300,
         "file", "folder", "broken.pt", "runs", "runs/toy-convnet", "runs/toy-convnet/real-ipc2", "runs/half", "toy",
         "cifar10", "imagenet", "convnet", "resnet18", "bfloat16", "mtt", "class", "low"]


REACHED, SWITCH = [], ()


class Reached(Exception):
    """The checks are over: real work would begin."""


def stop(*args, **kw):
    raise Reached


def flags_of(module):
    """{flag: choices} of a script, from its own parser."""
    seen, real = {}, argparse.ArgumentParser.parse_args

    def look(self, argv=None):
        seen.update({name: SWITCH if action.nargs == 0 else action.choices for action in self._actions
                     for name in action.option_strings if name not in ("-h", "--help")})
        raise Reached
    argparse.ArgumentParser.parse_args = look
    with contextlib.suppress(Reached):
        module.parse([])
    argparse.ArgumentParser.parse_args = real
    return seen


def command_line(name, flags):
    """Random flags, values hostile with a rate of the line's own: with many, only the first is ever seen."""
    rate, line = random.choice([0.02, 0.1, 0.5]), []
    if name in ("relabel", "eval") or random.random() < 0.05:
        line.append(random.choice(WORDS) if random.random() < rate else "runs/toy-convnet/real-ipc2")
    for flag in random.sample(sorted(flags), random.randint(0, min(5, len(flags)))):
        line.append(flag)
        if flags[flag] is not SWITCH or random.random() < rate:
            good = list(flags[flag]) if flags[flag] else ["1", "2", "3", "0.5", "runs/toy-convnet"]
            line.append(str(random.choice(WORDS if random.random() < rate else good)))
    return line + ["--method", random.choice(list(baselines.METHODS))] * (name == "baselines" and random.random() > rate)


def attempt(module, line):
    """None, or what went wrong. REACHED counts the lines that got past all checks."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.main(line)
        REACHED.append(line)
    except Reached:
        REACHED.append(line)
    except squeeze.BadInput as error:
        return None if str(error).isprintable() else f"more than one line: {error}"
    except SystemExit as error:
        return None if error.code == 0 else f"exit code {error.code}"
    except OSError as error:                               # script() makes it one line
        return None if error.filename or error.strerror else traceback.format_exc(limit=-2)
    except Exception:
        return traceback.format_exc(limit=-2)


def prepare():
    """A teacher and a run to point at, a broken file, an unfinished folder; then no stage works any more."""
    few = lambda root, classes: (*(squeeze.Split(*squeeze.toy(30, classes, seed)) for seed in (0, 1)),
                                       [f"c{i}" for i in range(classes)])
    squeeze.LOADERS["toy"] = few
    with contextlib.redirect_stdout(io.StringIO()):
        squeeze.main(["--classes", "4", "--epochs", "1", "--precision", "float32"])
        next(Path("runs").iterdir()).rename("runs/toy-convnet")
        recover.main(["--iterations", "0", "--ipc", "2"])
        relabel.main(["runs/toy-convnet/real-ipc2", "--epochs", "3"])
    Path("file").touch(), Path("folder").mkdir(), Path("broken.pt").write_bytes(b"PK\3\4junk"), Path("runs/half").mkdir()
    squeeze.save(Path("runs/half/config.json"), {"stage": "squeeze"})
    squeeze.train = squeeze.gather_statistics = recover.distil = relabel.write = evaluation.evaluate = stop
    squeeze.datasets.utils.download_and_extract_archive = torch.hub.download_url_to_file = stop


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    args = parser.parse_args()
    os.chdir(tempfile.mkdtemp())
    prepare()
    bad = 0
    for name in args.scripts:
        flags = flags_of(SCRIPTS[name])
        random.seed(f"{args.seed} {name}")
        for _ in range(args.lines):
            line = command_line(name, flags)
            if wrong := attempt(SCRIPTS[name], line):
                bad += 1
                print(f"{name}.py {line!r}\n{wrong}".encode(errors="replace").decode(), flush=True)
        print(f"{name}: {args.lines} lines, {len(REACHED)} past all checks, {bad} bad so far", flush=True)
        REACHED.clear()
    sys.exit(min(bad, 99))


if __name__ == "__main__":
    main()
