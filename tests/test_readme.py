"""README.md and tests/RESULTS.md: no figure without its record, no block or command that does not run."""
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import baselines
import eval as evaluation
import recover
import relabel
import render
import squeeze
from conftest import ROOT

SCRIPTS = {"squeeze.py": squeeze, "recover.py": recover, "relabel.py": relabel, "eval.py": evaluation,
           "baselines.py": baselines}
README = ROOT / "README.md"
RECORDS = {path.stem: json.loads(path.read_text()) for path in sorted(render.RESULTS.glob("*.json"))}


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def expand(text):
    """The python commands of a shell text as lists of words, by bash itself: loops, braces and variables are expanded,
    and nothing is run, since every program is a function here and the path is empty."""
    stubs = "PATH=; python() { printf '%s\\0' \"$@\" $'\\n'; }; .() { :; }; "
    stubs += " ".join(f"{name}() {{ :; }};" for name in ("git", "cd", "pip", "pytest", "bash", "cp", "mv", "ln", "rm"))
    done = subprocess.run(["/bin/bash", "-c", stubs + text], capture_output=True, text=True)
    assert not done.stderr and done.returncode == 0, done.stderr
    return [words.split("\0") for words in done.stdout.split("\0\n\0") if words]


def parsed(words):
    """The flags of one command, by its script's own parser."""
    if words[0] in SCRIPTS:
        return SCRIPTS[words[0]].parse(words[1:])
    assert words[:2] == ["-m", "venv"] or words[0] == "-c" or (ROOT / words[0]).is_file(), words


def measurements():
    """Every measurement of every record: (where, cell, what is said of it)."""
    for name, record in RECORDS.items():
        for row in record["rows"]:
            for column, cell in row.get("cells", {}).items():
                if isinstance(cell, dict):
                    yield f"{name}, {row['name']}, {column}", *render.find(name, row["name"], column)


@pytest.mark.parametrize("document", render.DOCUMENTS, ids=lambda path: path.name)
def test_tables_say_what_the_records_say(document):
    assert render.render(document) == document.read_text(), "python tests/render.py has not been run"


def test_every_record_stands_in_a_document():
    shown = {match[2] for document in render.DOCUMENTS for match in render.MARKED.finditer(document.read_text())}
    assert shown == set(RECORDS) | {"speed", "growth"}
    for name, record in RECORDS.items():
        assert len({row["name"] for row in record["rows"]}) == len(record["rows"]), name
        assert all(set(row.get("cells", ())) <= set(record["head"][1:]) for row in record["rows"]), name


def test_every_measurement_says_where_it_comes_from():
    for where, cell, words in measurements():
        assert words.get("hardware") and words.get("commit") and words.get("date"), where
        assert words.get("commands") or words.get("gone"), where
        mean, std, n = render.measured(cell, words)
        assert 0 < mean < 100 and (std is None or 0 <= std < 5) and (n is None or n > 0), where


def test_commands_of_the_records_are_today_s_flags():
    texts = [text for record in RECORDS.values() for row in record["rows"]
             for words in (record, row, *row.get("cells", {}).values()) if isinstance(words, dict)
             for text in words.get("commands", ())]
    texts += [teacher["command"] for record in RECORDS.values() for teacher in record.get("teachers", {}).values()]
    for words in expand("\n".join(texts)):
        parsed(words)


def test_no_figure_with_an_error_bar_stands_outside_the_records():
    known = {render.text(name, row["name"], column).strip("*").split("** (")[0].split(" (")[0]
             for name, record in RECORDS.items() for row in record["rows"] for column in row.get("cells", ())}
    for document in render.DOCUMENTS:
        for figure in re.findall(r"\d+\.\d+ ±\s+\d+\.\d+", document.read_text()):
            assert re.sub(r"\s+", " ", figure) in known, f"{document.name}: {figure}"


@pytest.mark.parametrize("document", render.DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)|src=\"([^\"]+)\"", document.read_text()):
        assert (document.parent / (target[0] or target[1])).exists(), target


def test_readme_is_a_front_door():
    before_the_folds = README.read_text().split("<details>")[0].splitlines()
    assert len(before_the_folds) <= 220


def test_shell_blocks(here):
    """The README's toy commands are run, small; of all others the flags are parsed."""
    for words in (words for text in blocks(render.DOCUMENTS[1], "sh") for words in expand(text)):
        parsed(words)
    small, run = {"relabel.py": ["--epochs", "2"], "eval.py": ["--epochs", "2", "--seeds", "1"]}, 0
    for words in (words for text in blocks(README, "sh") for words in expand(text)):
        parsed(words)
        real = any("runs/" in word and "runs/toy-convnet" not in word for word in words) or "--dataset" in words
        if words[0] in ("recover.py", "relabel.py", "eval.py") and not real:
            add = [] if "--export" in words else small.get(words[0], ["--iterations", "2"])
            SCRIPTS[words[0]].main(words[1:] + add)
            for folder in Path("runs").glob("*/*-iterations2"):          # as if it were the whole one
                folder.rename(str(folder).removesuffix("-iterations2"))
            run += 1
    assert run >= 2 and Path("runs/toy-convnet/cfm-ipc10/result.json").is_file()


def test_python_blocks(here):
    recover.main(["--iterations", "0"])
    Path("runs/toy-convnet/real-ipc10").rename("runs/toy-convnet/cfm-ipc10")
    relabel.main(["runs/toy-convnet/cfm-ipc10", "--epochs", "2"])
    snippets = blocks(README, "python")
    assert len(snippets) >= 2
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_a_run_becomes_a_record(here, monkeypatch):
    """render.py --add: scores, settings and commands of a finished run, and the table that shows them."""
    recover.main(["--ipc", "2", "--iterations", "2", "--gamma", "0.5"])
    run = "runs/toy-convnet/cfm-ipc2-iterations2-gamma0.5"
    evaluation.main([run, "--seeds", "2", "--epochs", "2"])
    monkeypatch.setattr(render, "RESULTS", Path("."))
    render.add("new", "CFM", "IPC 2", run)
    cell = json.loads(Path("new.json").read_text())["rows"][0]["cells"]["IPC 2"]
    assert len(cell["scores"]) == 2 and cell["recover"]["gamma"] == 0.5 and cell["date"] and cell["hardware"]
    again = [shlex.split(text)[1:] for text in cell["commands"]]
    assert parsed(again[1]).iterations == 2 and parsed(again[1]).gamma == 0.5 and parsed(again[1]).ipc == 2
    assert parsed(again[2]).runs == [run] and parsed(again[2]).epochs == 2 and parsed(again[0]).dataset == "toy"
    assert re.fullmatch(r"\| images \| IPC 2 \|\n\|---\|---\|\n\| CFM \| \d+\.\d\d ± \d+\.\d\d \(2\) \|\n",
                        render.render_record("new"))
