"""baselines.py: each method's pairs against the method's own definition, in float64 on random data."""
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import baselines
import recover
import relabel
import spectral
import squeeze
from squeeze import BadInput, Namespace
from conftest import one_line

S = Namespace(p=7, q=4, beta=0.3, eta=None)
SHAPES = [(6, 8), (42, 8)]                                 # n < C: FFC has a null space, and n > C


@pytest.fixture(params=SHAPES, ids=["n<C", "n>C"])
def sets(request):
    """(H, Y) of a real and of a synthetic set, 3 classes, each divided by sqrt(n), so that H^T H and H^T Y are the
    averages that the code has. The mean of the features is five deviations from zero: the centred FFC is another
    matrix, and with it DC's, MTT's and FrePo's tests below fail."""
    torch.manual_seed(0)
    n, C = request.param
    return [((torch.randn(m, C, dtype=torch.float64) + 5 * torch.randn(C, dtype=torch.float64)) / m**0.5,
             F.one_hot(torch.arange(m) % 3, 3).double() / m**0.5) for m in (n, n - 3)]


def same(a, b):
    assert torch.linalg.norm(a - b) <= 1e-9 * torch.linalg.norm(b)


def compared(name, sets, eta=None):
    """What a method's pairs compare, real and synthetic, through the code's own path from features to FFC and FLC."""
    method, signal, centred = baselines.METHODS[name]
    return [[part[0] for part in spectral.filtered([spectral.moments(H * len(H)**0.5, Y * len(H)**0.5)],
                                                   method(Namespace(**{**vars(S), "eta": eta})), signal, centred, side)[1]]
            for side, (H, Y) in zip((0, -1), sets)]


def test_dm_compares_class_sums(sets):
    for (H, Y), (signal,) in zip(sets, compared("dm", sets)):
        same(signal, torch.stack([H[Y[:, c] > 0].sum(0) for c in range(3)], 1) * Y.max())


def test_dc_pairs_bound_the_difference_of_gradients_of_a_linear_head(sets):
    (ffc, flc), (ffc_s, flc_s) = compared("dc", sets)
    for _ in range(20):
        W, gradients = torch.randn(8, 3, dtype=torch.float64), []
        for H, Y in sets:
            leaf = W.clone().requires_grad_()
            (((H @ leaf - Y) ** 2).sum() / 2).backward()
            gradients.append(leaf.grad)
        same(gradients[0], ffc @ W - flc)                  # Eq. 4
        same(gradients[1], ffc_s @ W - flc_s)
        bound = torch.linalg.norm(ffc - ffc_s) * torch.linalg.norm(W) + torch.linalg.norm(flc - flc_s)
        assert torch.linalg.norm(gradients[0] - gradients[1]) <= bound      # Eq. 5


def test_covm_is_covariances_and_class_means(sets):
    for (H, Y), (signal, ffc) in zip(sets, compared("covm", sets)):
        same(signal, H.T @ Y)
        same(ffc, torch.from_numpy(np.cov((H * len(H)**0.5).numpy().T, bias=True)))


def test_mtt_pairs_are_gradient_descent(sets):
    """p real and q synthetic full-batch steps from the same W_0, by a loop (Eq. 6-8)."""
    eta = 1 / max(torch.linalg.eigvalsh(H.T @ H)[-1] for H, _ in sets)
    W0 = torch.randn(8, 3, dtype=torch.float64)
    for (H, Y), steps, (before_start, learned) in zip(sets, (S.p, S.q),
                                                      compared("mtt", sets, eta)):
        W = W0.clone()
        for _ in range(steps):
            W -= eta * H.T @ (H @ W - Y)
        same(before_start @ W0 + learned, W)


def test_frepo_is_kernel_ridge_regression(sets):
    """Through the Gram matrix (Eq. 13), where the code goes through FFC (Eq. 14): so their identity, too (Eq. 26-27)."""
    for (H, Y), (weights,) in zip(sets, compared("frepo", sets)):
        same(weights, H.T @ torch.linalg.solve(H @ H.T + S.beta * torch.eye(len(H), dtype=torch.float64), Y))


def test_sre2l_pairs_are_batchnorms_statistics():
    torch.manual_seed(0)
    stats = []
    for n in (6, 4):
        x = torch.randn(n, 5, 3, 3, dtype=torch.float64) * 2 + 1
        norm = torch.nn.BatchNorm2d(5, momentum=1.0).double()
        norm(x)
        count = n * 9
        stats.append((norm.running_var * (count - 1) / count, norm.running_mean, spectral.filtered(
            [spectral.moments(x)], baselines.METHODS["sre2l"][0](S), "mean", True, -(n == 4))[1]))
    (var, mu, real), (var_s, mu_s, syn) = stats
    same((real[0] - syn[0]).flatten(), var - var_s)
    same((real[1] - syn[1]).flatten(), mu - mu_s)


