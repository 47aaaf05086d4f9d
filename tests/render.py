"""Render the tables of README.md and tests/RESULTS.md from the records in tests/results/. By hand:

    python tests/render.py                                    rewrite the tables of both documents
    python tests/render.py --add TABLE ROW COLUMN RUN ...     put finished runs of eval.py into a cell, then render
    python tests/render.py --strip OUT.png RUN ...            a row of enlarged thumbnails a run
    python tests/render.py --epochs OUT.svg                   accuracy against the teacher's epochs

A record is one table, tests/results/NAME.json. It stands where a document says <!-- table: NAME --> ... <!-- end -->.
    head      the columns' names; the first one's is that of the rows
    rows      [{"name": ..., "cells": {column: cell}}], or {"name": ..., "difference": [row, row]}, which is computed
    a cell    text; or a measurement in %: {"scores": [one a student]}, or {"mean", "std"} where no more is known; or
              {"see": [table, row, column]}, one that stands elsewhere, and with "of": "raw" its raw students
    hardware, date, commit, commands, gone, students, about, bold, digits
              of the table, a row or a cell; the innermost word counts. commit: the code that made it, or the first one
              that told the figure. gone: why no command of today's code gives it again. students: how many, if not 3

A new figure: --add makes its cell, and the record, row or column where there is none; or write the cell by hand. Put
the marker where the table is to stand, and render. tests/test_readme.py checks that the documents say what the records
say, that each measurement names where it comes from, and that its commands are today's flags.
"""
import argparse
import json
import platform
import re
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

TESTS = Path(__file__).resolve().parent
RESULTS, DOCUMENTS = TESTS / "results", [TESTS.parent / "README.md", TESTS / "RESULTS.md"]
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def find(table, row, column):
    """(cell, what is said of it): the cell's own words before its row's before its table's; "see" is followed."""
    record = read(table)
    words = next(r for r in record["rows"] if r["name"] == row)
    cell = words["cells"][column]
    if isinstance(cell, dict) and "see" in cell:
        seen, words = find(*cell["see"])
        return ({**seen, "scores": seen[cell["of"]]} if "of" in cell else seen), words
    return cell, {**record, **words, **(cell if isinstance(cell, dict) else {})}


def measured(cell, words):
    """(mean, deviation of the sample, students) of a measurement."""
    if "scores" in cell:
        scores = cell["scores"]
        return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0, len(scores)
    return cell["mean"], cell.get("std"), words.get("students", 3)


def text(table, row, column):
    """What the table says: 72.95 ± 0.25, and in brackets how many students where they are not three."""
    cell, words = find(table, row, column)
    if isinstance(cell, str):
        return cell
    (mean, std, n), digits = measured(cell, words), words.get("digits", 2)
    said = f"{mean:.{digits}f}" + (f" ± {std:.{digits}f}" if std is not None and n != 1 else "")
    return (f"**{said}**" if words.get("bold") else said) + (f" ({n})" if n not in (3, None) else "")


def render_record(name):
    """The record as a Markdown table."""
    record = read(name)
    columns, rows = record["head"][1:], {row["name"]: row for row in record["rows"]}
    lines = ["| " + " | ".join(record["head"]) + " |", "|---" * len(record["head"]) + "|"]
    for label, row in rows.items():
        cells = {c: text(name, label, c) for c in row.get("cells", ())}
        if "difference" in row:                            # of means, where both rows have one
            pairs = {c: [find(name, r, c) for r in row["difference"]] for c in columns
                     if all(isinstance(rows[r]["cells"].get(c), dict) for r in row["difference"])}
            cells = {c: f"{measured(*a)[0] - measured(*b)[0]:+.2f}" for c, (a, b) in pairs.items()}
        lines.append(f"| {label} | " + " | ".join(cells.get(c, "") for c in columns) + " |")
    return "\n".join(lines) + "\n"


def render_speed():
    """tests/bench.json, which bench.py writes, as a table."""
    milliseconds = lambda seconds: f"{1e3 * seconds:.{int(seconds < 0.1)}f} ms"
    lines = ["| case | reference | ours | ratio (range) | over the bare network | peak memory, ours / reference |",
             "|---|---|---|---|---|---|"]
    for row in json.loads((TESTS / "bench.json").read_text())["recover"]:
        low, high = row["spread"]
        lines.append(f"| {row['case']} | {milliseconds(row['reference'])} | {milliseconds(row['ours'])} | "
                     f"{row['speedup']:.2f} ({low:.2f}-{high:.2f}) | {row['over_bare']:.2f} | "
                     f"{row['memory']['ours']:.0f} / {row['memory']['reference']:.0f} MB |")
    return "\n".join(lines) + "\n"


