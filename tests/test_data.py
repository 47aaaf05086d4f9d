"""Data sets that are files, the way out to other code and back, and labels at scale."""
import json
import os
import re
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import baselines
import eval as evaluation
import recover
import relabel
import squeeze
from conftest import one_line


def picture(path, mode="RGB", size=(40, 36), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """train/ and val/ of two classes, five and two images each, one of them grey and one CMYK."""
    for part, n in (("train", 5), ("val", 2)):
        for c, name in enumerate(("cat", "dog")):
            for i in range(n):
                mode = {0: "L", 1: "CMYK"}.get(i, "RGB")
                picture(tmp_path / "set" / part / name / f"{i}.jpg", mode, seed=100 * c + i)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "set"


def test_folder_data(folder):
    data = squeeze.load_data("folder", str(folder), size=32)
    assert data.classes == ["cat", "dog"] and data.train.labels.tolist() == [0] * 5 + [1] * 5
    images = recover.take(data, data.train, torch.tensor([0, 6]))
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images[0, 0], images[0, 1])         # grey stays grey in three channels
    seen = list(squeeze.batches(data, data.train, 3))
    assert torch.equal(torch.cat([x for x, _ in seen])[6], images[1]) and [len(y) for _, y in seen] == [3, 3, 3, 1]
    inside = data._replace(train=squeeze.in_memory(data, data.train, torch.device("cpu")))
    assert torch.equal(inside.train.images[6], images[1]) and torch.equal(inside.train.labels, data.train.labels)
    for augment, kept in (("crop", inside), ("resized", data)):
        epochs = [torch.cat([x for x, _ in squeeze.training_batches(kept, 4, augment, np.random.default_rng(seed))])
                  for seed in (0, 0, 1)]
        assert torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[0], epochs[2]) and len(epochs[0]) == 10


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems refuse such names")
def test_file_names_that_are_not_utf8(folder):
    """Out of old archives, say: Python reads them as lone surrogates, which nothing encodes but the file system's codec."""
    before = squeeze.load_data("folder", str(folder), size=32).sha256
    (folder / "train" / "cat" / "4.jpg").rename(folder / "train" / "cat" / os.fsdecode(b"caf\xe9.jpg"))
    data = squeeze.load_data("folder", str(folder), size=32)
    assert data.sha256 != before and recover.take(data, data.train, torch.arange(10)).shape == (10, 3, 32, 32)


def test_folder_errors(folder):
    load = lambda: squeeze.load_data("folder", str(folder), size=32)
    one_line(lambda flags: squeeze.load_data("folder", "nowhere"), [], "--data nowhere", "train/", "found none")
    extra = folder / "val" / "mouse"
    picture(extra / "0.jpg")
    one_line(lambda flags: load(), [], "expected train/<class>/<image>", "'mouse'")
    shutil.rmtree(extra)
    (folder / "train" / "cat" / "3.jpg").write_bytes(b"no picture")
    one_line(lambda flags: list(squeeze.batches(load(), load().train, 4)), [], "cat/3.jpg", "not a readable image")
    many = squeeze.Split(load().train.images * 200, torch.zeros(2000, dtype=torch.long))     # two workers: not their traceback
    one_line(lambda flags: list(squeeze.batches(load(), many, 4)), [], "cat/3.jpg: not a readable image: mend or remove it")
    rded = ["--method", "rded", "--dataset", "folder", "--data", folder, "--ipc", "2"]     # four crops an image of 224 px
    one_line(baselines.main, rded, "--ipc", "'cat'", "5 training images, 8 are needed")
    assert not Path("runs").exists()                       # and no teacher is trained for it
    one_line(lambda flags: recover.starting_images(load(), 6), [], "--ipc", "'cat'", "5 training images, 6 are needed")
    (folder / "val" / "empty").mkdir(), (folder / "train" / "empty").mkdir()
    one_line(lambda flags: load(), [], "train", "classes empty", "some of every class")
    (folder / "empty" / "train").mkdir(parents=True)
    one_line(lambda flags: squeeze.load_data("imagenet", str(folder / "empty")), [], "expected train/<class>/<image>", "none")


