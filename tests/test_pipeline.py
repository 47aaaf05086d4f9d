"""The four stages on toy images: contracts, reproducibility, resuming, and what bad input gets."""
import copy
import functools
import itertools
import json
import math
import os
import pickle
import runpy
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

import baselines
import eval as evaluation
import recover
import relabel
import spectral
import squeeze
from conftest import ROOT, one_line
from squeeze import BadInput, Namespace

TINY = ["--iterations", "8", "--ipc", "3"]


def script(name, *flags, **kw):
    return subprocess.run([sys.executable, ROOT / f"{name}.py", *map(str, flags)], capture_output=True, text=True,
                          **kw)


# ---- data

def test_toy_is_deterministic_and_pairs_share_their_colours():
    start = time.process_time()
    images, labels = squeeze.toy(400, 10, 0)
    assert time.process_time() - start < 5 and images.shape == (4000, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, squeeze.toy(400, 10, 0)[0]) and not torch.equal(images, squeeze.toy(400, 10, 1)[0])
    means = torch.stack([F.avg_pool2d(images[labels == k].float().mean(0, keepdim=True), 8).flatten()
                         for k in range(10)])
    distance = torch.cdist(means, means) + 1e9 * torch.eye(10)
    assert distance.argmin(1).tolist() == [k ^ 1 for k in range(10)]      # coarsely, the other of the pair is nearest


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
    with pytest.raises(BadInput, match="data_batch_3: truncated, damaged or hostile .*: remove it"):
        squeeze.load_data("cifar10", str(tmp_path))
    some = {"data": first["data"][:99], "labels": first["labels"][:99]}        # a file of its own, but not CIFAR's
    for wrong in (some, {"data": first["data"][:99]}, {"data": first["data"].astype(int)}, {"labels": [10] * 10000}):
        (folder / "data_batch_3").write_bytes(pickle.dumps({**first, **wrong}))
        with pytest.raises(BadInput, match="data_batch_3: truncated, damaged or hostile"):
            squeeze.load_data("cifar10", str(tmp_path))
    (folder / "data_batch_3").unlink()                     # a missing file is downloaded; here the network says no
    monkeypatch.setattr(squeeze.datasets.utils, "download_and_extract_archive",
                        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(BadInput, match="cannot be downloaded"):
        squeeze.load_data("cifar10", str(tmp_path))
    with pytest.raises(BadInput, match="no such folder"):
        squeeze.load_data("cifar10", str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="cannot be downloaded"):
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
    data = squeeze.Data([str(i) for i in range(10)], 32, squeeze.Split(images, labels), None, "")
    with spectral.collect_inputs(network) as features, torch.no_grad():
        network(squeeze.normalise(images, [0.5] * 3, [0.25] * 3))
    expected = {}
    for name, X in features.items():
        X = X.permute(0, 2, 3, 1).double().numpy()
        H, X = X.mean((1, 2)), X.reshape(-1, X.shape[-1])
        expected[name] = np.cov(X.T, bias=True), X.mean(0), H.T @ np.eye(10)[labels] / 1000
    found = squeeze.gather_statistics(squeeze.fold(network), data, dict(mean=[0.5] * 3, std=[0.25] * 3), 128)
    layers = found["layers"]
    assert set(layers) == {*expected, found["head"]}
    with torch.no_grad():
        wanted = network(squeeze.normalise(images, [0.5] * 3, [0.25] * 3)).double().softmax(1)
    assert torch.allclose(found["confidence"].exp(), wanted[torch.arange(1000), labels], rtol=1e-4)
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


def test_folding_leaves_a_norm_after_a_sum_alone():
    """DenseNet's first norm of a block follows the block before by definition, not in the forward pass."""
    torch.manual_seed(0)
    network, x = squeeze.build_network("densenet121", 5, 32).train(), torch.randn(4, 3, 32, 32)
    network(x)
    with torch.no_grad():
        logits = network.eval()(x)
        assert torch.allclose(squeeze.fold(network)(x), logits, atol=1e-4)


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
    whole = relabel.Views(torch.tensor([[0, 0, 1.0, 1], [0, 0, -1, 1], [0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([0, 1, 0, 1]),
                          torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [4, 8, 12, 32], [0, 0, 32, 32]]))
    out = relabel.render(images, whole, torch.arange(4))
    wanted = images.float().clone()
    wanted[1] = wanted[1].flip(-1)
    wanted[2, :, 8:32, 4:12] = images[0, :, 8:32, 4:12].float()
    wanted[3] = images[1].float().flip(-1)
    assert torch.allclose(out, wanted, atol=1e-3)
    half = relabel.Views(torch.tensor([[-0.5, 0, 0.5, 1]]), torch.tensor([0]), torch.zeros(1, 4).long())
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
    assert "not there yet" in out and "±" in out
    result = json.loads((run / "result.json").read_text())
    row = result["convnet-epochs3"]
    assert set(result) == {"convnet-epochs3", "sha256"} and set(row["seeds"]) == {"0", "1"}
    assert row["label_bytes"] == 2 * 3 * 12 * 4 and row["image_bytes"] == 12 * 3072
    assert row["averaged"] == pytest.approx(np.mean([seed["averaged"] for seed in row["seeds"].values()]))
    labels = np.load(run / "labels" / "soft_labels.npy")
    assert labels.shape == (3, 12, 4) and labels.dtype == np.float16
    network, teacher, _ = recover.load_teacher("runs/toy-convnet", torch.device("cpu"))
    view = relabel.render(content["images"], relabel.draw_views(0, 2, 12, 32, 0.08), torch.arange(12))
    logits = network(squeeze.normalise(view, teacher["mean"], teacher["std"]))
    assert np.allclose(labels[2], logits.numpy(), atol=2e-2, rtol=2e-3)
    with pytest.raises(BadInput, match="result.json or student-.*in use"):
        evaluation.main([str(run)])
    evaluation.main([str(run), "--seeds", "1", "--epochs", "2", "--hard", "--resume"])
    assert set(squeeze.read_json(run / "result.json")) == {"convnet-epochs3", "convnet-epochs2-hard"}
    shutil.rmtree(run / "labels")                          # results of other labels must not pass for new ones
    relabel.main([str(run), "--epochs", "3", "--seed", "1", "--scale", "0.5"])
    evaluation.main([str(run), "--seeds", "1", "--resume"])
    result = squeeze.read_json(run / "result.json")
    assert set(result) == {"convnet-epochs3", "convnet-epochs2-hard", "convnet-epochs3-scale0.5-seed1"}
    result["convnet-epochs3-scale0.5-seed1"]["labels"] = row["labels"]         # a row of labels since made anew
    squeeze.save(run / "result.json", result)
    with pytest.raises(BadInput, match="is of other labels"):
        evaluation.main([str(run), "--seeds", "3", "--resume"])


def test_zero_iterations_are_the_real_images(here):
    recover.main(["--iterations", "0", "--ipc", "3"])
    content = torch.load("runs/toy-convnet/real-ipc3/images.pt", weights_only=True)
    images, labels = squeeze.toy(1000, 4, 0)
    first = torch.stack([images[labels == c][k] for k in range(3) for c in range(4)])
    assert torch.equal(content["images"], first)


def test_confident_images_are_the_teachers_surest(here):
    recover.main(["--iterations", "0", "--init", "confident", "--ipc", "3"])
    content = torch.load("runs/toy-convnet/confident-ipc3/images.pt", weights_only=True)
    images, labels = squeeze.toy(1000, 4, 0)
    network, teacher, _ = recover.load_teacher("runs/toy-convnet", torch.device("cpu"))
    with torch.no_grad():
        chance = torch.cat([network(squeeze.normalise(part, teacher["mean"], teacher["std"])).double().softmax(1)
                            for part in images.split(50)])
    for c in range(4):
        order = sorted((labels == c).nonzero().flatten().tolist(), key=lambda i: -chance[i, c])
        assert torch.equal(content["images"][content["labels"] == c], images[order[:3]])


def test_presets():
    preset = lambda *flags: recover.preset_of(recover.parse([*flags]))
    for name, own in squeeze.PRESETS.items():
        paper = preset("--dataset", name, "--preset", "paper")
        assert paper == {**own["recover"], "network": own["network"]} and paper["emu"] == "paper"
        assert preset("--dataset", name) == {**paper, **own["ours"]} and own["ours"]["emu"] == "pool"
        assert preset("--dataset", name, "--iterations", "0")["init"] == "real"


def test_few_images_are_shown_more_often_in_small_batches():
    """epochs, batch; of CIFAR at least 100,000 views."""
    found = {where: tuple(relabel.recipe(*where)[key] for key in ("epochs", "batch")) for where in (
        ("cifar10", 10), ("cifar10", 90), ("cifar10", 100), ("cifar10", 500), ("cifar100", 100), ("toy", 10), ("tiny", 200))}
    assert list(found.values()) == [(10000, 10), (1112, 10), (1000, 10), (1000, 100), (1000, 100), (60, 10), (300, 100)]


def test_few_views_are_given_an_early_teacher():
    def folder(*flags):
        return str(recover.choose_teacher(recover.parse([*flags]))[0])
    cifar = ("--dataset", "cifar10", "--network", "convnet", "--ipc")
    assert [folder(*cifar, ipc) for ipc in ("1", "10", "50", "5000")] == [
        "runs/cifar10-convnet" + end for end in (
            "-epochs13-smoothing0.1", "-epochs13-smoothing0.1", "-epochs28", "")]
    assert folder("--dataset", "cifar100", "--network", "convnet", "--ipc", "1") == (
        "runs/cifar100-convnet-epochs13-smoothing0.1")
    assert folder("--dataset", "cifar100", "--ipc", "1") == "runs/cifar100-resnet18-epochs13"      # smoothing: not tried
    assert folder("--dataset", "cifar100", "--ipc", "10") == "runs/cifar100-resnet18-epochs41"
    assert folder(*cifar, "1", "--preset", "paper") == "runs/cifar10-convnet"
    assert folder("--dataset", "tiny", "--ipc", "1") == "runs/tiny-resnet18"       # not measured there


def test_all_flags_of_recover_reach_the_images(here):
    seen = {}
    for flags in ([], ["--filter", "low"], ["--filter", "high"], ["--schedule", "linear"], ["--signal", "class"],
                  ["--init", "noise"], ["--emu", "off"], ["--emu", "paper"], ["--loss", "filter"], ["--loss", "signal"],
                  ["--seed", "1"], ["--alpha-max", "0.5"], ["--gamma", "1"], ["--lr", "0.05"], ["--batch", "3"],
                  ["--batch", "3", "--signal", "class"]):
        recover.main(["--iterations", "4", "--ipc", "3", *flags])
    for run in Path("runs/toy-convnet").glob("*ipc3*"):
        pixels = torch.load(run / "images.pt", weights_only=True)["images"]
        seen[pixels.numpy().tobytes()] = run
    assert len(seen) == 16                                 # sixteen folders, sixteen different results


@pytest.mark.parametrize("kind", ["mean", "class"])
@pytest.mark.parametrize("emu", ["paper", "pool"])
def test_what_emu_remembers(here, monkeypatch, kind, emu):
    """After each batch the memory must be, for --emu paper, the mean of what was seen of the finished ones, and for
    pool the statistics of all their feature vectors as one set, unequal chunks (3 classes and 1) included."""
    memories, seen, rows = [], [], [3, 1] * 3
    save, look = squeeze.save, recover.view_statistics
    monkeypatch.setattr(squeeze, "save", lambda path, content: (
        memories.append(copy.deepcopy(content)) if path.name == "memory.pt" else None, save(path, content)))

    def looked(*args):
        found = look(*args)
        seen.append({name: layer.to("cpu") for name, layer in found.items()})
        return found
    monkeypatch.setattr(recover, "view_statistics", looked)
    recover.main([*TINY, "--batch", "3", "--signal", kind, "--emu", emu])
    memories = [{name: spectral.Statistics(*parts).to("cpu") for name, parts in memory["layers"].items()}
                for memory in memories]
    assert len(memories) == 6 and [next(iter(memory.values())).count / 1024 for memory in
                                       memories] == np.cumsum(rows).tolist()
    for b in range(1, 7):
        weight = torch.tensor(rows[:b], dtype=torch.float64) if emu == "pool" else torch.ones(b, dtype=torch.float64)
        weight /= weight.sum()
        for name in seen[0]:
            psi, mean = (torch.stack([part[name][i].double() for part in seen[:b]]) for i in (2, 1))
            wanted = torch.einsum("b,bij->ij", weight, psi), weight @ mean
            if emu == "pool":                              # E[x x^T] - m m^T, over all rows
                second = psi + mean[:, :, None] * mean[:, None]
                wanted = torch.einsum("b,bij->ij", weight, second) - torch.outer(wanted[1], wanted[1]), wanted[1]
            found = memories[b - 1][name]
            for value, exact in zip((found.ffc, found.mean), wanted):
                assert torch.allclose(value.double(), exact, rtol=1e-4, atol=1e-5)
            if kind == "class":                            # classes 0-2 are in the odd batches, 3 in the even ones
                for classes, first in (([0, 1, 2], 0), ([3], 1)):
                    phi = [part[name].flc[:, classes] * len(classes) for part in seen[first:b:2]]
                    if phi:
                        wanted = sum(phi) / len(phi)
                        assert torch.allclose((found.flc / found.share)[:, classes], wanted, rtol=1e-4, atol=1e-6)


def test_uncentred_moments_are_h_transposed_h():
    """What DC, MTT and FrePo compare, real side and synthetic side after three batches, against H^T H / n itself, on
    features whose mean is many deviations long."""
    torch.manual_seed(0)
    sets, memory = [torch.randn(4, 5, dtype=torch.float64) + 30 for _ in range(3)], {}
    for b, H in enumerate(sets, 1):
        memory = spectral.merge(memory, {"x": spectral.moments(H)})
        _, (found, phi) = spectral.filtered(list(memory.values()), baselines.METHODS["dc"][0](None), "mean", False, -1)
        H = torch.cat(sets[:b])
        assert torch.allclose(found[0], H.T @ H / len(H), rtol=1e-10) and torch.allclose(phi[0, :, 0], H.mean(0))
    assert torch.allclose(spectral.moments(H).uncentred, H.T @ H / len(H), rtol=1e-10)


def test_crops_are_those_of_an_affine_grid():
    """crop_boxes and crop_grid against the crop's own definition by torch's affine_grid, mirrored and rolled."""
    uniform, flips = np.random.default_rng(0).random((6, 4)), torch.arange(6) % 2 == 0
    area, shape, x, y = torch.from_numpy(uniform).T
    area, shape = 0.08 + 0.92 * area, (3 / 4) * (16 / 9) ** shape
    w, h = (area * shape).sqrt().clamp(max=1), (area / shape).sqrt().clamp(max=1)
    x, y = w / 2 + x * (1 - w), h / 2 + y * (1 - h)                            # the centre, in fractions of a side
    theta = torch.stack([torch.where(flips, -w, w), 0 * x, 2 * x - 1, 0 * x, h, 2 * y - 1], 1).view(-1, 2, 3)
    boxes = recover.crop_boxes(uniform, (0.08, 1), flip=1 - flips.double().numpy())
    for size, roll in ((7, (0, 0)), (32, (3, 0)), (32, (1, 4))):
        wanted = F.affine_grid(theta, (6, 3, size, size), align_corners=False).roll(roll, (1, 2))
        assert (recover.crop_grid(boxes, size, roll) - wanted).abs().max() < 1e-6


def test_view_statistics_are_those_of_the_views(here):
    """The statistics over random views of the saved images as one set (--emu paper: the mean of the views' ones), layer
    by layer, against a loop over single views."""
    network, teacher, _ = recover.load_teacher("runs/toy-convnet", torch.device("cpu"))
    images = squeeze.toy(1, 4, 0)[0]
    rng = np.random.default_rng(5)
    boxes = recover.crop_boxes(rng.random((12, 4)), (0.08, 1), flip=rng.random(12)).view(3, 4, 4)
    rolls = rng.integers(0, 5, (3, 2)).tolist()
    x, seen = squeeze.normalise(images, teacher["mean"], teacher["std"]), []
    for t in range(3):
        with spectral.collect_inputs(network) as features, torch.no_grad():
            network(torch.roll(recover.resample(x, recover.crop_grid(boxes[t], 32)), rolls[t], (2, 3)))
        seen.append({name: value.clone() for name, value in features.items()})
    for emu in ("pool", "paper"):
        job = Namespace(teacher=teacher, smallest=recover.CFM["smallest"], step=1 if emu == "paper" else None)
        with spectral.collect_inputs(network, transform=spectral.moments) as layers:
            found = recover.view_statistics(images, network, layers, np.random.default_rng(5), job, Namespace(iterations=3))
        for name in found:
            wanted = spectral.moments(torch.cat([part[name] for part in seen])).ffc if emu == "pool" else \
                sum(spectral.moments(part[name]).ffc for part in seen) / 3
            assert torch.allclose(found[name].ffc, wanted, rtol=1e-3, atol=1e-5)


def test_a_batch_is_plain_adam_on_equation_20(here):
    """make_batch against the loop written out, with other memory layouts: strides that do not agree would hand a pixel
    another one's gradient."""
    network, teacher, config = recover.load_teacher("runs/toy-convnet", torch.device("cpu"))
    found = squeeze.load_state(squeeze.checked("runs/toy-convnet", "statistics.pt", config))
    real = {name: spectral.Statistics(**layer) for name, layer in found["layers"].items() if name != found["head"]}
    images, classes = squeeze.toy(1, 4, 0)
    args = Namespace(iterations=8, lr=0.1, gamma=0.1, signal="mean", emu="off")
    loss = spectral.matching(real, spectral.cfm_pairs(0.1))
    job = Namespace(**recover.CFM, network=network, teacher=teacher, select=spectral.is_main_convolution, step=None,
                    loss=loss, report=lambda *found: None)
    made, _ = recover.make_batch(job, args, images, classes, {}, np.random.default_rng(0))
    mean, std = (torch.tensor(teacher[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    x = ((images / 255 - mean) / std).contiguous().requires_grad_()
    view = recover.random_views(np.random.default_rng(0), 8, x, recover.CFM["smallest"])
    optimizer = torch.optim.Adam([x], betas=(0.5, 0.9), foreach=False)
    for t in range(8):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + np.cos(np.pi * t / 8))
        with spectral.collect_inputs(network, transform=spectral.moments) as layers:
            total = F.cross_entropy(squeeze.forward(network, view(x, t)), classes) + 0.1 * loss(layers)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        x.data = torch.minimum(torch.maximum(x.data, -mean / std), (1 - mean) / std)
    wanted = ((x.detach() * std + mean) * 255).round()
    assert (made - images.float()).abs().mean() > 5 and (made - wanted).abs().max() <= 1


def test_same_seed_same_bytes_and_a_killed_run_resumes_to_them(here, on_cpu, capsys):
    flags = ["--ipc", "6", "--iterations", "6"]
    run = here / "runs/toy-convnet/cfm-ipc6-iterations6"
    kept = []
    for make in (recover.main, lambda flags: script("recover", *flags).check_returncode()):
        make(flags)
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
    one_line(recover.main, flags, "in use: add --resume")
    recover.main([*flags, "--resume"])
    assert "resuming after batch" in capsys.readouterr().out
    assert (run / "images.pt").read_bytes() == kept[0]


def test_squeeze_resumes_to_the_same_teacher_and_recover_takes_it_along(here, monkeypatch):
    shutil.rmtree("runs")
    train, test = (squeeze.Split(*squeeze.toy(n, 2, seed)) for n, seed in ((30, 0), (20, 1)))
    monkeypatch.setitem(squeeze.LOADERS, "toy", lambda root, classes: (train, test, ["a", "b"]))
    squeeze.main(["--classes", "2", "--epochs", "2", "--batch", "50"])
    assert [path.name for path in Path("runs").iterdir()] == ["toy-convnet-classes2-epochs2"]       # batch 50 is the default
    folder = Path("runs/toy-convnet")
    squeeze.main([])
    whole = torch.load(folder / "teacher.pt", weights_only=True)["state_dict"]
    statistics = (folder / "statistics.pt").read_bytes()
    shutil.rmtree("runs")
    real_log = squeeze.log

    def dies(folder, **entry):
        real_log(folder, **entry)
        if entry.get("epoch") == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(squeeze, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        recover.main(TINY)                                 # squeezes first
    monkeypatch.setattr(squeeze, "log", real_log)
    for flags in (TINY, [*TINY, "--teacher", folder, "--resume"]):
        one_line(recover.main, flags, "unfinished", "squeeze.py again with --resume")
    recover.main([*TINY, "--resume"])                      # the rest of squeeze first
    resumed = torch.load(folder / "teacher.pt", weights_only=True)["state_dict"]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert (folder / "statistics.pt").read_bytes() == statistics


def test_eval_resumes_to_the_same_student(here, monkeypatch):
    """Of a network, too, that drops parts of itself at random, as ConvNeXt does."""
    build = squeeze.build_network
    def with_dropout(*about):
        network = build(*about)
        network[0][2] = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Dropout(0.2))
        return network
    monkeypatch.setattr(squeeze, "build_network", with_dropout)
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    evaluation.main([str(run), "--seeds", "1", "--epochs", "4"])
    whole = json.loads((run / "result.json").read_text())["convnet-epochs4"]
    (run / "result.json").unlink()
    clock, real_save = [0.0], squeeze.save
    monkeypatch.setattr(evaluation.time, "time", lambda: clock.__setitem__(0, clock[0] + 40)
                        or clock[0])   # checkpoints soon

    def dies(path, content):
        real_save(path, content)
        if path.name.startswith("student-"):
            raise KeyboardInterrupt
    monkeypatch.setattr(squeeze, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluation.main([str(run), "--seeds", "1"])
    monkeypatch.setattr(squeeze, "save", real_save)
    assert len(list(run.glob("student-*.pt"))) == 1
    one_line(evaluation.main, [run, "--seeds", "1"], "student-", "--resume")
    evaluation.main([str(run), "--seeds", "1", "--resume"])
    again = json.loads((run / "result.json").read_text())["convnet-epochs4"]
    assert again["averaged"] == whole["averaged"] and again["raw"] == whole["raw"]
    assert not list(run.glob("student-*.pt"))


def test_a_row_is_of_one_test_set_and_named_in_full(here, monkeypatch, capsys):
    """Seeds tested on two sets are no mean; and students of 2 and of 60 epochs are not both "convnet" in the table."""
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    evaluation.main([str(run), "--seeds", "1", "--epochs", "2"])
    assert "toy-convnet              convnet-epochs2\n" in capsys.readouterr().out
    train, test, names = squeeze.LOADERS["toy"](None, 4)
    monkeypatch.setitem(squeeze.LOADERS, "toy", lambda *_: (train, squeeze.select(test, torch.arange(1, len(test.labels))), names))
    one_line(evaluation.main, [run, "--seeds", "2", "--epochs", "2", "--resume"], "convnet-epochs2", "tests")
    result = squeeze.read_json(run / "result.json")
    result["convnet-epochs2"].pop("test")                  # a row of an earlier version, which did not say
    squeeze.save(run / "result.json", result)
    evaluation.main([str(run), "--seeds", "2", "--epochs", "2", "--resume"])


def test_bfloat16_is_the_default_where_it_is_not_emulated(monkeypatch):
    """torch.cuda.is_bf16_supported counts emulation unless told not to."""
    for native in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
        assert squeeze.native_precision(torch.device("cuda")) == ("bfloat16" if native else "float32")


# ---- bad input: one line, exit code 1, no traceback

@pytest.mark.parametrize("flags, words", [
    (["--dataset", "mnist"], ["--dataset", "mnist", "cifar10"]), (["--ipc", "0"], ["--ipc", "0", ">= 1"]),
    (["--ipc", "-3"], ["--ipc", "-3"]), (["--ipc", "ten"], ["--ipc", "ten"]),
                                          (["--ipc", "1001"], ["--ipc", "1000", "1001 are needed", "layout0-rows"]),
    (["--alpha-max", "0"], ["--alpha-max", "> 0"]), (["--alpha-max", "-1"], ["--alpha-max"]),
                                          (["--alpha-max", "nan"], ["--alpha-max"]),
    (["--iterations", "-1"], ["--iterations"]), (["--lr", "0"], ["--lr"]), (["--no-such-flag"], ["--no-such-flag"]),
    (["--seed", "99999999999999999999"], ["--seed", "<= 9223372036854775807"]),
    (["--filter", "low", "--alpha-max", "1"], ["--alpha-max", "--filter low"]),
    (["--filter", "high", "--schedule", "linear"], ["--schedule", "--filter high"]),
    (["--dataset", "cifar10", "--data", "nowhere"], ["--data nowhere", "no such folder"])])
def test_bad_flags_of_recover(here, flags, words):
    one_line(recover.main, flags, *words)


def test_bad_input_reaches_the_user_as_one_line_and_exit_code_1(here, monkeypatch):
    for name, flags, word in (("eval", ["nowhere"], "nowhere"), ("squeeze", [], "in use"), ("baselines", [], "--method"),
                              ("relabel", ["runs/toy-convnet"], "a run of squeeze.py")):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        with pytest.raises(SystemExit) as stop:            # with a text: Python prints it and ends with code 1
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        assert word in stop.value.code and "\n" not in stop.value.code and stop.value.code.startswith(f"{name}.py: ")
    refused = script("recover", "--ipc", "0")              # as it does here, in a process of its own
    assert refused.returncode == 1 and "--ipc" in refused.stderr and refused.stderr.count("\n") == 1


def test_a_teacher_that_diverges_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = lambda root, classes: (*(squeeze.Split(*squeeze.toy(10, 4, seed)) for seed in (0, 1)), list("abcd"))
    monkeypatch.setitem(squeeze.LOADERS, "toy", few)
    one_line(squeeze.main, ["--batch", "10", "--lr", "1e18"], "--lr 1e+18", "diverged in epoch 1", "remove")
    shutil.rmtree("runs")
    Path("runs").touch()
    with pytest.raises(OSError, match="runs/toy-convnet"):
        squeeze.main([])
    Path("runs").unlink()
    state = squeeze.build_network("convnet", 4, 32).state_dict()
    torch.save({key: value * math.nan for key, value in state.items()}, "nan.pth")
    one_line(squeeze.main, ["--teacher", "nan.pth"], "toy-convnet", "not finite", "remove")


def test_broken_run_folders(here):
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    one_line(recover.main, ["--iterations", "0", "--ipc", "2"], str(run), "--resume")
    one_line(relabel.main, ["runs/toy-convnet"], "a run of squeeze.py found", "expected a run of recover.py")
    one_line(relabel.main, [run, "--scale", "2"], "--scale")
    one_line(evaluation.main, ["runs"], "no config.json")
    relabel.main([str(run), "--epochs", "2"])
    one_line(relabel.main, [run, "--epochs", "3"], "in use")
    one_line(relabel.main, [run, "--epochs", "2", "--scale", "0.5", "--resume"], "scale is 0.5 now and was 0.08")
    one_line(evaluation.main, [run, "--epochs", "3"], "--epochs 3", "holds 2")
    with pytest.MonkeyPatch.context() as patch:            # every epoch takes a minute: what diverges in the first is not kept
        patch.setattr(evaluation, "time", Namespace(time=functools.partial(next, itertools.count(0, 61))))
        one_line(evaluation.main, [run, "--lr", "1e18", "--batch", "2"], "--lr 1e+18", "not finite")
    assert not list(run.glob("student-*.pt"))
    Path("file").touch()
    with pytest.raises(NotADirectoryError, match="file/folder"):                       # script makes a line of it
        evaluation.main([str(run), "--export", "file/folder"])
    Path("nothing").mkdir()
    one_line(relabel.main, ["runs/toy-convnet", "--images", "nothing"], "--images nothing", "found none")
    config = squeeze.read_json(run / "config.json")
    squeeze.save(run / "config.json", {**config, "inputs": {**config["inputs"], "teacher.pt": "0" * 64}})
    one_line(relabel.main, [run], "another teacher")
    (run / "config.json").write_text("{")
    one_line(relabel.main, [run], "config.json", "damaged")
    one_line(recover.main, ["--iterations", "0", "--ipc", "2", "--resume"], "config.json", "damaged")
    squeeze.save(run / "config.json", config)
    pixels = bytearray((run / "images.pt").read_bytes())
    pixels[len(pixels) // 2] ^= 1
    (run / "images.pt").write_bytes(pixels)
    one_line(evaluation.main, [run], "images.pt", "corrupted")
    (run / "images.pt").unlink()
    one_line(evaluation.main, [run], "images.pt", "missing")
    one_line(recover.main, ["--iterations", "0", "--ipc", "2", "--resume"], "images.pt", "missing", "remove")
    teacher = Path("runs/toy-convnet/teacher.pt")
    teacher.write_bytes(teacher.read_bytes()[:-100])
    one_line(recover.main, ["--ipc", "4"], "teacher.pt", "corrupted")


def test_other_training_images_than_the_teachers_are_refused(here):
    config = squeeze.read_json(Path("runs/toy-convnet/config.json"))
    config["inputs"]["data"] = "0" * 64
    squeeze.save(Path("runs/toy-convnet/config.json"), config)
    one_line(recover.main, TINY, "--data: not the images and classes", "squeeze again")


def test_broken_leftovers_of_a_killed_run(here, monkeypatch):
    monkeypatch.setattr(recover, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        recover.main(TINY)
    run = Path("runs/toy-convnet/cfm-ipc3-iterations8")
    one_line(relabel.main, [run], "unfinished", "--resume")
    batch, memory = run / "batch2.pt", run / "memory.pt"
    whole = batch.read_bytes()
    batch.unlink()
    monkeypatch.undo(), monkeypatch.chdir(here)
    one_line(recover.main, [*TINY, "--resume"], "batch2.pt", "missing", "start again")
    batch.write_bytes(whole[:-1])
    one_line(recover.main, [*TINY, "--resume"], "batch2.pt", "damaged")
    batch.write_bytes(whole)
    memory.write_bytes(memory.read_bytes()[:99])
    one_line(recover.main, [*TINY, "--resume"], "memory.pt", "damaged")


def test_help_of_every_script(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for module in (squeeze, recover, relabel, evaluation, baselines):
        with pytest.raises(SystemExit) as stop:
            module.main(["--help"])
        lines = capsys.readouterr().out.splitlines()
        assert stop.value.code == 0 and len(lines) <= 60 and max(map(len, lines)) <= 100, max(lines, key=len)