def render_growth():
    """tests/growth.json, which bench.py --growth writes, as a table."""
    rows = json.loads((TESTS / "growth.json").read_text())
    lines = [["IPC × classes", *(f"{row['ipc']} × {row['classes']}" for row in rows)], ["---"] * (len(rows) + 1),
             ["ms an image, 5 iterations", *(f"{1e3 * row['seconds_per_image']:.1f}" for row in rows)],
             ["peak MB", *(f"{row['peak_mb']:.0f}" for row in rows)]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def render(document):
    """The document's text with every marked table made anew."""
    special = {"speed": render_speed, "growth": render_growth}
    return MARKED.sub(lambda m: m[1] + (special[m[2]]() if m[2] in special else render_record(m[2])) + m[3],
                      document.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# A new figure

def commands_of(run, teacher, made, result):
    """The commands that make a run again. A folder's name holds every setting that is not the default, so a flag is
    given where its name and value stand there. teacher, made: settings of the run's teacher and of the run."""
    def flags(settings, name):
        given = [(key.replace("_", "-"), "" if value is True else value) for key, value in settings.items()]
        return "".join(f" --{flag} {value}".rstrip() for flag, value in given if f"-{flag}{value}" in name)

    method = run.name.split("-", 1)[0]
    folder = f"runs/{run.resolve().parent.name}"
    script = {"cfm": "recover.py", "low": "recover.py --filter low", "high": "recover.py --filter high",
              "real": "recover.py --iterations 0", "confident": "recover.py --iterations 0 --init confident"}
    recipe = {"epochs": result["settings"]["epochs"], "seeds": len(result["seeds"]),
              **{key: result["settings"][key] for key in ("teacher", "validate", "hard", "online")}}
    return [f"python squeeze.py --dataset {teacher['dataset']} --network {teacher['network']}{flags(teacher, folder)}",
            f"python {script.get(method, f'baselines.py --method {method}')} --teacher {folder}{flags(made, run.name)}",
            f"python eval.py {folder}/{run.name}" + "".join(
                f" --{key}{'' if value is True else f' {value}'}" for key, value in recipe.items() if value)]


def measurement(run, student=None):
    """A finished run's scores as a cell, with all that is known of them. Hardware is this machine's and commit is HEAD:
    mend them by hand if the run is from elsewhere."""
    results = json.loads((run / "result.json").read_text())
    results.pop("sha256", None)                            # the file's own
    if student is None and len(results) > 1:
        raise SystemExit(f"{run}: --student is one of {', '.join(results)}")
    result = results[student or next(iter(results))]
    config, teacher = (json.loads((folder / "config.json").read_text()) for folder in (run, run.resolve().parent))
    settings = [{key: value for key, value in d.items() if key not in ("data", "images", "resume")}
                for d in (teacher["settings"], config["settings"], result["settings"])]
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=TESTS, capture_output=True, text=True)
    return dict(scores=[round(seed["averaged"], 2) for seed in result["seeds"].values()],
                raw=[round(seed["raw"], 2) for seed in result["seeds"].values()], seconds=round(result["seconds"]),
                commands=commands_of(run, *settings[:2], result), hardware=hardware(), commit=head.stdout.strip(),
                date=str(date.fromtimestamp((run / "result.json").stat().st_mtime)), eval=settings[2],
                teacher={**settings[0], **teacher["results"]}, recover={**settings[1], **config["results"]},
                versions=config["versions"])


def add(table, row, column, *runs, student=None):
    """Put a finished run into a cell of a record; of several, other recover seeds say, the scores of all of them."""
    first, *rest = (measurement(Path(run), student) for run in runs)
    for other in rest:
        for key in ("scores", "raw", "commands"):
            first[key] += [entry for entry in other[key] if key != "commands" or entry not in first[key]]
    path = RESULTS / f"{table}.json"
    record = read(table) if path.is_file() else {"head": ["images"], "rows": []}
    if column not in record["head"]:
        record["head"].append(column)
    if not any(r["name"] == row for r in record["rows"]):
        record["rows"].append({"name": row, "cells": {}})
    next(r for r in record["rows"] if r["name"] == row)["cells"][column] = first
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def hardware():
    """The GPU's name, or the CPU's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    return model[1].strip() if model else platform.processor()


def strip(out, runs, columns=9, scale=3):
    """The last image of each of the first classes, a row a run, enlarged without smoothing."""
    import torch
    from PIL import Image, ImageDraw

    left, picture = 40, None
    for i, run in enumerate(runs):
        content = torch.load(Path(run) / "images.pt", weights_only=True)
        K, S = len(content["classes"]), scale * content["images"].shape[-1]
        picture = picture or Image.new("RGB", (left + columns * (S + 2), len(runs) * (S + 2)), "white")
        ImageDraw.Draw(picture).text((2, i * (S + 2) + S // 2 - 5), Path(run).name.split("-")[0], fill="black")
        for c, image in enumerate(content["images"][-K:][:columns]):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((S, S), Image.Resampling.NEAREST)
            picture.paste(tile, (left + c * (S + 2), i * (S + 2)))
    picture.save(out, optimize=True)


def epochs(out):
    """The record patient-age as a picture: a colour for each IPC, real images dashed."""
    sys.path.insert(0, str(TESTS.parent))
    import eval as evaluation

    curves = {}
    for column in ("IPC 10, CFM", "IPC 10, real", "IPC 1, CFM", "IPC 1, real"):
        rows = [row["name"] for row in read("patient-age")["rows"] if column in row["cells"]]
        curves[column] = ([int(name.split()[0]) for name in rows],
                          [measured(*find("patient-age", name, column))[0] for name in rows])
    evaluation.svg(Path(out), curves, "CIFAR-10, students by the age of their teacher", "epochs of the teacher",
                   "accuracy on held-out images in %", [column for column in curves if "real" in column])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", nargs="+", metavar=("TABLE", "ROW COLUMN RUN"))
    parser.add_argument("--student", help="with --add: which entry of result.json, where there are several")
    parser.add_argument("--strip", nargs="+", metavar=("OUT.png", "RUN"))
    parser.add_argument("--epochs", metavar="OUT.svg")
    args = parser.parse_args()
    if args.epochs:
        epochs(args.epochs)
    elif args.strip:
        strip(args.strip[0], args.strip[1:])
    else:
        if args.add:
            add(*args.add, student=args.student)
        for document in DOCUMENTS:
            document.write_text(render(document))
