"""What a careless edit could change without a sound. Each test here fails under edits that the rest of the suite let
through: a loss, a rate, a seed, a view, a hash, a label that is another one than the documents say."""
import copy
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.swa_utils import AveragedModel

import baselines
import eval as evaluation
import recover
import relabel
import spectral
import squeeze
from conftest import one_line
from squeeze import Namespace

pytestmark = pytest.mark.usefixtures("on_cpu")

CPU = torch.device("cpu")


def test_a_student_is_told_what_the_teacher_said_of_what_it_sees(here):
    """The teacher as its own student, at another seed and scale than the defaults: nothing is left to learn."""
    recover.main(["--iterations", "0", "--ipc", "2"])
    relabel.main([run := "runs/toy-convnet/real-ipc2", "--epochs", "3", "--keep-epochs", "2", "--seed", "1", "--scale", "0.5"])
    args = evaluation.parse([run, "--temperature", "1", "--lr", "1e-12", "--batch", "5", "--epochs", "3"])
    job = evaluation.load_job(run, args)
    job.views, *_ = evaluation.find_labels(job, args)
    job.images, job.seed, student = job.content["images"], 0, recover.load_teacher("runs/toy-convnet", CPU)[0].requires_grad_()
    for epoch in range(3):
        assert evaluation.train_epoch(job, args, epoch, student, AveragedModel(student),
                                      torch.optim.SGD(student.parameters(), 0.0)) < 1e-4


def test_the_students_loss_is_kl_at_the_temperature():
    student, teacher, T = *torch.randn(2, 6, 5, dtype=torch.float64), 3.0
    p, q = (torch.softmax(v / T, 1) for v in (teacher, student))
    args = Namespace(hard=False, temperature=T)
    assert torch.allclose(evaluation.student_loss(student, teacher, args), (p * (p / q).log()).sum() / 6)


def small_job(seed=0):
    images, labels = squeeze.toy(2, 4, 0)
    return Namespace(seed=seed, images=images, identity={}, views=dict(keep_epochs=2, seed=0, scale=0.08), content=dict(
        labels=labels, classes=list("abcd"), mean=[0.5] * 3, std=[0.25] * 3, precision="float32"))


def student_args(*flags):
    return Namespace(**{**vars(evaluation.parse(["run", "--hard", "--epochs", "2", "--batch", "3", *flags])), "network": "convnet"})


@pytest.mark.parametrize("schedule, end", [("stretched", 0.5), ("cosine", 1)])
def test_a_students_rate_and_decay(monkeypatch, schedule, end):
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(
        [self.param_groups[0][key] for key in ("lr", "weight_decay")]) or step(self))
    evaluation.train_student(small_job(), student_args("--schedule", schedule, "--lr", "0.01", "--wd", "0.3"), Path("none"))
    assert np.allclose(seen, [[0.01 * (1 + math.cos(math.pi * end * t / 6)) / 2, 0.3] for t in range(6)])


def test_the_average_is_an_ema_that_warms_up_buffers_too(monkeypatch):
    states, update = [], AveragedModel.update_parameters
    monkeypatch.setattr(AveragedModel, "update_parameters", lambda self, net: (
        states.append(copy.deepcopy(net.state_dict())), update(self, net)))
    _, average, _ = evaluation.train_student(small_job(), student_args("--ema", "0.3"), Path("none"))
    assert states[-1]["0.1.num_batches_tracked"] == len(states) == 6       # trained in training mode
    for name, wanted in states[0].items():
        for n, state in enumerate(states[1:], 1):
            d = min(0.3, (1 + n) / (10 + n))
            wanted = wanted * d + state[name] * (1 - d) if wanted.is_floating_point() else wanted
        assert not wanted.is_floating_point() or torch.allclose(average.state_dict()[name], wanted, atol=1e-6), name


def test_a_row_is_mean_and_sample_deviation_of_each_kind(here, monkeypatch):
    recover.main(["--iterations", "0", "--ipc", "2"])
    monkeypatch.setattr(evaluation, "train_student", lambda job, *rest: (10.0 + job.seed**2, 60.0 + job.seed, 1.0))
    monkeypatch.setattr(squeeze, "accuracy", lambda network, *rest: network)           # (student, its average)
    evaluation.main(["runs/toy-convnet/real-ipc2", "--hard"])
    row, = squeeze.read_json(Path("runs/toy-convnet/real-ipc2/result.json")).values()
    assert (row["averaged"], row["averaged_std"]) == (61, 1) and row["raw_std"] == pytest.approx(np.std([10, 11, 14], ddof=1))


