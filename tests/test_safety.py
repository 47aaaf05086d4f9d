"""Nothing lost, nothing fooled: kills, full disks, damaged files, strangers' files, two processes at once."""
import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import eval as evaluation
import recover
import relabel
import squeeze
from conftest import ROOT, one_line
from squeeze import BadInput

UNIX = pytest.mark.skipif(os.name != "posix", reason="needs fcntl")


class Evil:
    """Pickles to a call that makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ---- kills and disks

@UNIX
def test_killed_stages_end_with_the_same_bytes():
    """One kill at a random moment and one in the middle of a write for each stage; tests/kill.py is the long form."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "kill.py", "--rounds", "1", "--threads", "1"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and " 0 runs that differ" in done.stdout, done.stdout + done.stderr


def test_what_is_renamed_into_place_was_flushed(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, lambda *args, real=getattr(os, name), name=name: (calls.append(name), real(*args)))
    squeeze.save(tmp_path / "a.pt", {"x": torch.zeros(3)})
    assert calls[:2] == ["fsync", "replace"] and calls[2:] == (["fsync"] if os.name == "posix" else [])


@UNIX
def test_a_full_disk_is_one_line_and_the_last_file_stays(tmp_path):
    import resource

    squeeze.save(tmp_path / "a.pt", {"x": torch.zeros(3)}), squeeze.save(tmp_path / "a.json", {"x": 1})
    before, limits = (tmp_path / "a.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        for name, content in (("a.pt", {"x": torch.zeros(10**5)}), ("a.json", {"x": "x" * 10**5})):
            one_line(lambda flags: squeeze.save(tmp_path / name, content), [], name, "cannot be written", "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "a.pt").read_bytes() == before and squeeze.read_json(tmp_path / "a.json") == {"x": 1}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that even root cannot write to")
def test_a_read_only_folder_is_one_line():
    with pytest.raises(OSError, match="/proc/run"):        # script() makes it a line with a remedy
        squeeze.open_run(Path("/proc/run"), "squeeze", {}, {}, False)
    one_line(lambda flags: squeeze.log(Path("/proc"), epoch=1), [], "/proc/log.jsonl", "cannot be written")


@UNIX
def test_of_processes_started_at_once_exactly_one_goes_on(tmp_path):
    gate, tell = os.pipe(), os.pipe()
    children = []
    for _ in range(6):
        if not (child := os.fork()):
            os.close(gate[1]), os.read(gate[0], 1)         # all wait for the gate to close
            try:
                squeeze.open_run(tmp_path / "run", "recover", {"a": 1}, {}, True)
                os.write(tell[1], b"1")
            except BadInput as error:
                os.write(tell[1], b"0" if "another process is at work" in str(error) else b"?")
            signal.pause()
        children.append(child)
    os.close(gate[0]), os.close(gate[1])
    said = b"".join(os.read(tell[0], 1) for _ in children)
    for child in children:
        os.kill(child, signal.SIGKILL), os.waitpid(child, 0)
    assert sorted(said) == sorted(b"100000")
    assert squeeze.open_run(tmp_path / "run", "recover", {"a": 1}, {}, True)["settings"] == {"a": 1}   # killed: let go


def test_a_run_killed_before_its_config_starts_anew(tmp_path):
    (tmp_path / "config.json.tmp").write_text("{")
    assert squeeze.open_run(tmp_path, "recover", {}, {}, False)["stage"] == "recover"


def test_moved_data_can_be_named_anew(tmp_path):
    for settings, fine in (({"data": "/old"}, True), ({"data": "/new"}, True), ({"data": "/new", "lr": 1}, False)):
        if fine:
            squeeze.open_run(tmp_path, "recover", settings, {"data": "hash"}, True)
        else:
            one_line(lambda flags: squeeze.open_run(tmp_path, "recover", settings, {"data": "hash"}, True), [], "lr is 1 now")


# ---- damaged files

def test_no_flipped_byte_of_a_json_goes_unseen(tmp_path):
    path, content = tmp_path / "result.json", {"convnet": {"averaged": 61.25, "seeds": {"0": [1, True, None]}}}
    squeeze.save(path, content)
    raw = path.read_bytes()
    for i in range(len(raw)):
        for bit in (1, 4, 32):
            path.write_bytes(raw[:i] + bytes([raw[i] ^ bit]) + raw[i + 1:])
            try:
                assert squeeze.read_json(path)["convnet"] == content["convnet"]     # the flip hit a space
            except BadInput as error:
                assert "result.json: damaged: remove it" in str(error)
    for broken in [raw[:cut] for cut in range(len(raw) - 1)] + [b"[]", b"[1, 2]", b"7", b"null"]:
        path.write_bytes(broken)
        with pytest.raises(BadInput):
            squeeze.read_json(path)


def test_no_flipped_byte_of_a_state_goes_unseen(tmp_path):
    path, content = tmp_path / "memory.pt", {"b": 3, "layers": {"0": torch.arange(300.0)}}
    squeeze.save(path, content)
    raw, seen = path.read_bytes(), 0
    for i in [*range(0, len(raw), 13), *range(len(raw) - 60, len(raw))]:
        path.write_bytes(raw[:i] + bytes([raw[i] ^ 16]) + raw[i + 1:])
        try:
            found = squeeze.load_state(path)               # padding between the zip's entries
            assert found["b"] == 3 and torch.equal(found["layers"]["0"], content["layers"]["0"])
        except BadInput as error:
            seen += "memory.pt: missing, damaged" in str(error)
    assert seen > len(raw) / 13 * 0.6
    for tenth in range(10):
        path.write_bytes(raw[:len(raw) * tenth // 10])
        one_line(lambda flags: squeeze.load_state(path), [], "memory.pt", "damaged", "remove it")


def test_artefacts_cut_at_every_tenth(here):
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    relabel.main([str(run), "--epochs", "2"])
    uses = {run / "images.pt": lambda flags: relabel.load_run(run),
            run / "labels" / "soft_labels.npy": lambda flags: evaluation.main([str(run), "--seeds", "1"]),
            Path("runs/toy-convnet/teacher.pt"): lambda flags: recover.load_teacher("runs/toy-convnet", "cpu"),
            run / "config.json": lambda flags: relabel.load_run(run),
            run / "labels" / "config.json": lambda flags: evaluation.main([str(run), "--seeds", "1"])}
    for path, use in uses.items():
        raw = path.read_bytes()
        for tenth in range(10) if path.suffix != ".npy" else (3, 9):
            path.write_bytes(raw[:len(raw) * tenth // 10])
            one_line(use, [], path.name, "remove")
        path.write_bytes(raw)


@pytest.mark.parametrize("lines, half, epochs, name", [
    (6, 0, 6, "soft_labels.npy"), (6, 0, 6, "soft_labels.npy.tmp"),        # killed at the very end
    (3, 0, 4, "soft_labels.npy.tmp"), (3, 20, 4, "soft_labels.npy.tmp"),   # an epoch without its line, a line cut off
    (4, 0, 4.5, "soft_labels.npy.tmp"), (6, 20, 2.5, "soft_labels.npy.tmp"),       # a file cut off
    (0, 0, 0, "soft_labels.npy.tmp"), (0, 9, -1, "soft_labels.npy.tmp"), (4, 0, None, None)])
def test_labels_of_a_killed_run_are_taken_as_far_as_they_are_whole(here, monkeypatch, lines, half, epochs, name):
    """lines of log.jsonl and bytes of the next one; epochs of the file (of 8 images and 4 classes) after its header."""
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    relabel.main([str(run), "--batch", "8", "--epochs", "6"])
    folder, path = run / "labels", run / "labels" / "soft_labels.npy"
    whole, log = path.read_bytes(), (folder / "log.jsonl").read_text().splitlines(keepends=True)
    assert len(whole) == 128 + 6 * 8 * 4 * 2
    config = squeeze.read_json(folder / "config.json")
    draw, seen = relabel.draw_views, []
    monkeypatch.setattr(relabel, "draw_views", lambda seed, epoch, *rest: seen.append(epoch) or draw(seed, epoch, *rest))
    for again in range(2):                                 # and once more over what the first resumption wrote
        squeeze.save(folder / "config.json", {**config, "artefacts": {}, "results": {}})
        (folder / "log.jsonl").write_text("".join(log[:lines]) + "".join(log[lines:lines + 1])[:half])
        path.unlink()
        if name:
            (folder / name).write_bytes(whole[:int(128 + epochs * 64)])
        seen.clear()
        relabel.main([str(run), "--batch", "8", "--epochs", "6", "--resume"])
        assert seen == list(range(max(0, min(lines, int(epochs or 0))), 6)) and path.read_bytes() == whole
        assert not (folder / "soft_labels.npy.tmp").exists()


def test_a_byte_that_flipped_in_unfinished_labels_costs_the_epochs_from_there(here, monkeypatch):
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    relabel.main([str(run), "--batch", "8", "--epochs", "6"])
    folder, path = run / "labels", run / "labels" / "soft_labels.npy"
    whole, draw, seen = path.read_bytes(), relabel.draw_views, []
    squeeze.save(folder / "config.json", {**squeeze.read_json(folder / "config.json"), "artefacts": {}, "results": {}})
    path.unlink()
    broken = bytearray(whole[:128 + 5 * 64])
    broken[128 + 3 * 64 + 7] ^= 4
    (folder / "soft_labels.npy.tmp").write_bytes(broken)
    monkeypatch.setattr(relabel, "draw_views", lambda seed, epoch, *rest: seen.append(epoch) or draw(seed, epoch, *rest))
    relabel.main([str(run), "--batch", "8", "--epochs", "6", "--resume"])
    assert seen == [3, 4, 5] and path.read_bytes() == whole


def test_a_log_line_cut_off_is_not_counted_twice(here, monkeypatch):
    """The line after it continues it: together they are one, as they are one epoch."""
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    relabel.main([str(run), "--batch", "8", "--epochs", "6"])
    whole, folder = (run / "labels" / "soft_labels.npy").read_bytes(), run / "labels"
    config, log = squeeze.read_json(folder / "config.json"), (folder / "log.jsonl").read_text().splitlines(keepends=True)
    squeeze.save(folder / "config.json", {**config, "artefacts": {}, "results": {}})
    (folder / "log.jsonl").write_text("".join(log[:2]) + log[2][:9])
    (folder / "soft_labels.npy").rename(folder / "soft_labels.npy.tmp")
    (folder / "soft_labels.npy.tmp").write_bytes(whole[:128 + 3 * 64])
    draw, seen = relabel.draw_views, []

    def dies(seed, epoch, *rest):
        seen.append(epoch)
        if seen == [2, 3, 4]:
            raise KeyboardInterrupt
        return draw(seed, epoch, *rest)
    monkeypatch.setattr(relabel, "draw_views", dies)
    with pytest.raises(KeyboardInterrupt):
        relabel.main([str(run), "--batch", "8", "--epochs", "6", "--resume"])
    relabel.main([str(run), "--batch", "8", "--epochs", "6", "--resume"])
    assert seen == [2, 3, 4, 4, 5] and (folder / "soft_labels.npy").read_bytes() == whole


# ---- strangers' files

def test_hostile_pickles_run_no_code(tmp_path, monkeypatch):
    evil, made = Evil(tmp_path / "made"), tmp_path / "made"
    torch.save({"state_dict": evil}, tmp_path / "evil.pt")
    one_line(lambda flags: squeeze.load_state(tmp_path / "evil.pt"), [], "evil.pt", "more than tensors")
    monkeypatch.chdir(tmp_path)
    one_line(squeeze.main, ["--teacher", "evil.pt"], "evil.pt", "not a readable state dict")
    np.save("soft_labels.npy", np.array([evil], object), allow_pickle=True)
    one_line(lambda flags: relabel.check_labels(Path("soft_labels.npy"), (1, 1, 1)), [], "soft_labels.npy")
    folder = Path("data/cifar-10-batches-py")
    folder.mkdir(parents=True)
    for name in ("batches.meta", "data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(pickle.dumps({"label_names": evil, "data": evil}, protocol=0))
    one_line(lambda flags: squeeze.load_data("cifar10", "data"), [], "batches.meta", "hostile", "remove it")
    assert not made.exists()
    pickle.loads((folder / "batches.meta").read_bytes())
    assert made.exists()                                   # it was a live one


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_all_ages_are_read(protocol):
    content = {"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2], "b": b"\xff", "n": np.int64(7),
               "more": np.array([3, 4])}
    raw = pickle.dumps(content, protocol=protocol)
    for text in (raw, raw.replace(b"numpy._core", b"numpy.core") if protocol < 4 else raw):
        found = squeeze.Plain(io.BytesIO(text), encoding="latin1").load()
        assert np.array_equal(found["data"], content["data"]) and found["data"].dtype == np.uint8
        assert found["labels"] == [1, 2] and found["n"] == 7 and found["more"].tolist() == [3, 4] and found["b"] == b"\xff"
    python2 = b"\x80\x02}U\x04dataU\x02\xfe\xffs."         # its strings come as latin1
    assert squeeze.Plain(io.BytesIO(python2), encoding="latin1").load() == {"data": "\xfe\xff"}


def test_pickles_that_claim_memory_or_pointers_are_refused():
    array = np.arange(3, dtype=np.uint8).__reduce__()[2]
    for state in ((*array[:1], (10**15,), *array[2:]), (array[0], (1,), np.dtype("O"), False, [1])):
        class Claim:
            def __reduce__(self):
                return np.ndarray.__reduce__(np.zeros(1))[0], (np.ndarray, (10**15,), b"b"), state
        with pytest.raises(Exception):
            squeeze.Plain(io.BytesIO(pickle.dumps(Claim(), protocol=2)), encoding="latin1").load()


def test_a_pt_that_claims_more_than_it_brings_is_refused(tmp_path):
    torch.save({"x": torch.zeros(10**6)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as whole, \
            zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as bomb, zipfile.ZipFile(tmp_path / "c.pt", "w") as liar:
        for part in whole.infolist():
            raw = whole.read(part)
            bomb.writestr(part.filename, raw)
            liar.writestr(part.filename, raw[:100] if part.filename.endswith("data/0") else raw)
    assert (tmp_path / "b.pt").stat().st_size < 20000
    for name in ("b.pt", "c.pt"):
        one_line(lambda flags: squeeze.load_state(tmp_path / name), [], name, "damaged")


def test_images_that_do_not_fit_are_refused(here):
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    config, content = squeeze.read_json(run / "config.json"), torch.load(run / "images.pt", weights_only=True)
    images, labels = content["images"], content["labels"]
    relabel.load_run(run)
    bad = [{"images": images.float() * math.nan}, {"images": images[:, :1]}, {"images": images[..., :31]}, {"images": 1},
           {"images": torch.zeros(1, dtype=torch.uint8).expand(10**9, 3, 32, 32)}, {"labels": labels.float()},
           {"labels": labels - 1}, {"labels": labels + 1}, {"labels": labels[:-1]}, {"classes": ["a"] * 4},
           {"classes": [1, 2, 3, 4]}, {"classes": ["a", "b", "c", ""]}, {"mean": [math.nan] * 3}, {"std": [0.0] * 3},
           {"mean": [0.5]}, {"precision": "float16"}]
    for forged in (*({**content, **change} for change in bad), images, [content]):
        squeeze.save(run / "images.pt", forged)
        squeeze.finish_run(run, config, ["images.pt"])     # the stranger's config vouches for it
        one_line(lambda flags: relabel.load_run(run), [], "images.pt", "mend it")
    one_line(evaluation.main, [run], "images.pt", "mend it")


def test_labels_that_do_not_fit_are_refused(tmp_path):
    path, fine = tmp_path / "soft_labels.npy", np.zeros((2, 8, 4), np.float16)
    holed = fine.copy()
    holed[1, 2, 3] = math.nan
    for bad in (holed, fine + np.float16(math.inf), fine[:1], fine.astype(np.float32), fine[..., :3], fine[..., 0]):
        np.save(path, bad)
        one_line(lambda flags: relabel.check_labels(path, (2, 8, 4)), [], "soft_labels.npy", "remove")
    with open(path, "wb") as file:                         # another kind of file
        np.savez(file, fine)
    one_line(lambda flags: relabel.check_labels(path, (2, 8, 4)), [], "soft_labels.npy")
    path.write_bytes(b"")
    one_line(lambda flags: relabel.check_labels(path, (2, 8, 4)), [], "soft_labels.npy")
    for good in (fine, fine[..., :3]):                     # all logits, or --top-k 1
        np.save(path, good)
        relabel.check_labels(path, good.shape)
    hostile = torch.tensor([[1.0, 0.0, 9.0], [1.0, 0.0, -7.0]])            # classes that are none
    assert relabel.expand(hostile, 4).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]


NAMES = ["../../x", "/etc/passwd", "..", ".", "a/b", "a\\b", "con", "COM1.txt", "Great White", " lead", "trail.", "Cat", "cat",
         "CAT", "it's \"so\"", "Straße", "猫", "100%", "%41", "A", "a:b|c?*<>", "tab\tnew\nline", "-rf", "é", "e\u0301"]


def test_class_names_survive_the_way_out_and_back(tmp_path, monkeypatch):
    folders = relabel.folder_names(NAMES)
    assert len({name.lower() for name in folders}) == len(NAMES)           # also where case does not count
    for name in folders:
        assert name.isascii() and not set(name) & set('/\\:*?"<>|\t\n') and name not in ("", ".", "..")
        assert name == name.strip(" .") and not name.lower().startswith(("con", "com1"))
    assert relabel.folder_names(["layout0-rows", "n01440764", "sea lion"]) == ["layout0-rows", "n01440764", "sea lion"]
    monkeypatch.chdir(tmp_path)
    few = lambda root, classes: (*(squeeze.Split(*squeeze.toy(4, len(NAMES), seed)) for seed in (0, 1)), NAMES)
    monkeypatch.setitem(squeeze.LOADERS, "toy", few)
    squeeze.main(["--epochs", "1", "--precision", "float32"])
    teacher, = Path("runs").iterdir()
    recover.main(["--teacher", str(teacher), "--ipc", "2", "--iterations", "0"])
    before = sorted(path for path in tmp_path.rglob("*") if "back" not in path.parts)
    evaluation.main([str(teacher / "real-ipc2"), "--export", "back"])
    assert sorted(path for path in tmp_path.rglob("*") if "back" not in path.parts) == before
    relabel.main([str(teacher), "--images", "back", "--epochs", "1"])
    contents = [torch.load(teacher / run / "images.pt", weights_only=True) for run in ("real-ipc2", "back")]
    assert torch.equal(contents[0]["images"], contents[1]["images"]) and contents[1]["classes"] == NAMES
    first = sorted(relabel.folder_names(NAMES))[-1]        # uneven classes keep positions whatever the folders' order
    shutil.copy(next((Path("back") / first).iterdir()), Path("back") / first / "00002.png")
    shutil.rmtree(teacher / "back")
    relabel.main([str(teacher), "--images", "back", "--epochs", "1"])
    uneven = torch.load(teacher / "back" / "images.pt", weights_only=True)["labels"]
    assert uneven[:-1].tolist() == list(range(len(NAMES))) * 2
    (Path("back") / first / "00002.png").unlink()
    (tmp_path / "raw" / "Great White").mkdir(parents=True)               # a folder made by others: plain names do as well
    shutil.copytree("back", "raw", dirs_exist_ok=True)
    Path("raw/a%2Fb").rename("raw/not known")
    one_line(relabel.main, [teacher, "--images", "raw"], "'not known'", f"expected DIR/<class>/*, classes of {teacher}")


def test_messages_are_one_line_whatever_they_quote(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stage.py"])
    for error, line in ((BadInput("class 'a\nb\x1b[2J\udc80'"), "class 'a?b?[2J?'"),
                        (OSError("no\nroom"), "no?room: mend that, then go on with --resume")):
        def main(argv):
            raise error
        with pytest.raises(SystemExit) as stop:
            squeeze.script(main)
        assert stop.value.code == f"stage.py: {line}"


# ---- numbers

def test_dull_data_stays_finite(tmp_path, monkeypatch):
    """All-equal images, one class a batch: every FFC is of rank 0 on the way in, and channels are constant."""
    monkeypatch.chdir(tmp_path)
    dull = squeeze.Split(torch.full((8, 3, 32, 32), 7, dtype=torch.uint8), torch.arange(8) % 2)
    monkeypatch.setitem(squeeze.LOADERS, "toy", lambda root, classes: (dull, dull, ["a", "b"]))
    squeeze.main(["--classes", "2", "--epochs", "1", "--precision", "float32"])
    teacher, = Path("runs").iterdir()
    recover.main(["--teacher", str(teacher), "--ipc", "2", "--iterations", "3", "--batch", "1"])
    run, = teacher.glob("cfm-*")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(math.isfinite(line["ce"]) and math.isfinite(line["matching"]) for line in lines)


# ---- the same again

def test_relabel_does_not_depend_on_the_batch(here):
    """Views are bitwise the same; logits of a convolution part by its blocking, less than float16 of the labels sees."""
    images = squeeze.toy(10, 4, 0)[0]
    network, teacher, _ = recover.load_teacher("runs/toy-convnet", torch.device("cpu"))
    views = relabel.draw_views(0, 0, 40, 32, 0.08)
    logits = [relabel.soft_labels(network, teacher, images, views, batch) for batch in (1, 7, 40)]
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() < 1e-5 * logits[0].abs().max()


def test_a_clone_elsewhere_makes_the_same_bytes(tmp_path, monkeypatch):
    few = lambda root, classes: (*(squeeze.Split(*squeeze.toy(20, 4, seed)) for seed in (0, 1)), list("abcd"))
    monkeypatch.setitem(squeeze.LOADERS, "toy", few)
    made = []
    for place in ("a", "another place"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        squeeze.main(["--classes", "4", "--epochs", "1"])
        teacher, = Path("runs").iterdir()
        recover.main(["--teacher", str(teacher), "--ipc", "2", "--iterations", "3"])
        run, = teacher.glob("cfm-*")
        evaluation.main([str(run), "--seeds", "1", "--epochs", "3"])
        row, = squeeze.read_json(run / "result.json").values()
        made.append([(teacher / "teacher.pt").read_bytes(), (teacher / "statistics.pt").read_bytes(),
                     (run / "images.pt").read_bytes(), (run / "labels" / "soft_labels.npy").read_bytes(),
                     row["averaged"], row["raw"]])
    assert made[0] == made[1]


def test_precisions_do_not_mix(here):
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    config = squeeze.read_json(run / "config.json")
    assert config["settings"]["precision"] == "float32"
    squeeze.save(run / "config.json", {**config, "settings": {**config["settings"], "precision": "bfloat16"}})
    one_line(recover.main, ["--iterations", "0", "--ipc", "2", "--resume"], "precision is 'float32' now and was 'bfloat16'")
    squeeze.save(run / "config.json", config)
    evaluation.main([str(run), "--seeds", "1", "--epochs", "2"])
    result = squeeze.read_json(run / "result.json")
    row, = result.values()
    row["settings"]["precision"] = "bfloat16"
    squeeze.save(run / "result.json", result)
    one_line(evaluation.main, [run, "--seeds", "1", "--resume"], "result.json", "other labels, images, settings or tests")


@pytest.mark.parametrize("where, words", [
    ("pixels", "mean pixel nan: not finite in batch 2 at iteration 1:"),
    ("layer", "not finite in batch 2 at iteration 1 in layer 1.0:")])
def test_what_turns_non_finite_is_named_and_the_last_good_batch_kept(here, monkeypatch, where, words):
    make, normalise = recover.make_batch, torch.Tensor.clamp_

    def broken(job, args, images, classes, memory, rng):
        if memory and where == "pixels":
            monkeypatch.setattr(torch.Tensor, "clamp_", lambda self, *a: self.fill_(math.nan))
        if memory and where == "layer":
            job.network[0][0].weight.data[:] = math.nan
        return make(job, args, images, classes, memory, rng)
    flags = ["--iterations", "3", "--ipc", "3"]
    with monkeypatch.context() as patch:
        patch.setattr(recover, "make_batch", broken)
        one_line(recover.main, flags, "not finite", words, "lower --lr")
    monkeypatch.setattr(torch.Tensor, "clamp_", normalise)
    recover.main([*flags, "--resume"])
    assert Path("runs/toy-convnet/cfm-ipc3-iterations3/images.pt").is_file()


def test_a_batch_made_once_more_is_the_same(here, on_cpu, monkeypatch):
    """What was not finite once, and is the second time: the bytes of an undisturbed run, its memory not counted twice."""
    flags, make, calls = ["--iterations", "3", "--ipc", "3"], recover.make_batch, []
    recover.main(flags)
    folder = Path("runs/toy-convnet/cfm-ipc3-iterations3")
    whole, log = torch.load(folder / "images.pt")["images"], (folder / "log.jsonl").read_text()
    shutil.rmtree(folder)

    def once(job, *rest):
        calls.append(job.every)
        report = job.report
        if len(calls) == 2:
            job.report = lambda t, found, layers: report(t, (math.nan, *found[1:]), layers)
        try:
            return make(job, *rest)
        finally:
            job.report = report
    monkeypatch.setattr(recover, "make_batch", once)
    recover.main(flags)
    assert calls == [100, 100, 1, 100] and (folder / "log.jsonl").read_text() == log
    assert torch.equal(torch.load(folder / "images.pt")["images"], whole)


def test_out_of_memory_is_not_a_broken_teacher(here, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch.nn.Sequential, "to", lambda self, *args, **more: self if "memory_format" in more else full(self))
    with pytest.raises(torch.OutOfMemoryError):
        recover.load_teacher("runs/toy-convnet", torch.device("cpu"))


def test_out_of_memory_is_one_line_on_a_cpu_too(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recover.py"])
    with pytest.raises(SystemExit, match="recover.py: out of memory: lower --batch"):
        squeeze.script(lambda flags: torch.empty(10**16))
    with pytest.raises(RuntimeError, match="invalid for input of size"):       # another one is a bug, and shown as such
        squeeze.script(lambda flags: torch.empty(3).view(2))

    def illegal(flags):                                    # whatever it says of memory
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        squeeze.script(illegal)


def test_an_alpha_that_the_last_batch_could_not_resolve_is_refused_first(here):
    """The loop asks for eight times more where a batch has no more feature vectors than channels, 64 of 128 here: an
    alpha between the two bounds in the last round was refused only there, after all the others."""
    found = torch.load("runs/toy-convnet/statistics.pt", weights_only=True)
    norms = {name: torch.linalg.matrix_norm(layer["ffc"]).item() for name, layer in found["layers"].items()}
    largest = max(norm for name, norm in norms.items() if name != found["head"])
    flags, eps = ["--ipc", 4, "--iterations", 1, "--batch", 1], torch.finfo(torch.float32).eps
    last = (1 + math.cos(3 * math.pi / 4)) / 2             # of alpha_max, in the fourth round
    one_line(recover.main, [*flags, "--emu", "off", "--alpha-max", 4 * eps * largest / last], "--alpha-max", "raise")
    assert not list(Path("runs/toy-convnet").glob("cfm*"))
    recover.main([str(flag) for flag in [*flags, "--emu", "off", "--alpha-max", 9 * eps * largest / last]])
    recover.main([str(flag) for flag in [*flags, "--emu", "pool", "--alpha-max", 9 * eps * largest / last]])


def test_peak_memory_is_unknown_where_proc_does_not_tell(tmp_path, monkeypatch):
    """gVisor's /proc/self/status has no such line."""
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t  123 kB\n")
    monkeypatch.setattr(recover, "Path", lambda path: tmp_path / "status")
    assert math.isnan(recover.peak_memory(torch.device("cpu")))
    (tmp_path / "status").write_text("VmHWM:\t  125000 kB\nVmRSS:\t  123 kB\n")
    assert recover.peak_memory(torch.device("cpu")) == pytest.approx(128)    # /proc's kB are KiB


def test_a_setting_of_an_older_version_is_not_overlooked(tmp_path):
    squeeze.open_run(tmp_path, "relabel", {"epochs": 3, "top_k": 2}, {}, True)
    one_line(lambda flags: squeeze.open_run(tmp_path, "relabel", {"epochs": 3}, {}, True), [], str(tmp_path),
             "top_k is None now and was 2", "remove the folder")
    new = {"epochs": 3, "top_k": 2, "smoothing": 0.0, "since": False}      # flags of a later one, at what was done before
    assert squeeze.open_run(tmp_path, "relabel", new, {}, True)["settings"]["top_k"] == 2
    one_line(lambda flags: squeeze.open_run(tmp_path, "relabel", {**new, "smoothing": 0.1}, {}, True), [], "smoothing is 0.1 now")


def test_a_class_name_leads_nowhere_on_the_way_in(here):
    folder = Path("runs/toy-convnet")
    config, teacher = squeeze.read_config(folder, "squeeze"), torch.load(folder / "teacher.pt", weights_only=True)
    squeeze.save(folder / "teacher.pt", {**teacher, "classes": ["../secret", *teacher["classes"][1:]]})
    config["artefacts"]["teacher.pt"] = squeeze.sha256(folder / "teacher.pt")
    squeeze.save(folder / "config.json", config)
    Path("secret").mkdir(), Path("images", teacher["classes"][1]).mkdir(parents=True)
    one_line(relabel.main, [folder, "--images", "images"], "file for the classes %2E%2E%2F")


def test_a_strangers_teacher_is_looked_at(here):
    folder = Path("runs/toy-convnet")
    config, teacher = squeeze.read_config(folder, "squeeze"), torch.load(folder / "teacher.pt", weights_only=True)
    for wrong in ({"network": "get_model"}, {"network": "resnet18"}, {"precision": "float8"}, {"size": "large"},
                  {"state_dict": {}}, {"state_dict": [1]}, {"classes": 7}):
        squeeze.save(folder / "teacher.pt", {**teacher, **wrong})
        config["artefacts"]["teacher.pt"] = squeeze.sha256(folder / "teacher.pt")
        squeeze.save(folder / "config.json", config)
        one_line(recover.main, ["--ipc", "1"], "teacher.pt", "squeeze again")