def test_folder_runs_end_to_end_and_the_size_is_remembered(folder, capsys):
    squeeze.main(["--dataset", "folder", "--data", str(folder), "--size", "32", "--network", "convnet", "--epochs",
                  "1", "--batch", "5"])
    teacher = "runs/folder-set-convnet-size32-epochs1-batch5"
    assert f"next: python recover.py --teacher {teacher}" in capsys.readouterr().out
    recover.main(["--teacher", teacher, "--ipc", "2", "--iterations", "2"])
    run = f"{teacher}/cfm-ipc2-iterations2"
    assert torch.load(f"{run}/images.pt", weights_only=True)["images"].shape == (4, 3, 32, 32)
    evaluation.main([run, "--seeds", "1", "--epochs", "2"])
    assert "plan: 2 rounds of 2 images, 2 batches of 2 iterations" in capsys.readouterr().out
    one_line(squeeze.main, ["--size", "32"], "--size", "folder")
    one_line(squeeze.main, ["--pretrained"], "--pretrained", "imagenet")
    squeeze.main(["--dataset", "folder", "--data", str(folder), "--size", "16", "--network", "convnet", "--epochs", "1"])
    one_line(relabel.main, [run, "--teacher", "runs/folder-set-convnet-size16-epochs1"], "--teacher", "another size")
    assert not list(Path(run).glob("labels-*"))


def test_the_next_command_can_be_typed(here, capsys, monkeypatch):
    """As printed, of a teacher that has held images out too; and a set of one image a class has none to hold out."""
    monkeypatch.setitem(squeeze.LOADERS, "toy", lambda *_: (*(squeeze.Split(*squeeze.toy(60, 3, s)) for s in (0, 1)), [*"abc"]))
    small = ["--classes", "3", "--epochs", "1", "--validate"]
    squeeze.main(small)
    recover.main(["--teacher", "runs/toy-convnet-classes3-epochs1-validate", "--ipc", "1", "--iterations", "1"])
    relabel.main(["runs/toy-convnet-classes3-epochs1-validate/cfm-ipc1-iterations1", "--epochs", "2"])
    commands = re.findall(r"next: python eval.py (.*)", capsys.readouterr().out)
    assert len(commands) == 2 and commands[0] == commands[1] and commands[0].endswith(" --validate")
    evaluation.main([*commands[1].split(), "--seeds", "1"])
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            picture(Path("set") / part / name / "0.jpg")
    one_line(squeeze.main, ["--dataset", "folder", "--data", "set", "--validate"], "--validate", "none is left to train on")
    picture(Path("set") / "train" / "cat" / "1.jpg")       # one class that would be gone is enough
    one_line(squeeze.main, ["--dataset", "folder", "--data", "set", "--validate"], "--validate", "one image")