def test_seeds_are_other_students(monkeypatch):
    """In where they start, and in the order they see."""
    orders, split = [], torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, n, *dim: (
        self.dtype == torch.int64 and orders.append(self.tolist())) or split(self, n, *dim))
    for seed in (0, 1):
        evaluation.train_student(small_job(seed), student_args(), Path("none"))
    assert len({tuple(order) for order in orders}) == 4
    monkeypatch.setattr(evaluation, "train_epoch", lambda *args, **parts: None)
    students = [evaluation.train_student(small_job(seed), student_args(), Path("none"))[0] for seed in (0, 1)]
    assert not torch.equal(*(student[0][0].weight for student in students))


def test_accuracy_counts_the_largest_logit(monkeypatch):
    network, split = torch.nn.Linear(1, 1), squeeze.Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.tensor([0, 1, 2, 2]))
    monkeypatch.setattr(squeeze, "forward", lambda network, x: torch.tensor([[5., 1, 0], [0, 3, 1], [0, 1, 2], [3, 1, 0]]))
    assert squeeze.accuracy(network, squeeze.Data([], 32, None, split, ""), dict(mean=[0.0] * 3, std=[1.0] * 3)) == 75


@pytest.mark.parametrize("flags, gs, scale", [([], "Ix", None), (["--loss", "filter"], "I", None), (["--loss", "signal"], "x", None),
                                              (["--filter", "high"], "Ix", 0.01)])
def test_round_k_matches_with_alpha_k_and_its_step(here, monkeypatch, flags, gs, scale):
    seen, steps, matching = [], [], spectral.matching

    def spy(real, pairs, *more):
        seen.append([(g, f.alpha) for g, f in pairs])
        loss = matching(real, pairs, *more)
        return lambda layers, memory=None, step=None: steps.append(step) or loss(layers, memory, step)
    monkeypatch.setattr(spectral, "matching", spy)
    recover.main(["--ipc", "3", "--iterations", "2", "--alpha-max", "0.2", "--emu", "paper", *flags])
    alphas = [0.2 * (scale or (1 + math.cos(math.pi * k / 3)) / 2) for k in range(3)]
    assert [[g for g, _ in pairs] for pairs in seen[1:]] == [list(gs)] * 3 and steps[1:] == [1, 1, 2, 2, 3, 3]
    assert np.allclose([[a for _, a in pairs] for pairs in seen[1:]], [[a] * len(gs) for a in alphas])


def test_every_batch_has_views_of_its_own(here, monkeypatch):
    seen, views = [], recover.random_views
    monkeypatch.setattr(recover, "random_views", lambda rng, *rest: seen.append(
        copy.deepcopy(rng).random()) or views(rng, *rest))
    recover.main(["--ipc", "2", "--iterations", "1", "--batch", "2", "--seed", "5"])
    assert seen[::2] == [np.random.default_rng([5, b]).random() for b in range(4)] and len(set(seen)) == 8


def test_views_are_drawn_as_cutmix_and_random_resized_crop_have_them():
    """The mean share of a patch: of side s = sqrt(uniform), at a uniform centre, (s - s^2 / 4)^2 is inside."""
    views = relabel.draw_views(0, 0, 20000, 224, 0.08)
    left, top, right, bottom = views.patch.double().T
    assert abs(((right - left) * (bottom - top) / 224**2).mean() - (0.5 - 0.2 + 1 / 48)) < 0.01
    assert abs((views.boxes[:, 2] < 0).double().mean() - 0.5) < 0.02 and len(views.partner.unique()) > 12000
    assert (views.partner == torch.arange(20000)).double().mean() < 0.01
    x, y, w, h = views.boxes.double().T
    w = w.abs()
    corner = torch.cat([(x / (1 - w) + 1) / 2, (y / (1 - h) + 1) / 2])[torch.cat([w, h]) < 0.9]
    assert (corner > -1e-4).all() and (corner < 1 + 1e-4).all() and abs(corner.std() - 12**-0.5) < 0.01
    inside = (w < 1) & (h < 1)
    assert abs((w / h).log()[inside].mean()) < 0.01 and abs((w * h)[inside & (w * h < 0.75)].mean() - (0.08 + 0.75) / 2) < 0.01