def test_responses_agree_with_the_papers_table():
    """Low-pass: f rises with lambda; high-pass: f falls. DM's f is flat: it weights every direction of FLC alike, and
    the paper calls it low-pass since the unweighted signal is largest where lambda is: low frequency dominates."""
    lam = torch.linspace(0, 4, 101, dtype=torch.float64)

    def band(f):
        slope = f(lam).diff()
        if slope.abs().max() < 1e-12:
            return "flat"
        return "low" if (slope >= 0).all() else "high" if (slope <= 0).all() else "mixed"
    expected = {"dm": {"flat"}, "sre2l": {"low", "flat"}, "dc": {"low", "flat"}, "covm": {"low", "flat"},
                "mtt": {"high"},
                "frepo": {"high"}}
    for name, (method, _, _) in list(baselines.METHODS.items())[:6]:       # the rivals' pairs are SRe2L's
        pairs = method(Namespace(**{**vars(S), "eta": 0.25}))
        for _, *filters in pairs(None) if callable(pairs) else pairs:
            assert {band(f) for f in filters} <= expected[name]
    for k in range(5):
        pairs = recover.cfm_pairs(k, Namespace(filter="cfm", loss="both", ipc=5, alpha_max=0.1, schedule="cosine"))
        assert {band(f) for _, f in pairs} == {"high"}
    (g, f), _ = recover.cfm_pairs(0, Namespace(filter="low", loss="both", ipc=5, alpha_max=0.1, schedule="cosine"))
    assert g == "I" and band(f) == "low"


def test_cda_goes_from_whole_images_to_the_usual_crops(here, monkeypatch):
    """The published schedule, min = 0.08 + 0.92 (1 + cos(pi t / T)) / 2, reaches the crops of iteration t."""
    seen = []
    crop_boxes = recover.crop_boxes
    monkeypatch.setattr(recover, "crop_boxes", lambda uniform, scale, **flip: seen.append(scale[0]) or crop_boxes(
        uniform, scale, **flip))
    baselines.main(["--method", "cda", "--ipc", "1", "--iterations", "6"])
    wanted = [0.08 + 0.92 * (1 + np.cos(np.pi * t / 6)) / 2 for t in range(6)]
    assert np.allclose(seen[0], np.repeat(wanted, 4)) and np.allclose(seen[1], seen[0])       # EMU's are such views
    boxes = crop_boxes(np.random.default_rng(0).random((24, 4)), (seen[0], 1)).numpy()
    assert (boxes[:, 2] * boxes[:, 3] >= 0.5 * seen[0]).all() and np.allclose(boxes[:4, 2] * boxes[:4, 3], 1, atol=0.3)


def test_dwa_climbs_by_steps_of_fixed_length_on_a_copy():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    network, x, y = network.double().requires_grad_(False), torch.randn(4, 3, 2, 2).double(), torch.tensor([0, 1, 2, 0])
    network.precision, before = "float32", [weight.clone() for weight in network.parameters()]
    W = torch.cat([weight.flatten() for weight in before]).requires_grad_()

    def loss(W):                                           # the definition, on one vector of all weights
        a, b, c, d = W.split([60, 5, 15, 3])
        return F.cross_entropy(torch.tanh(x.flatten(1) @ a.view(5, 12).T + b) @ c.view(3, 5).T + d, y)
    for _ in range(12):
        g, = torch.autograd.grad(loss(W), W)
        W = (W + 0.015 / 12 * g / g.norm()).detach().requires_grad_()
    found = baselines.adjusted(network, x, y)
    moved = torch.cat([weight.flatten() for weight in found.parameters()])
    assert torch.allclose(moved, W, atol=1e-7) and not any(w.requires_grad for w in found.parameters())
    assert loss(moved) > loss(torch.cat([weight.flatten() for weight in before]))
    assert all(torch.equal(weight, old) for weight, old in zip(network.parameters(), before))


