"""The four stages on toy images: contracts, reproducibility, resuming, and what bad input gets."""
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision

import eval as evaluation
import recover
import relabel
import spectral
import squeeze
from conftest import ROOT
from squeeze import BadInput

TINY = ["--iterations", "8", "--ipc", "3"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with runs/toy-convnet: 4 classes, one epoch."""
    here = tmp_path_factory.mktemp("pipeline")
    os.chdir(here)
    squeeze.main(["--classes", "4", "--epochs", "1"])
    return here


@pytest.fixture
def here(teacher, tmp_path, monkeypatch):
    """A fresh copy of it, as the working directory."""
    shutil.copytree(teacher / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def script(name, *flags, **kw):
    return subprocess.run([sys.executable, ROOT / f"{name}.py", *map(str, flags)], capture_output=True, text=True, **kw)


# ---- data

def test_toy_is_deterministic_and_pairs_share_their_colours():
    start = time.process_time()
    images, labels = squeeze.toy(400, 10, 0)
    assert time.process_time() - start < 5 and images.shape == (4000, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, squeeze.toy(400, 10, 0)[0]) and not torch.equal(images, squeeze.toy(400, 10, 1)[0])
    means = torch.stack([F.avg_pool2d(images[labels == k].float().mean(0, keepdim=True), 8).flatten() for k in range(10)])
    distance = torch.cdist(means, means) + 1e9 * torch.eye(10)
    assert distance.argmin(1).tolist() == [k ^ 1 for k in range(10)]      # seen coarsely, the other of the pair is nearest


def cifar_folder(root, n=10000):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        content = {"labels": (np.arange(n) % 10).tolist(), "data": pixels}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    return folder


def test_cifar10_reads_repickled_files_and_names_broken_ones(tmp_path, monkeypatch):
    folder = cifar_folder(tmp_path)
    data = squeeze.load_data("cifar10", str(tmp_path))
    assert data.train.images.shape == (50000, 3, 32, 32) and data.test.images.shape == (10000, 3, 32, 32)
    first = pickle.loads((folder / "data_batch_1").read_bytes())
    assert (data.train.images[7].numpy().reshape(-1) == first["data"][7]).all() and data.classes[3] == "class3"
    whole = (folder / "data_batch_3").read_bytes()
    (folder / "data_batch_3").write_bytes(whole[:100000])
    with pytest.raises(BadInput, match="data_batch_3: a truncated or damaged file found"):
        squeeze.load_data("cifar10", str(tmp_path))
    (folder / "data_batch_3").write_bytes(pickle.dumps({**first, "data": first["data"][:99], "labels": first["labels"][:99]}))
    with pytest.raises(BadInput, match="found, expected"):
        squeeze.load_data("cifar10", str(tmp_path))
    (folder / "data_batch_3").unlink()                     # a missing file is downloaded; here the network says no
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive",
                        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(BadInput, match="data_batch_3 cannot be read or downloaded"):
        squeeze.load_data("cifar10", str(tmp_path))
    with pytest.raises(BadInput, match="no such folder"):
        squeeze.load_data("cifar10", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="cannot be read or downloaded"):
        squeeze.load_data("cifar10", str(tmp_path / "empty"))


def real_images():
    """1,000 images: CIFAR-10's first if the environment variable CIFAR10 names its folder, else toy's."""
    if "CIFAR10" in os.environ:
        return squeeze.load_data("cifar10", os.environ["CIFAR10"]).train.images[:1000]
    return squeeze.toy(100, 10, 0)[0]


def test_statistics_equal_numpy_on_images():
    """The statistics pass, batch by batch, against NumPy on all features at once, through fixed random weights."""
    torch.manual_seed(0)
    images = real_images()
    network = squeeze.build_network("convnet", 10, 32).eval()
    labels = torch.arange(1000) % 10
    data = squeeze.Data("x", [str(i) for i in range(10)], 32, squeeze.Split(images, labels), None, "")
    with spectral.collect_inputs(network) as features, torch.no_grad():
        network(squeeze.normalise(images, [0.5] * 3, [0.25] * 3))
    expected = {}
    for name, X in features.items():
        X = X.permute(0, 2, 3, 1).double().numpy()
        H, X = X.mean((1, 2)), X.reshape(-1, X.shape[-1])
        expected[name] = np.cov(X.T, bias=True), X.mean(0), H.T @ np.eye(10)[labels] / 1000
    layers, head = squeeze.gather_statistics(squeeze.fold(network), data, [0.5] * 3, [0.25] * 3, torch.device("cpu"), 128)
    assert set(layers) == {*expected, head}
    for name, (psi, mean, phi) in expected.items():
        for found, wanted in ((layers[name]["ffc"], psi), (layers[name]["mean"], mean), (layers[name]["flc"], phi)):
            assert np.linalg.norm(found.double().numpy() - wanted) < 1e-5 * np.linalg.norm(wanted)


# ---- networks and views

@pytest.mark.parametrize("name, size, convolutions", [("convnet", 32, 3), ("convnet", 64, 4), ("resnet18", 32, 17)])
def test_folding_changes_nothing_and_selects_the_papers_layers(name, size, convolutions):
    torch.manual_seed(0)
    network, x = squeeze.build_network(name, 5, size), torch.randn(4, 3, size, size)
    network.train()
    network(x)                                             # running statistics unlike 0 and 1
    network.eval()
    with spectral.collect_inputs(network) as before, torch.no_grad():
        logits = network(x)
    before = {key: value.clone() for key, value in before.items()}
    squeeze.fold(network)
    with spectral.collect_inputs(network) as after, torch.no_grad():
        folded = network(x)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules()) and len(after) == convolutions
    assert torch.allclose(folded, logits, atol=1e-4) and list(before) == list(after)
    assert all(torch.allclose(before[key], after[key], atol=1e-4) for key in before)


def test_views_are_bitwise_the_same_whatever_the_batch():
    """What the teacher saw in relabel (batches in order) is what a student sees in eval (any batch, any order)."""
    images = squeeze.toy(10, 4, 0)[0]
    views = relabel.draw_views(3, 5, 40, 32, 0.08)
    seen = torch.cat([relabel.render(images, views, index) for index in torch.arange(40).split(16)])
    again = relabel.draw_views(3, 5, 40, 32, 0.08)
    for batch in (1, 7, 40):
        order = torch.randperm(40)
        for index in order.split(batch):
            assert torch.equal(relabel.render(images, again, index), seen[index])
    assert not torch.equal(relabel.draw_views(3, 6, 40, 32, 0.08).boxes, views.boxes)
    assert torch.equal(relabel.draw_views(3, 5, 90, 32, 0.08).boxes[:40], views.boxes)      # N does not enter a box


def test_a_view_is_crop_flip_and_patch():
    images = squeeze.toy(2, 2, 0)[0]
    whole = relabel.Views(torch.tensor([[0.5, 0.5, 1, 1]]).expand(4, 4), torch.tensor([False, True, False, False]),
                          torch.tensor([0, 1, 0, 1]), torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [4, 8, 12, 32], [0, 0, 32, 32]]))
    out = relabel.render(images, whole, torch.arange(4))
    wanted = images.float().clone()
    wanted[1] = wanted[1].flip(-1)
    wanted[2, :, 8:32, 4:12] = images[0, :, 8:32, 4:12].float()
    wanted[3] = images[1].float().flip(-1)
    assert torch.allclose(out, wanted, atol=1e-3)
    half = relabel.Views(torch.tensor([[0.25, 0.5, 0.5, 1.0]]), torch.tensor([False]), torch.tensor([0]), torch.zeros(1, 4).long())
    crop = F.interpolate(images[:1, :, :, :16].float(), (32, 32), mode="bilinear")
    assert torch.allclose(relabel.render(images[:1], half, torch.tensor([0]))[..., :31], crop[..., :31], atol=1e-3)


# ---- the stages

def test_pipeline_and_its_contracts(here, capsys):
    run = Path("runs/toy-convnet/cfm-ipc3-iterations8")
    recover.main(TINY)
    content = torch.load(run / "images.pt", weights_only=True)
    assert content["images"].shape == (12, 3, 32, 32) and content["images"].dtype == torch.uint8
    assert content["labels"].tolist() == [0, 1, 2, 3] * 3 and content["classes"][1] == "layout0-columns"
    assert (run / "preview.png").is_file() and not (run / "memory.pt").exists()
    evaluation.main([str(run), "--seeds", "2", "--epochs", "3"])
    out = capsys.readouterr().out
    assert "no labels yet" in out and "±" in out
    result = json.loads((run / "result.json").read_text())
    (row,) = result.values()
    assert set(row["seeds"]) == {"0", "1"} and row["label_bytes"] == 2 * 3 * 12 * 4 and row["image_bytes"] == 12 * 3072
    assert row["averaged"] == pytest.approx(np.mean([seed["averaged"] for seed in row["seeds"].values()]))
    labels = np.load(run / "labels" / "soft_labels.npy")
    assert labels.shape == (3, 12, 4) and labels.dtype == np.float16
    network, teacher, _ = squeeze.load_teacher("runs/toy-convnet", torch.device("cpu"))
    view = relabel.render(content["images"], relabel.draw_views(0, 2, 12, 32, 0.08), torch.arange(12))
    logits = network(squeeze.normalise(view, teacher["mean"], teacher["std"]))
    assert np.allclose(labels[2], logits.numpy(), atol=2e-2, rtol=2e-3)
    with pytest.raises(BadInput, match="result.json: in use"):
        evaluation.main([str(run)])
    evaluation.main([str(run), "--seeds", "2", "--hard", "--resume"])
    assert len(json.loads((run / "result.json").read_text())) == 2


def test_zero_iterations_are_the_real_images(here):
    recover.main(["--iterations", "0", "--ipc", "3"])
    content = torch.load("runs/toy-convnet/real-ipc3/images.pt", weights_only=True)
    images, labels = squeeze.toy(1000, 4, 0)
    first = torch.stack([images[labels == c][k] for k in range(3) for c in range(4)])
    assert torch.equal(content["images"], first)


def test_all_flags_of_recover_reach_the_images(here):
    seen = {}
    for flags in ([], ["--filter", "low"], ["--filter", "high"], ["--schedule", "linear"], ["--signal", "class"],
                  ["--init", "noise"], ["--no-emu"], ["--seed", "1"], ["--alpha-max", "0.5"], ["--gamma", "1"], ["--lr", "0.05"],
                  ["--batch", "3"], ["--batch", "3", "--signal", "class"]):
        recover.main([*TINY, *flags])
    for run in Path("runs/toy-convnet").glob("*ipc3*"):
        pixels = torch.load(run / "images.pt", weights_only=True)["images"]
        seen[pixels.numpy().tobytes()] = run
    assert len(seen) == 13                                 # thirteen folders, thirteen different results


def test_emu_is_the_mean_over_finished_batches(here, monkeypatch):
    """After each batch the memory must hold the mean statistics of all finished images, as seen whole."""
    states = []
    real_save = squeeze.save
    monkeypatch.setattr(squeeze, "save", lambda path, content: (
        states.append(content) if path.name == "memory.pt" else None, real_save(path, content)))
    for kind in ("mean", "class"):
        recover.main([*TINY, "--batch", "2", "--signal", kind])
    memory = {"mean": states[5], "class": states[-1]}
    network, teacher, _ = squeeze.load_teacher("runs/toy-convnet", torch.device("cpu"))
    for kind, run in (("mean", "cfm-ipc3-iterations8-batch2"), ("class", "cfm-ipc3-iterations8-batch2-signalclass")):
        content = torch.load(f"runs/toy-convnet/{run}/images.pt", weights_only=True)
        with spectral.collect_inputs(network) as features:
            network(squeeze.normalise(content["images"], teacher["mean"], teacher["std"]))
        for name, x in features.items():
            psi = torch.stack([spectral.ffc(part) for part in x.split(2)]).mean(0)
            Y = F.one_hot(content["labels"], 4)
            phi = spectral.flc(x)[:, None] if kind == "mean" else spectral.flc(x, Y)
            assert torch.allclose(memory[kind]["psi"][name], psi, rtol=1e-3, atol=1e-5)
            assert torch.allclose(memory[kind]["phi"][name], phi, rtol=1e-3, atol=1e-5)


def test_same_seed_same_bytes_and_a_killed_run_resumes_to_them(here):
    flags = ["--ipc", "6", "--iterations", "12"]
    run = here / "runs/toy-convnet/cfm-ipc6-iterations12"
    kept = []
    for _ in range(2):
        assert script("recover", *flags).returncode == 0
        kept.append((run / "images.pt").read_bytes())
        shutil.rmtree(run)
    assert kept[0] == kept[1]
    process = subprocess.Popen([sys.executable, ROOT / "recover.py", *flags], stdout=subprocess.DEVNULL)
    while not (run / "memory.pt").exists():
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "images.pt").exists() and torch.load(run / "memory.pt", weights_only=True)["b"] < 6
    refused = script("recover", *flags)
    assert refused.returncode == 1 and "in use: add --resume" in refused.stderr
    resumed = script("recover", *flags, "--resume")
    assert resumed.returncode == 0 and "resuming after batch" in resumed.stdout
    assert (run / "images.pt").read_bytes() == kept[0]


def test_squeeze_and_eval_resume_to_the_same_result(here, monkeypatch):
    shutil.rmtree("runs")
    squeeze.main(["--classes", "2", "--epochs", "2", "--batch", "500"])
    whole = torch.load("runs/toy-convnet/teacher.pt", weights_only=True)["state_dict"]
    statistics = Path("runs/toy-convnet/statistics.pt").read_bytes()
    shutil.rmtree("runs")
    real_log = squeeze.log

    def dies(folder, **entry):
        real_log(folder, **entry)
        if entry.get("epoch") == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(squeeze, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        squeeze.main(["--classes", "2", "--epochs", "2", "--batch", "500"])
    monkeypatch.setattr(squeeze, "log", real_log)
    with pytest.raises(BadInput, match="unfinished"):
        recover.main(TINY)
    recover.main([*TINY, "--resume"])                      # goes through the rest of squeeze first
    resumed = torch.load("runs/toy-convnet/teacher.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert Path("runs/toy-convnet/statistics.pt").read_bytes() == statistics


# ---- bad input: one line, exit code 1, no traceback

def one_line(main, flags, *words):
    with pytest.raises(BadInput) as error:
        main([str(flag) for flag in flags])
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("flags, words", [
    (["--dataset", "mnist"], ["--dataset", "mnist", "cifar10"]), (["--ipc", "0"], ["--ipc", "0", ">= 1"]),
    (["--ipc", "-3"], ["--ipc", "-3"]), (["--ipc", "ten"], ["--ipc", "ten"]), (["--ipc", "1001"], ["--ipc 1001", "1000", "layout0-rows"]),
    (["--alpha-max", "0"], ["--alpha-max", "> 0"]), (["--alpha-max", "-1"], ["--alpha-max"]), (["--alpha-max", "nan"], ["--alpha-max"]),
    (["--iterations", "-1"], ["--iterations"]), (["--lr", "0"], ["--lr"]), (["--no-such-flag"], ["--no-such-flag"]),
    (["--dataset", "cifar10", "--data", "nowhere"], ["--data nowhere", "no such folder"])])
def test_bad_flags_of_recover(here, flags, words):
    one_line(recover.main, flags, *words)


def test_bad_input_reaches_the_user_as_one_line_and_exit_code_1(here):
    for name, flags, word in (("recover", ["--ipc", "0"], "--ipc"), ("eval", ["nowhere"], "nowhere"),
                              ("relabel", ["runs/toy-convnet"], "a run of squeeze.py"), ("squeeze", [], "in use")):
        out = script(name, *flags)
        assert out.returncode == 1 and word in out.stderr and out.stderr.count("\n") == 1, out.stderr


def test_broken_run_folders(here):
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    one_line(recover.main, ["--iterations", "0", "--ipc", "2"], str(run), "--resume")
    one_line(relabel.main, ["runs/toy-convnet"], "squeeze.py", "expected one of recover.py")
    one_line(relabel.main, [run, "--scale", "2"], "--scale")
    one_line(evaluation.main, ["runs"], "no config.json")
    relabel.main([str(run), "--epochs", "2"])
    one_line(relabel.main, [run, "--epochs", "3"], "in use")
    one_line(relabel.main, [run, "--epochs", "3", "--resume"], "epochs is 3 now and was 2")
    one_line(evaluation.main, [run, "--epochs", "3"], "--epochs 3", "2 epochs")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "inputs": {**config["inputs"], "teacher.pt": "0" * 64}}))
    one_line(relabel.main, [run], "another teacher")
    (run / "config.json").write_text("{")
    one_line(relabel.main, [run], "config.json", "damaged")
    (run / "config.json").write_text(json.dumps(config))
    pixels = bytearray((run / "images.pt").read_bytes())
    pixels[len(pixels) // 2] ^= 1
    (run / "images.pt").write_bytes(pixels)
    one_line(evaluation.main, [run], "images.pt", "corrupted")
    (run / "images.pt").unlink()
    one_line(evaluation.main, [run], "images.pt", "missing")
    teacher = Path("runs/toy-convnet/teacher.pt")
    teacher.write_bytes(teacher.read_bytes()[:-100])
    one_line(recover.main, ["--ipc", "4"], "teacher.pt", "corrupted")


def test_other_training_images_than_the_teachers_are_refused(here):
    config = json.loads(Path("runs/toy-convnet/config.json").read_text())
    config["inputs"]["data"] = "0" * 64
    Path("runs/toy-convnet/config.json").write_text(json.dumps(config))
    one_line(recover.main, TINY, "other training images")


def test_unfinished_images_are_not_taken(here, monkeypatch):
    monkeypatch.setattr(recover, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recover.main(TINY)
    one_line(relabel.main, ["runs/toy-convnet/cfm-ipc3-iterations8"], "unfinished", "--resume")


def test_help_of_every_script():
    for module in (squeeze, recover, relabel, evaluation):
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        assert stop.value.code == 0
    assert re.search(r"python recover.py --dataset tiny --ipc 100 --alpha-max 1", recover.__doc__)