def test_hard_labels_are_mixed_by_what_is_seen():
    """White images are of class 0 and black ones of class 1, so how light a view is says how much of it is of class 0."""
    labels = torch.arange(40) % 2
    images = (255 * (1 - labels)).to(torch.uint8).view(-1, 1, 1, 1).expand(40, 3, 32, 32).contiguous()
    job, views = Namespace(images=images, content=dict(labels=labels, classes=["a", "b"])), relabel.draw_views(0, 0, 40, 32, 0.08)
    found = evaluation.targets(job, Namespace(online=False, hard=True), 0, views)
    assert torch.allclose(found[:, 0], relabel.render(images, views, torch.arange(40)).mean((1, 2, 3)) / 255, atol=1e-4)
    assert torch.allclose(found.sum(1), torch.ones(40))


def test_a_teachers_rate_decay_and_order(tmp_path, monkeypatch):
    seen, drawn, step = [], [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: seen.append(
        [self.param_groups[0][key] for key in ("lr", "weight_decay", "momentum")]) or step(self))
    monkeypatch.setattr(squeeze, "training_batches", lambda data, batch, augment, rng: drawn.append(rng.random()) or zip(
        *(values.split(batch) for values in data.train)))
    split = squeeze.Split(*squeeze.toy(2, 4, 0))
    for schedule, seed, wanted in (("cosine", 3, lambda t: (1 + math.cos(math.pi * t / 93)) / 2), ("step", 4, lambda t: 0.1 ** (t // 90))):
        args = Namespace(batch=3, lr=0.01, wd=0.2, smoothing=0.0, epochs=31, schedule=schedule, seed=seed, augment="crop", keep=[2])
        (tmp_path / schedule).mkdir()
        network, data = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4)), squeeze.Data(list("abcd"), 32, split, split, "")
        network.precision = "float32"
        squeeze.train(network, data, dict(mean=[0.5] * 3, std=[0.25] * 3), args, tmp_path / schedule)
        assert np.allclose(seen, [[0.01 * wanted(t), 0.2, 0.9] for t in range(93)])
        assert drawn == [np.random.default_rng([seed, e]).random() for e in range(31)]
        assert [path.name for path in (tmp_path / schedule).glob("epoch*")] == ["epoch2of31.pt"]       # of keep
        seen.clear(), drawn.clear()


def test_smoothed_labels_are_shared_by_all_classes(tmp_path, monkeypatch):
    """The loss of --smoothing s is that of the targets (1 - s) Y + s / K."""
    split = squeeze.Split(torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.arange(8) % 4)
    monkeypatch.setattr(squeeze, "training_batches", lambda data, *rest: [data.train])
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 4))
    network.precision = "float32"
    logits = network(squeeze.normalise(split.images, [0.5] * 3, [0.25] * 3)).detach()
    squeeze.train(network, squeeze.Data(list("abcd"), 32, split, split, ""), dict(mean=[0.5] * 3, std=[0.25] * 3),
                  squeeze.parse(["--smoothing", "0.3", "--epochs", "1", "--batch", "8"]), tmp_path)
    target = 0.7 * torch.eye(4)[split.labels] + 0.3 / 4
    wanted = -(target * logits.log_softmax(1)).sum(1).mean().item()
    assert abs(json.loads((tmp_path / "log.jsonl").read_text())["loss"] - wanted) < 1e-4 * wanted