def tiny(root):
    """Tiny-ImageNet's layout with two of its classes."""
    base = root / "tiny-imagenet-200"
    rows = []
    for c, wnid in enumerate(("n02", "n01")):
        for i in range(3):
            picture(base / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", size=(64, 64), seed=10 * c + i)
        picture(base / "val" / "images" / f"val_{c}.JPEG", size=(64, 64), seed=50 + c)
        rows.append(f"val_{c}.JPEG\t{wnid}\t0\t0\t1\t1")
    rows.append("val_9.JPEG\tn99\t0\t0\t1\t1")             # a class that this copy lacks
    (base / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    return base


def test_held_out_images_and_crops(folder):
    """--validate: the last tenth (here at least one) of each class; "crop": S pixels of S + 8, mirrored or not."""
    data = squeeze.load_data("folder", str(folder), size=32, validate=True)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 and [Path(path).name for path in data.test.images] == ["4.jpg"] * 2
    toy = squeeze.load_data("toy", "data", classes=3, validate=True)
    images, labels = squeeze.toy(1333, 3, 0)
    assert torch.equal(toy.test.images, torch.cat([images[labels == c][1199:] for c in range(3)]))
    assert torch.equal(toy.train.images, torch.cat([images[labels == c][:1199] for c in range(3)]))
    data = squeeze.Data([], 32, squeeze.Split(images[:9], torch.arange(9)), None, "")
    padded = torch.nn.functional.pad(images[:9], (4, 4, 4, 4))
    for crops, index in squeeze.training_batches(data, 4, "crop", np.random.default_rng(0)):
        for crop, i in zip(crops, index):
            windows = [padded[i, :, top:top + 32, left:left + 32] for top in range(9) for left in range(9)]
            assert any(torch.equal(crop, window) or torch.equal(crop, window.flip(2)) for window in windows)


def test_tiny(tmp_path, monkeypatch):
    base = tiny(tmp_path)
    data = squeeze.load_data("tiny", str(tmp_path))
    assert data.classes == ["n01", "n02"] and data.size == 64 and data.test.labels.tolist() == [1, 0]
    train = squeeze.in_memory(data, data.train, torch.device("cpu"))
    assert train.images.shape == (6, 3, 64, 64)
    expected = torchvision.transforms.functional.pil_to_tensor(Image.open(base / "train/n01/images/n01_1.JPEG"))
    assert torch.equal(train.images[1], expected)
    (base / "val" / "images" / "val_1.JPEG").unlink()
    one_line(lambda flags: squeeze.in_memory(data, data.test, torch.device("cpu")), [], "val_1.JPEG", "not a readable image")
    (base / "val" / "val_annotations.txt").unlink()
    one_line(lambda flags: squeeze.load_data("tiny", str(tmp_path)), [], "val/val_annotations.txt")
    shutil.rmtree(base)
    monkeypatch.setattr(squeeze.datasets.utils, "download_and_extract_archive", lambda *a,
                        **k: (_ for _ in ()).throw(OSError("no network")))
    one_line(lambda flags: squeeze.load_data("tiny", str(tmp_path)), [], "cannot be downloaded",
             "tiny-imagenet-200.zip")


def test_tiny_half_unpacked_is_no_smaller_data_set(tmp_path, monkeypatch):
    """Unpacking killed after the first class: the next call unpacks again, and there is no folder before it ends."""
    def unpack(url, root, inside, md5):
        whole = tiny(Path(inside))
        if not (tmp_path / "again").exists():
            shutil.rmtree(whole / "train" / "n01")
            (tmp_path / "again").touch()
            raise KeyboardInterrupt
    monkeypatch.setattr(squeeze.datasets.utils, "download_and_extract_archive", unpack)
    with pytest.raises(KeyboardInterrupt):
        squeeze.load_data("tiny", str(tmp_path))
    assert not (tmp_path / "tiny-imagenet-200").exists()
    assert squeeze.load_data("tiny", str(tmp_path)).classes == ["n01", "n02"]


def test_test_images_are_tested_in_batches_that_fit(monkeypatch):
    """500 images of 224 pixels would take a ConvNet 13 GB; of 32 pixels they are few."""
    for size, most in ((32, 500), (224, 64)):
        split, seen = squeeze.Split(torch.zeros(130, 3, size, size, dtype=torch.uint8), torch.zeros(130, dtype=torch.long)), []
        monkeypatch.setattr(squeeze, "forward", lambda network, x: seen.append(len(x)) or torch.zeros(len(x), 2))
        network = torch.nn.Linear(1, 1)
        assert squeeze.accuracy(network, squeeze.Data(["a", "b"], size, None, split, ""), dict(mean=[0.0] * 3, std=[1.0] * 3)) == 100
        assert sum(seen) == 130 and max(seen) == min(most, 130)


# ---- teachers and students

def test_teacher_file(tmp_path, monkeypatch):
    few = lambda root, classes: (*(squeeze.Split(*squeeze.toy(100, classes, seed)) for seed in (0, 1)), [*"abcdef"[:classes]])
    monkeypatch.setitem(squeeze.LOADERS, "toy", few)
    monkeypatch.chdir(tmp_path)
    squeeze.main(["--classes", "4", "--epochs", "1", "--precision", "float32"])
    Path("runs/toy-convnet-classes4-epochs1").rename("runs/toy-convnet")
    state = torch.load("runs/toy-convnet/teacher.pt", weights_only=True)
    torch.save(state["state_dict"], "mine.pth")
    score = json.loads(Path("runs/toy-convnet/config.json").read_text())["results"]["test"]
    statistics = torch.load("runs/toy-convnet/statistics.pt", weights_only=True)["layers"]
    shutil.rmtree("runs")
    squeeze.main(["--classes", "4", "--teacher", "mine.pth", "--precision", "float32"])
    made, = Path("runs").iterdir()
    assert "teachermine.pth" in made.name
    assert json.loads((made / "config.json").read_text())["results"]["test"] == score
    again = torch.load(made / "statistics.pt", weights_only=True)["layers"]
    assert all(torch.allclose(again[name]["ffc"], statistics[name]["ffc"], rtol=1e-4) for name in statistics)
    mine = {"state_dict": state["state_dict"], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    torch.save(mine, "normed.pth")                         # its own normalisation goes with it to all stages
    squeeze.main(["--classes", "4", "--teacher", "normed.pth", "--precision", "float32"])
    folder, = Path("runs").glob("*normed*")
    recover.main(["--teacher", str(folder), "--ipc", "1", "--iterations", "1"])
    content = torch.load(folder / "cfm-ipc1-iterations1" / "images.pt", weights_only=True)
    assert content["mean"] == mine["mean"] and content["std"] == mine["std"]
    assert json.loads((folder / "config.json").read_text())["results"]["test"] != score
    shutil.rmtree("runs")
    one_line(squeeze.main, ["--classes", "6", "--teacher", "mine.pth"], "--teacher mine.pth", "class count")
    torch.save({**mine, "mean": [0.0] * 3, "std": [1.0] * 3}, "plain.pth")             # pixels as they are
    squeeze.main(["--classes", "4", "--teacher", "plain.pth", "--precision", "float32"])
    shutil.rmtree("runs")
    one_line(squeeze.main, ["--classes", "4", "--network", "resnet18", "--teacher", "mine.pth"],
             "another architecture")
    Path("mine.pth").write_bytes(b"nothing")
    one_line(squeeze.main, ["--classes", "4", "--teacher", "mine.pth"], "not a readable state dict")
    one_line(squeeze.main, ["--classes", "4", "--teacher", "absent.pth"], "--teacher absent.pth")
    torch.save({**mine, "mean": [123.0, 117.0, 104.0]}, "bytes.pth")
    one_line(squeeze.main, ["--classes", "4", "--teacher", "bytes.pth"], "mean must be three numbers of [0, 1]")
    torch.save({**mine, "std": [0.2, 0.0, 0.2]}, "flat.pth")
    one_line(squeeze.main, ["--classes", "4", "--teacher", "flat.pth"], "std of (0, 1]")
    torch.save({**mine, **{key: torch.tensor(mine[key], dtype=torch.float64) for key in ("mean", "std")}}, "double.pth")
    squeeze.main(["--classes", "4", "--teacher", "double.pth", "--precision", "float32"])
    shutil.rmtree("runs")
    for flag, value in (("--seed", "7"), ("--wd", "0"), ("--smoothing", "0.1")):
        one_line(squeeze.main, ["--classes", "4", "--teacher", "mine.pth", flag, value], f"{flag} has no effect")
    assert not Path("runs").exists()


def test_a_teacher_for_held_out_images_has_not_seen_them(tmp_path, monkeypatch):
    few = lambda root, classes: (*(squeeze.Split(*squeeze.toy(20, 2, seed)) for seed in (0, 1)), [*"ab"])
    monkeypatch.setitem(squeeze.LOADERS, "toy", few)
    monkeypatch.chdir(tmp_path)
    small = ["--classes", "2", "--epochs", "2", "--batch", "20", "--keep", "1", "--precision", "float32"]
    for flags, name in ((small, "all.pt"), ([*small, "--validate"], "part.pt")):
        squeeze.main(flags)
        next(Path("runs").glob("*/epoch1of2.pt")).rename(name)
        shutil.rmtree("runs")
    again = ["--classes", "2", "--validate", "--precision", "float32", "--teacher"]
    one_line(squeeze.main, [*again, "all.pt"], "--teacher all.pt", "has seen what --validate holds out")
    assert not Path("runs").exists()
    squeeze.main([*again, "part.pt"])                      # whoever kept it has held the same images out
    one_line(squeeze.main, ["--dataset", "imagenet", "--pretrained", "--validate"], "--pretrained", "leave out --validate")


def test_pretrained_weights_that_cannot_be_fetched(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    one_line(squeeze.main, ["--dataset", "imagenet", "--data", folder, "--pretrained"], "--pretrained",
             "put the file into", "hub")


@pytest.mark.parametrize("name", squeeze.STUDENTS)
@pytest.mark.parametrize("size", [32, 64])
def test_students_fit_small_images(name, size):
    if (name, size) == ("regnet_y_8gf", 64) or (name == "resnet101" and size == 64):
        pytest.skip("the same code as at 32 px, and seconds long")
    with torch.no_grad():
        network = squeeze.build_network(name, 7, size).eval()
        shapes = []
        hooks = [m.register_forward_hook(lambda m, i, o: shapes.append(o.shape[-1])) for m in network.modules()
                 if isinstance(m, torch.nn.Conv2d)]
        assert network(torch.randn(1, 3, size, size)).shape == (1, 7)
    assert shapes[0] == size and len(hooks)                # the stem keeps every pixel


# ---- out to the world, and back

def test_export_reads_back_to_the_same_accuracy(here):
    recover.main(["--ipc", "2", "--iterations", "4"])
    run = "runs/toy-convnet/cfm-ipc2-iterations4"
    evaluation.main([run, "--seeds", "1", "--epochs", "4"])
    evaluation.main([run, "--export", "images-of-mine"])
    content = torch.load(f"{run}/images.pt", weights_only=True)
    loaded = torchvision.datasets.ImageFolder("images-of-mine")
    assert loaded.classes == sorted(content["classes"]) and len(loaded) == 8
    pixels = torchvision.transforms.functional.pil_to_tensor(loaded[1][0])
    label = content["classes"].index(loaded.classes[loaded[1][1]])
    assert torch.equal(pixels, content["images"][content["labels"] == label][1])
    relabel.main(["runs/toy-convnet", "--images", "images-of-mine", "--epochs", "4"])
    back = "runs/toy-convnet/images-of-mine"
    assert torch.equal(torch.load(f"{back}/images.pt", weights_only=True)["images"], content["images"])
    evaluation.main([back, "--seeds", "1"])
    results = [json.loads(Path(f"{r}/result.json").read_text())["convnet-epochs4"] for r in (run, back)]
    assert results[0]["averaged"] == results[1]["averaged"] and results[0]["raw"] == results[1]["raw"]
    shutil.rmtree(back)
    one_line(relabel.main, ["runs/toy-convnet", "--images", "images-of-mine", "--top-k", "2"], "--top-k 2")
    relabel.main(["runs/toy-convnet", "--images", "images-of-mine", "--epochs", "1"])      # and then nothing is in the way
    one_line(evaluation.main, [run, "--export", "images-of-mine"], "--export", "not an empty folder")
    one_line(relabel.main, ["runs/toy-convnet", "--images", "nowhere"], "--images nowhere", "found none")
    Path("images-of-mine/zebra").mkdir()
    one_line(relabel.main, ["runs/toy-convnet", "--images", "images-of-mine"], "'zebra'")
    Path("images-of-mine/zebra").rmdir()
    picture(Path("images-of-mine/layout0-rows/00000.png"))
    one_line(relabel.main, ["runs/toy-convnet", "--images", "images-of-mine"], "00000.png", "pixels found")


# ---- labels at scale

def test_ways_to_store_fewer_labels(here, monkeypatch):
    recover.main(["--ipc", "2", "--iterations", "0"])
    run = Path("runs/toy-convnet/real-ipc2")
    one_line(relabel.main, [run, "--epochs", "3", "--keep-epochs", "4"], "--keep-epochs 4", "--epochs 3")
    one_line(relabel.main, [run, "--keep-epochs", "61"], "--keep-epochs 61", "--epochs 60")        # the default's
    one_line(relabel.main, [run, "--epochs", "1000000000000"], "soft labels need", "are free")
    evaluation.main([str(run), "--seeds", "1", "--epochs", "4", "--online"])
    relabel.main([str(run), "--epochs", "4", "--batch", "8"])               # as --online asks: an epoch at a time
    evaluation.main([str(run), "--seeds", "1", "--epochs", "4", "--resume"])
    result = json.loads((run / "result.json").read_text())
    assert result["convnet-epochs4"]["averaged"] == result["convnet-epochs4-online"]["averaged"]
    stored, asked = result["convnet-epochs4"]["views"], result["convnet-epochs4-online"]["views"]
    assert stored == {**stored, **asked} and asked.keys() == {"epochs", "keep_epochs", "scale", "seed"}
    assert result["convnet-epochs4"]["label_bytes"] == 2 * 4 * 8 * 4
    shutil.rmtree(run / "labels"), (run / "result.json").unlink()
    relabel.main([str(run), "--batch", "8", "--epochs", "4", "--keep-epochs", "2"])
    assert np.load(run / "labels" / "soft_labels.npy").shape == (2, 8, 4)
    draw, seen = relabel.draw_views, []
    monkeypatch.setattr(relabel, "draw_views", lambda seed, epoch, *rest: seen.append(epoch) or draw(seed, epoch, *rest))
    evaluation.main([str(run), "--seeds", "1"])
    assert seen == [0, 1, 0, 1]                            # students cycle through what is stored
    assert json.loads((run / "result.json").read_text())["convnet-epochs4-keep-epochs2"]["label_bytes"] == 2 * 2 * 8 * 4
    whole = relabel.expand(torch.from_numpy(np.load(run / "labels" / "soft_labels.npy")[1]).float(), 4)
    shutil.rmtree(run / "labels"), (run / "result.json").unlink()
    one_line(relabel.main, [run, "--top-k", "2"], "--top-k 2 of 4 classes")
    assert not (run / "labels").exists()
    relabel.main([str(run), "--batch", "8", "--epochs", "4", "--keep-epochs", "2", "--top-k", "1"])
    stored = torch.from_numpy(np.load(run / "labels" / "soft_labels.npy")).float()
    found = relabel.expand(stored[1], 4)
    assert stored.shape == (2, 8, 3) and torch.equal(found.max(1).values, whole.max(1).values)
    assert torch.allclose(*((v / 20).logsumexp(1) for v in (found, whole)), atol=1e-3)     # float16
    monkeypatch.setattr(relabel, "draw_views", draw)
    evaluation.main([str(run), "--seeds", "1", "--epochs", "2"])
    row = json.loads((run / "result.json").read_text())["convnet-epochs2-keep-epochs2-top-k1"]
    assert row["label_bytes"] == 2 * 2 * 8 * 3 and row["views"]["top_k"] == 1
    one_line(evaluation.main, [run, "--resume", "--temperature", "4"], "--temperature 4.0", "--top-k")


def test_compressed_labels_keep_the_mass():
    logits = torch.randn(50, 20, dtype=torch.float64) * 5
    assert torch.equal(relabel.expand(logits, 20), logits)
    for k in (1, 5, 9):
        stored, (top, classes) = relabel.compress(logits, k), logits.topk(k, 1)
        assert stored.shape == (50, 2 * k + 1) and torch.equal(stored[:, k + 1:].half().long(), classes)
        back = relabel.expand(stored, 20)
        assert torch.equal(back.gather(1, classes), top)
        p, q = (torch.softmax(v / 20, 1) for v in (logits, back))
        rest = torch.ones_like(q).scatter(1, classes, 0).bool()
        wanted = (p * rest).sum(1, keepdim=True) / (20 - k)        # the others' mean probability, for each of them
        assert torch.allclose(q, torch.where(rest, wanted, p), atol=1e-14)


def test_labels_that_are_there_are_checked_before_others_are_made(here):
    for ipc in ("1", "2"):
        recover.main(["--ipc", ipc, "--iterations", "0"])
    runs = [Path(f"runs/toy-convnet/real-ipc{ipc}") for ipc in (1, 2)]
    relabel.main([str(runs[1]), "--epochs", "2"])
    one_line(evaluation.main, [*runs, "--epochs", "3"], "real-ipc2", "holds 2")
    assert not (runs[0] / "labels").exists()


def test_relabel_resumes_to_the_same_labels(here, monkeypatch):
    recover.main(["--ipc", "2", "--iterations", "0"])
    run = Path("runs/toy-convnet/real-ipc2")
    relabel.main([str(run), "--batch", "8", "--epochs", "4"])
    whole = (run / "labels" / "soft_labels.npy").read_bytes()
    shutil.rmtree(run / "labels")
    draw, seen = relabel.draw_views, []

    def dies(seed, epoch, *rest):
        seen.append(epoch)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return draw(seed, epoch, *rest)
    monkeypatch.setattr(relabel, "draw_views", dies)
    with pytest.raises(KeyboardInterrupt):
        relabel.main([str(run), "--batch", "8", "--epochs", "4"])
    one_line(evaluation.main, [run], "unfinished")
    relabel.main([str(run), "--batch", "8", "--epochs", "4", "--resume"])
    assert seen == [0, 1, 2, 2, 3] and (run / "labels" / "soft_labels.npy").read_bytes() == whole


def test_epochs_labelled_together_are_those_labelled_alone(here, monkeypatch):
    """Views bit by bit, logits but for the last digits of a larger batch; and a kill between two batches, or inside one,
    costs no more than that batch and no byte."""
    images, both = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), relabel.draw_views(3, 5, 8, 32, 0.08, together=2)
    for epoch, index in zip((5, 6), torch.arange(16).split(8)):
        alone = relabel.render(images, relabel.draw_views(3, epoch, 8, 32, 0.08), torch.arange(8))
        assert torch.equal(relabel.render(images, both, index), alone)
    recover.main(["--ipc", "2", "--iterations", "0"])
    run = Path("runs/toy-convnet/real-ipc2")
    path, made = run / "labels" / "soft_labels.npy", {}
    for batch in (8, 27):                                  # of 8 images: an epoch at a time, or three; of 8 epochs
        relabel.main([str(run), "--epochs", "8", "--batch", str(batch)])
        made[batch], log = path.read_bytes(), (run / "labels" / "log.jsonl").read_text().splitlines(keepends=True)
        config = squeeze.read_json(run / "labels" / "config.json")
        if batch == 8:
            one = torch.from_numpy(np.load(path)).float()
            shutil.rmtree(run / "labels")
    assert torch.allclose(torch.from_numpy(np.load(path)).float(), one, atol=2e-2) and len(log) == 8
    draw, seen = relabel.draw_views, []
    monkeypatch.setattr(relabel, "draw_views", lambda seed, epoch, *rest: (
        seen.append((epoch, rest[-1])) or draw(seed, epoch, *rest)))
    for lines, epochs, wanted in ((6, 6, [(6, 2)]), (8, 8, [(6, 2)]), (4, 5.5, [(3, 3), (6, 2)]),
                                  (2, 3, [(0, 3), (3, 3), (6, 2)])):
        squeeze.save(run / "labels" / "config.json", {**config, "artefacts": {}, "results": {}})
        (run / "labels" / "log.jsonl").write_text("".join(log[:lines]))
        path.unlink()
        path.with_suffix(".npy.tmp").write_bytes(made[27][:int(128 + epochs * 64)])
        seen.clear()
        relabel.main([str(run), "--epochs", "8", "--batch", "27", "--resume"])
        assert seen == wanted and path.read_bytes() == made[27]


# ---- the report

def test_radial_psd_finds_a_wave():
    x = torch.arange(32).float()
    for cycles in (3, 12):
        wave = (127 + 100 * torch.sin(2 * np.pi * cycles * x / 32)).expand(2, 3, 32, 32).to(torch.uint8)
        radius, power, share = evaluation.radial_psd(wave)
        assert radius[power.argmax()] == cycles and (share > 0.95) == (cycles == 12)


def test_report(here):
    recover.main(["--ipc", "2", "--iterations", "0"])
    recover.main(["--ipc", "2", "--iterations", "3"])
    runs = ["runs/toy-convnet/real-ipc2", "runs/toy-convnet/cfm-ipc2-iterations3"]
    evaluation.main([*runs, "--report"])
    out = Path("runs/toy-convnet/report")
    rows = json.loads((out / "report.json").read_text())["runs"]
    assert set(rows) == {"real-ipc2", "cfm-ipc2-iterations3"}
    assert all(-1 <= row["similarity"] <= 1 and 0 < row["high_share"] < 1 for row in rows.values())
    assert (out / "psd.svg").read_text().count("<polyline") == 2
    assert "cfm-ipc2-iterations3 round 2" in (out / "filters.svg").read_text()
    assert Image.open(out / "grid.png").size == (10 * 33 + 1, 4 * 33 + 1)
    for name in ["layout0-rows", "layout0-columns", "layout1-rows", "layout1-columns"]:
        (Path("grey <& flat>") / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "grey").save(Path("grey <& flat>") / name / "0.png")
    relabel.main(["runs/toy-convnet", "--images", "grey <& flat>", "--epochs", "1"])
    evaluation.main(["runs/toy-convnet/grey <& flat>", "--report"])
    assert "grey <& flat>" in [e.text for e in ElementTree.parse(out / "psd.svg").iter()]
    shutil.copytree("runs/toy-convnet", "runs/other-convnet")
    one_line(evaluation.main, [runs[0], "runs/other-convnet/real-ipc2", "--report"], "--report", "other-convnet")
    (Path(runs[0]) / "images.pt").unlink()
    one_line(evaluation.main, [*runs, "--report"], "images.pt", "missing")