@pytest.mark.parametrize("S", [32, 66, 67])
def test_rded_takes_the_crops_the_teacher_is_surest_of(S):
    """Against the definition, one crop at a time: the least loss of each image's crops, then of the images."""
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (12, 3, S, S), dtype=torch.uint8), torch.arange(12) % 2
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * S * S, 2)).requires_grad_(False)
    network.precision, about = "float32", dict(mean=[0.5] * 3, std=[0.25] * 3)
    data = squeeze.Data(["a", "b"], S, squeeze.Split(images, labels), None, "")
    job, grid = Namespace(data=data, teacher=about, network=network), 2 if S > 64 else 1
    d = math.ceil(S / grid)
    for c in range(2):
        made, rng = baselines.realistic_crops(job, Namespace(seed=3, ipc=1), c, candidates=5, crops=3), np.random.default_rng([3, c])
        own = rng.permutation(np.arange(c, 12, 2))[:5]
        scored, uniform = [], rng.random((15, 4))
        for i, image in enumerate(own):
            options = []
            for r in range(3):
                box = recover.crop_boxes(uniform[None, 5 * r + i], (0.08, 1), (1, 1))
                assert abs(box[0, 2] - box[0, 3]) < 1e-6                           # square
                crop = recover.resample(images[image, None].float(), recover.crop_grid(box, d)).round()
                around = torch.zeros(1, 3, S, S)
                around[..., (S - d) // 2:(S - d) // 2 + d, (S - d) // 2:(S - d) // 2 + d] = (crop / 255 - 0.5) / 0.25
                options.append((F.cross_entropy(network(around), torch.tensor([c])).item(), crop[0]))
            scored.append(min(options, key=lambda option: option[0]))
        best = [crop for _, crop in sorted(scored, key=lambda option: option[0])[:grid**2]]
        wanted = best[0] if grid == 1 else torch.cat([torch.cat(best[:2], 2), torch.cat(best[2:], 2)], 1)
        assert torch.equal(made[0].float(), wanted[:, :S, :S])


def test_rded_needs_no_steps_and_enough_images(here, monkeypatch):
    monkeypatch.setattr(baselines, "realistic_crops", functools.partial(baselines.realistic_crops, candidates=30))
    for flag in ("iterations", "lr", "gamma"):
        one_line(baselines.main, ["--method", "rded", f"--{flag}", "5"], "--method rded", f"leave out --{flag}")
    one_line(baselines.main, ["--method", "dwa", "--iterations", "0"], "--iterations 0", "recover.py")
    baselines.main(["--method", "rded", "--ipc", "2"])
    assert relabel.load_run("runs/toy-convnet/rded-ipc2")[0]["images"].shape == (8, 3, 32, 32)
    baselines.main(["--method", "rded", "--ipc", "2", "--seed", "1"])
    assert Path("runs/toy-convnet/rded-ipc2-seed1/images.pt").is_file()
    one_line(baselines.main, ["--method", "rded", "--ipc", "1001"], "--ipc", "1001 are needed")


@pytest.mark.parametrize("method", [name for name in baselines.METHODS if name != "rded"])
def test_every_method_runs_on_toy_images(here, method):
    baselines.main(["--method", method, "--ipc", "2", "--iterations", "6"])
    run = f"runs/toy-convnet/{method}-ipc2-iterations6"
    content, config, _ = relabel.load_run(run)
    real = squeeze.toy(1000, 4, 0)[0][[0, 1000, 2000, 3000]]
    assert content["images"].shape == (8, 3, 32, 32) and (content["images"][:4] != real).any()
    assert config["settings"]["method"] == method and config["settings"]["signal"] == (
        baselines.METHODS[method][1])


def test_last_layer_on_request(here):
    baselines.main(["--method", "frepo", "--ipc", "2", "--iterations", "3", "--layers", "last"])
    assert torch.load("runs/toy-convnet/frepo-ipc2-iterations3-layerslast/images.pt",
                      weights_only=True)["images"].shape[0] == 8


@pytest.mark.parametrize("flags, words", [
    (["--method", "kip"], ["--method", "kip", "frepo"]), ([], ["--method"]),
                                          (["--method", "mtt", "--p", "0"], ["--p", ">= 1"]),
    (["--method", "mtt", "--q", "0"], ["--q"]), (["--method", "frepo", "--beta", "0"], ["--beta", "> 0"]),
    (["--method", "frepo", "--beta", "-1"], ["--beta"]), (["--method", "mtt", "--eta", "1e6"],
                                                          ["--eta", "diverges", "at most"])])
def test_bad_flags(here, flags, words):
    one_line(baselines.main, flags, *words)


def test_the_largest_stable_rate_is_accepted(here):
    try:
        baselines.main(["--method", "mtt", "--eta", "1e6", "--ipc", "1"])
    except BadInput as error:
        most = float(str(error).split("at most ")[1].split(",")[0])
    baselines.main(["--method", "mtt", "--eta", str(0.99 * most), "--ipc", "1", "--iterations", "2"])