def test_the_seed_is_where_a_teacher_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    starts = []
    monkeypatch.setattr(squeeze, "train", lambda network, *rest: starts.append(network[-1].weight.clone()))
    monkeypatch.setattr(squeeze, "accuracy", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    for seed in ("0", "1"):
        with pytest.raises(KeyboardInterrupt):
            squeeze.main(["--seed", seed, "--resume"])
    assert not torch.equal(*starts)


def test_training_crops_move_and_mirror():
    """All 81 places and both ways: 2,000 views of one image that has no two alike."""
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(2000, 3, 32, 32)
    data = squeeze.Data([], 32, squeeze.Split(images, torch.zeros(2000, dtype=torch.long)), None, "")
    crops = torch.cat([x for x, _ in squeeze.training_batches(data, 500, "crop", np.random.default_rng(0))])
    assert len(crops.unique(dim=0)) == 162


def test_resized_crops_are_mirrored_half_the_time():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(400, 3, 32, 32)
    data = squeeze.Data([], 32, squeeze.Split(ramp, torch.zeros(400, dtype=torch.long)), None, "")
    crops = torch.cat([x for x, _ in squeeze.training_batches(data, 100, "resized", np.random.default_rng(0))]).float()
    assert 150 < (crops[..., 0] > crops[..., -1]).all((1, 2)).sum() < 250


def test_images_that_hardly_move_come_back_as_they_were(here):
    """Down and up again is no level darker: the return is rounded, not cut."""
    recover.main(["--ipc", "2", "--iterations", "1", "--lr", "1e-9"])
    made, = Path("runs/toy-convnet").glob("cfm-*/images.pt")
    images = squeeze.toy(1000, 4, 0)[0]
    assert torch.equal(torch.load(made)["images"], torch.stack([images[1000 * c + k] for k in range(2) for c in range(4)]))


@pytest.mark.parametrize("signal, centred", [("mean", True), ("mean", False), ("class", True), ("class", False)])
def test_a_runs_objective_has_its_methods_signal_and_centring(signal, centred):
    real, syn = ({"x": spectral.moments(torch.randn(9, 4).double() + 3, F.one_hot(torch.arange(9) % 3, 3))} for _ in "ab")
    pairs = baselines.METHODS["dc"][0](None)
    loss = recover.objective(Namespace(real=real, pairs_of=lambda k, args: pairs), Namespace(signal=signal, centred=centred))
    assert loss(0, syn) == spectral.matching(real, pairs, signal, centred)(syn)


def test_the_table_is_the_papers():
    """Eq. 3 and covariance matching centre and SRe2L has no classes; a linear head without bias (Eq. 4-14) does not centre."""
    assert {name: row[1:] for name, row in list(baselines.METHODS.items())[:6]} == {
        "dm": ("class", True), "sre2l": ("mean", True), "dc": ("class", False), "covm": ("class", True),
        "mtt": ("class", False), "frepo": ("class", False)}
    psi = torch.diag(torch.tensor([1.0, 4.0]))[None]
    (_, f, f_s), _ = baselines.METHODS["mtt"][0](baselines.parse(["--method", "mtt"]))(psi)
    lam = torch.tensor([[1.0, 4.0]])
    assert torch.allclose(f(lam), torch.tensor([[0.75**10, 0.0]])) and torch.equal(f(lam), f_s(lam))


def test_rivals_and_layers_reach_the_run(here, monkeypatch):
    jobs = {}
    monkeypatch.setattr(recover, "distil", lambda job, args: jobs.__setitem__((args.method, args.layers), job) or 1 / 0)
    for flags in (["rded"], ["dwa"], ["cda"], ["sre2l"], ["sre2l", "--layers", "last"]):
        with pytest.raises(ZeroDivisionError):
            baselines.main(["--ipc", "1", "--method", *flags])
    rded, dwa, cda, plain, last = jobs.values()
    assert dwa.network_for is baselines.adjusted and cda.smallest is baselines.curriculum and len(last.real) == 1 < len(plain.real)
    monkeypatch.setattr(baselines, "realistic_crops", lambda job, args, c: [f"{c} of round {k}" for k in range(2)])
    monkeypatch.setattr(torch, "stack", list)
    assert rded.start(rded, 1, torch.tensor([2, 0]), None) == ["2 of round 1", "0 of round 1"]


def test_the_hash_of_a_set_is_of_its_pixels_and_labels():
    images, labels = squeeze.toy(2, 2, 0)
    other, swapped = images.clone(), labels.flip(0)
    other[3, 1, 5, 7] ^= 1
    assert len({squeeze.digest(squeeze.Split(*split), "") for split in ((images, labels), (other, labels), (images, swapped))}) == 3


def test_a_run_goes_on_only_from_what_it_was_made_from(tmp_path):
    begin = lambda flags, teacher="two": squeeze.open_run(
        tmp_path, "recover", {"data": "/old"}, {"data": "hash", "teacher.pt": teacher}, True)
    begin([], "one")
    one_line(begin, [], "teacher.pt is 'two' now and was 'one'")


def test_labels_and_checkpoints_of_others_are_refused(here):
    recover.main(["--iterations", "0", "--ipc", "2"])
    run = Path("runs/toy-convnet/real-ipc2")
    relabel.main([str(run), "--epochs", "2"])
    config = squeeze.read_json(run / "labels/config.json")
    squeeze.save(run / "labels/config.json", {**config, "inputs": {**config["inputs"], "teacher.pt": "0" * 64}})
    one_line(evaluation.main, [run], "made for other images or by another teacher")
    squeeze.save(run / "labels/config.json", config)
    squeeze.save(run / "student-convnet-epochs2-0.pt", {"identity": {}, "epoch": 1, "seconds": 0})
    one_line(evaluation.main, [run, "--resume"], "student-convnet-epochs2-0.pt", "other labels or settings")


def test_other_images_than_a_runs_are_no_test_for_it(here, monkeypatch):
    recover.main(["--iterations", "0", "--ipc", "2"])
    train, test, names = squeeze.LOADERS["toy"](None, 4)
    monkeypatch.setitem(squeeze.LOADERS, "toy", lambda *_: (squeeze.select(train, torch.arange(1, 4000)), test, names))
    one_line(evaluation.main, ["runs/toy-convnet/real-ipc2", "--hard"], "--data: not the images and classes")


def test_another_teachers_labels_are_its_own(here):
    recover.main(["--iterations", "0", "--ipc", "2"])
    run, other = "runs/toy-convnet/real-ipc2", Path("runs/other")
    shutil.copytree("runs/toy-convnet", other)
    config, teacher = squeeze.read_config(other, "squeeze"), squeeze.load_state(other / "teacher.pt")
    for key in list(teacher["state_dict"])[-2:]:           # the head's
        teacher["state_dict"][key] *= -1
    squeeze.save(other / "teacher.pt", teacher)
    squeeze.finish_run(other, config, ["teacher.pt", "statistics.pt"])
    for flags in ([], ["--teacher", str(other)]):
        relabel.main([run, "--epochs", "2", *flags])
    assert np.array_equal(np.load(f"{run}/labels/soft_labels.npy"), -np.load(f"{run}/labels-other/soft_labels.npy"))


def test_similarity_is_the_mean_over_pairs_of_a_class(here):
    network, teacher, config = recover.load_teacher("runs/toy-convnet", CPU)
    images, labels = squeeze.toy(3, 4, 0)[0], torch.arange(12) % 4
    name = squeeze.load_state(Path("runs/toy-convnet/statistics.pt"))["head"]
    with spectral.collect_inputs(network, lambda n, m: n == name) as features, torch.no_grad():
        network(squeeze.normalise(images, teacher["mean"], teacher["std"]))
    pairs = [F.cosine_similarity(features[name][i], features[name][j], dim=0) for i in range(12) for j in range(i) if (i - j) % 4 == 0]
    found = evaluation.intra_class_similarity(network, name, dict(teacher, images=images, labels=labels), CPU)
    assert found == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-4)


def test_the_reports_filters_are_those_of_the_first_and_last_round():
    args = Namespace(centred=True, filter="cfm", ipc=4, alpha_max=0.2, schedule="cosine", loss="both")
    curves = evaluation.responses("cfm", args, dict(ffc=torch.diag(torch.tensor([0.5, 2.0]))))
    for k in (0, 3):
        lam, f = curves[f"cfm round {k + 1}"]
        assert np.allclose(f, 1 / (np.array(lam) + 0.1 * (1 + math.cos(math.pi * k / 4))))


def test_large_files_are_seen_at_seven_eighths_of_their_shorter_side(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    split = squeeze.Split([str(tmp_path / "0.png")], torch.zeros(1, dtype=torch.long))
    (found, _), = squeeze.batches(squeeze.Data([], 224, None, split, ""), split, 1)
    assert np.array_equal(found[0].permute(1, 2, 0), pixels[16:240, 16:240])


def test_the_papers_settings():
    """Tables 9-12, typed off them once: test_presets compares PRESETS with itself."""
    paper = lambda name: squeeze.PRESETS[name]["recover"]
    assert [[paper(name)[key] for key in ("alpha_max", "lr", "batch", "iterations", "gamma")] for name in (
        "cifar10", "cifar100", "tiny", "imagenet")] == [
        [0.1, 0.25, 10, 1000, 0.1], [0.1, 0.25, 100, 1000, 0.1], [1.0, 0.1, 200, 1000, 0.1], [0.1, 0.1, 500, 1000, 0.1]]
    assert [[squeeze.PRESETS[name]["squeeze"][key] for key in ("epochs", "lr", "wd", "batch")] for name in (
        "cifar10", "cifar100", "tiny")] == [
        [200, 0.1, 5e-4, 128], [100, 0.1, 5e-4, 128], [50, 0.2, 1e-4, 256]]
