"""spectral.py, proved by algebra: every short form against the definition it stands for, in float64 on random input."""
import doctest
import math
import shutil
import typing
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import spectral as sp

f64 = dict(dtype=torch.float64)
FILTERS = {"identity": (sp.identity, lambda lam: 1.0), "low_pass": (sp.low_pass, lambda lam: lam),
           "ridge": (sp.ridge(0.3), lambda lam: 1 / (lam + 0.3)),
           "gradient_descent": (sp.gradient_descent(0.2, 5)[0], lambda lam: (1 - 0.2 * lam) ** 5),
           "gradient_descent_sum": (sp.gradient_descent(0.2, 5)[1],
                                    lambda lam: 0.2 * sum((1 - 0.2 * lam) ** i for i in range(5)))}
MATRIX = {"identity": lambda A: np.eye(len(A)), "low_pass": lambda A: A,
          "ridge": lambda A: np.linalg.inv(A + 0.3 * np.eye(len(A))),
          "gradient_descent": lambda A: np.linalg.matrix_power(np.eye(len(A)) - 0.2 * A, 5),
          "gradient_descent_sum": lambda A: 0.2 * sum(np.linalg.matrix_power(np.eye(len(A)) - 0.2 * A, i)
                                                      for i in range(5))}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_psi(C=7, n=20, **kw):
    return sp.moments(torch.randn(n, C, **f64), **kw).ffc


def ridge_filter(ffc, alpha):
    return sp.spectral_filter(ffc, sp.ridge(alpha))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- features

def test_layouts_agree_and_are_never_guessed():
    x = torch.randn(2, 5, 3, 4)
    tokens, plain = x.flatten(2).mT, x.permute(0, 2, 3, 1).reshape(-1, 5)
    for layout, features in (("tokens", tokens), ("plain", plain)):
        for found, wanted in zip(sp.moments(features, layout=layout), sp.moments(x)):
            assert found is wanted is None or torch.allclose(torch.as_tensor(found), torch.as_tensor(wanted), atol=1e-6)
    assert torch.equal(sp.moments(x.movedim(1, -1), layout="tokens").ffc, sp.moments(x).ffc)       # a channels-last map
    for layout, features in ((None, tokens), ("plain", x), ("image", x), ("map", x[:0]), (None, x[0, 0, 0])):
        with pytest.raises(ValueError, match="layout"):
            sp.moments(features, layout=layout)


def test_channels_last_rows_are_a_view(monkeypatch):
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(sp._Covariance, "apply", lambda X: (X, X.mean(0)))
    rows = sp.moments(x).ffc
    assert rows.data_ptr() == x.data_ptr() and rows.is_contiguous() and rows.shape == (24, 5)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (40, 6, 1, 1), (1, 8, 2, 2)])
def test_covariance_equals_numpy(shape):
    x = torch.randn(shape, **f64) + 0.5
    X = x.permute(0, 2, 3, 1).reshape(-1, shape[1]).numpy()
    assert np.allclose(sp.moments(x).ffc, np.cov(X.T, bias=True), atol=1e-12)
    assert np.allclose(sp.moments(x).mean, X.mean(0), atol=1e-12)


def test_classwise_flc_is_h_transposed_y():
    x, Y = torch.randn(6, 5, 3, 4, **f64), F.one_hot(torch.tensor([0, 1, 2, 0, 1, 3]), 4)
    assert torch.allclose(sp.moments(x, Y).flc, x.mean((2, 3)).T @ Y.double() / 6, atol=1e-14)
    assert torch.allclose(sp.moments(x, Y).share * 6, torch.tensor([2, 2, 1, 1], **f64))
    for labels in (torch.tensor([0, 1, 2, 0, 1, 3]), Y[:5]):
        with pytest.raises(ValueError, match="labels must be"):
            sp.moments(x, labels)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_covariance_gradient(memory_format):
    x = torch.randn(2, 4, 3, 2, **f64).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sp.moments(x)[1:3], x)
    assert torch.autograd.gradgradcheck(lambda x: sp.moments(x)[1:3], x)


def test_many_rows_go_block_by_block():
    """Three blocks, the last one short, joined by Chan's law: value and gradient of the whole, at a mean of a thousand
    deviations in float32 too."""
    X, G = torch.randn(30000, 40, **f64).requires_grad_(), torch.randn(40, 40, **f64)
    assert len(list(sp.blocks(X))) == 3
    whole = torch.cov(X.T, correction=0)
    found = sp.moments(X)
    assert torch.allclose(found.ffc, whole, 1e-10, 1e-14) and torch.allclose(found.mean, X.mean(0), 1e-10, 1e-14)
    wanted, = torch.autograd.grad((whole * G).sum() + X.mean(0) @ G[0], X)
    ours, = torch.autograd.grad((found.ffc * G).sum() + found.mean @ G[0], X)
    assert torch.allclose(ours, wanted, 1e-10, 1e-15)
    assert torch.allclose(sp.moments((X + 1000).float()).ffc.double(), whole, 0, 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_covariance_gradient_in_half_precision(dtype):
    """Rounded to the features' precision, but not lost where it is small."""
    x = torch.randn(20, 16, 8, 8).relu().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = x.detach().double().requires_grad_()
    G, g = 1e-3 * torch.randn(16, 16), 1e-3 * torch.randn(16)
    found, wanted = (torch.autograd.grad(sum((part * weight).sum() for part, weight in zip(sp.moments(v)[1:3], (g, G))),
                                         v)[0] for v in (x, exact))
    assert found.dtype == dtype and relative(found.double(), wanted) < 1e-2


@pytest.mark.parametrize("alpha", [0.1, 0.00245, 1e-4, 2.5e-5])
@pytest.mark.parametrize("loss", ["filter", "signal"])
def test_gradient_of_the_matching_loss_in_half_precision(alpha, loss):
    """Features that leave most directions empty, as ten images do, behind a ridge: G then holds entries of 1/alpha^2
    along those directions, which must cancel against the features before anything is rounded."""
    torch.manual_seed(1)
    spectrum = torch.logspace(0, -4, 24)[:, None]
    x = (torch.randn(160, 24) @ (spectrum * torch.randn(24, 64)) + 0.3).to(torch.bfloat16)      # rank 24 of 64
    _, mean, real, *_ = sp.moments((torch.randn(4000, 64) @ torch.diag(torch.logspace(0, -2, 64))).double())
    x, grads = x.requires_grad_(), []
    for leaf in (x, x.detach().double().requires_grad_()):
        _, phi, psi, *_ = sp.moments(leaf)
        F_real, F_syn = ridge_filter(real.to(psi.dtype), alpha), ridge_filter(psi, alpha)
        value = torch.linalg.norm(F_real - F_syn) if loss == "filter" else \
            torch.linalg.norm(F_real @ mean.to(psi.dtype) - F_syn @ phi)
        grads.append(torch.autograd.grad(value, leaf)[0].double().flatten())
    assert F.cosine_similarity(*grads, dim=0) > 0.99


def test_autocast_does_not_reach_the_statistics():
    x = torch.randn(20, 16, 8, 8).relu().to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    _, exact_phi, exact_psi, *_ = sp.moments(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, phi, psi, per_class, _ = sp.moments(x, torch.ones(20, 2))
        F_half = ridge_filter(psi, 0.1)
        eigen = sp.spectral_filter(psi, lambda lam: 1 / (lam + 0.1))
    assert psi.dtype == phi.dtype == F_half.dtype == per_class.dtype == torch.float32
    assert relative(psi.double(), exact_psi) < 1e-3 and relative(phi.double(), exact_phi) < 1e-3
    exact_F = torch.linalg.inv(exact_psi + 0.1 * torch.eye(16))
    assert relative(F_half.double(), exact_F) < 1e-3 and relative(eigen.double(), exact_F) < 1e-3
    assert relative(per_class.double(), exact_phi[:, None].expand(-1, 2)) < 1e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_streaming_statistics_equal_the_whole_in_any_split_and_order(dtype, tolerance):
    x = (torch.randn(90, 6, 5, 5) + torch.arange(90).view(-1, 1, 1,
                                                          1) / 30).to(dtype)        # a class-ordered set drifts
    Y = F.one_hot(torch.arange(90) // 30, 3)
    look = lambda x, Y: sp.moments(x, Y).to(torch.float64)
    whole = look(x.double(), Y)
    assert np.allclose(whole.ffc, np.cov(x.double().permute(1, 0, 2, 3).reshape(6, -1), bias=True), atol=1e-12)
    for sizes in ([90], [1] * 90, [7, 50, 33], [40, 49, 1]):
        parts = [look(a, b) for a, b in zip(x.split(sizes), Y.split(sizes))]
        for order in (range(len(parts)), reversed(range(len(parts)))):
            order = list(order)
            merged = parts[order[0]]
            for i in order[1:]:
                merged = sp.merge(merged, parts[i])
            assert merged.count == whole.count
            for a, b in zip(merged[1:], whole[1:]):
                assert relative(a, b) < tolerance


def test_statistics_do_not_depend_on_the_order_of_a_batch():
    x, Y, order = torch.randn(12, 5, 4, 4, **f64), torch.rand(12, 3, **f64), torch.randperm(12)
    for a, b in zip(sp.moments(x, Y)[1:], sp.moments(x[order], Y[order])[1:]):
        assert torch.allclose(a, b, atol=1e-14)


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(),
                         nn.ModuleDict({"downsample": nn.Conv2d(4, 4, 1)})["downsample"],
                         nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(72, 2))


def test_hooks_collect_inputs_and_leave_no_trace():
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    with sp.collect_inputs(net) as features:
        net(x)
    assert list(features) == ["0", "2", "3"] and features["0"] is x
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    with sp.collect_inputs(net, lambda name, m: isinstance(m, nn.Linear), sp.moments) as layers:
        net(x)
    assert layers["5"].ffc.shape == (72, 72)
    with pytest.raises(RuntimeError):
        with sp.collect_inputs(net):
            raise RuntimeError
    assert not any(m._forward_pre_hooks for m in net.modules())
    with pytest.raises(ValueError, match="no module"):
        with sp.collect_inputs(net, lambda name, m: False):
            pass


# ---- filters

@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("n", [3, 20])
def test_filter_forms_equal_their_matrix_definition(name, n):
    psi, (f, scalar) = random_psi(n=n), FILTERS[name]
    expected = torch.from_numpy(np.asarray(MATRIX[name](psi.numpy())))
    assert torch.allclose(sp.spectral_filter(psi, lambda lam: f(lam)), expected, atol=1e-10)       # by eigh
    assert torch.allclose(sp.spectral_filter(psi, f), expected, atol=1e-10)                        # by f.matrix
    lam = torch.linalg.eigvalsh(psi).clamp(min=0)
    assert torch.allclose(f(lam), torch.as_tensor(scalar(lam), **f64).expand_as(lam), atol=1e-12)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_turn_with_the_features(name):
    psi, Q = random_psi(), torch.linalg.qr(torch.randn(7, 7, **f64)).Q
    f = FILTERS[name][0]
    assert torch.allclose(sp.spectral_filter(Q @ psi @ Q.T, f), Q @ sp.spectral_filter(psi, f) @ Q.T, atol=1e-10)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("psi", ["identity", "rank-deficient", "random", "batched", "zero"])
def test_filter_gradients(name, psi):
    A = {"identity": torch.eye(4, **f64), "rank-deficient": random_psi(5, 3), "random": random_psi(5),
         "zero": torch.zeros(3, 3, **f64),
         "batched": torch.stack([random_psi(4), torch.eye(4, **f64)])}[psi].requires_grad_()
    f = FILTERS[name][0]
    assert torch.autograd.gradcheck(lambda A: sp.spectral_filter(A, lambda lam: f(lam)), A)
    assert torch.autograd.gradcheck(lambda A: sp.spectral_filter(A, f), A)
    if name == "ridge":
        assert torch.autograd.gradgradcheck(lambda A: sp.spectral_filter(A, f), A)


@pytest.mark.parametrize("name", FILTERS)
def test_only_the_symmetric_part_counts(name):
    A = random_psi(5) + 0.1 * torch.triu(torch.rand(5, 5, **f64), 1)
    for f in (FILTERS[name][0], lambda lam: FILTERS[name][0](lam)):            # its shortcut, and eigh's way
        assert torch.allclose(sp.spectral_filter(A, f), sp.spectral_filter((A + A.mT) / 2, f), atol=1e-12)


def test_filter_gradients_with_a_number_a_layer():
    """A stack of layers, each with its own rate, as MTT has it."""
    stack = torch.stack([random_psi(4), torch.eye(4, **f64), random_psi(4, 2)]).requires_grad_()
    eta = torch.tensor([[0.1], [0.2], [0.3]], **f64)
    for f in sp.gradient_descent(eta, 3):
        assert torch.autograd.gradcheck(lambda A: sp.spectral_filter(A, f), stack)
    left, learnt = (sp.spectral_filter(stack, f) for f in sp.gradient_descent(eta, 1))     # one step: W - eta Psi W, eta Phi
    assert torch.allclose(left, torch.eye(4, **f64) - eta[..., None] * stack) and torch.allclose(learnt, eta[..., None] * torch.eye(4, **f64))


def test_a_failed_factorisation_shows():
    """The ridge of a matrix that is not positive definite must not come back as numbers."""
    assert ridge_filter(-torch.eye(3), 0.5).isnan().all()
    mixed = ridge_filter(torch.stack([torch.eye(3), -torch.eye(3)]), 0.5)
    assert mixed[0].isfinite().all() and mixed[1].isnan().all()


def test_repeated_eigenvalues_break_eigh_but_not_the_filter():
    """The reason for Daleckii-Krein: autograd's own way through eigh gives NaN on the identity."""
    A = torch.eye(4, **f64, requires_grad=True)
    lam, U = torch.linalg.eigh(A)
    ((U * (1 / (lam + 0.3))) @ U.mT).sum().backward()
    assert not A.grad.isfinite().all()
    B = torch.eye(4, **f64, requires_grad=True)
    sp.spectral_filter(B, lambda lam: 1 / (lam + 0.3)).sum().backward()
    assert torch.allclose(B.grad, torch.full((4, 4), -1 / 1.3**2, **f64))


def test_nearly_repeated_eigenvalues():
    """Between 'equal' and 'apart' the divided difference must not lose digits: compare with the ridge's closed form."""
    for gap in 10.0 ** -np.arange(1, 16):
        U = torch.linalg.qr(torch.randn(5, 5, **f64)).Q
        A = (U * torch.tensor([0, gap, 1, 1 + gap, 2], **f64)) @ U.T
        G = torch.randn(5, 5, **f64)
        grads = []
        for function in (lambda A: sp.spectral_filter(A, lambda lam: 1 / (lam + 0.3)), lambda A: ridge_filter(A, 0.3)):
            leaf = A.clone().requires_grad_()
            function(leaf).backward(G)
            grads.append(leaf.grad)
        assert relative(*grads) < 1e-6


NARROW = {"gaussian": (lambda lam: torch.exp(-((lam - 0.5) / 0.02) ** 2 / 2), 0.5),
          "narrow gaussian": (lambda lam: torch.exp(-((lam - 0.5) / 0.002) ** 2 / 2), 0.5),
          "sigmoid": (lambda lam: torch.sigmoid(1000 * (lam - 0.6)), 0.6), "step": (lambda lam: (lam > 0.6).to(lam.dtype), 0.6)}


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_filters_narrower_than_the_gaps(name, dtype, tolerance):
    """f' is nil at two eigenvalues and between them, and f differs all the same: Gamma against its definition, for
    eigenvalues far apart, close to the band, and equal."""
    f, centre = NARROW[name]
    near = centre + torch.tensor([-0.1, -0.011, -1e-3, -1e-5, 1e-5, 1e-3, 0.012, 0.1, 0.1], **f64)
    lam = torch.cat([torch.rand(12, **f64), near]).to(dtype).double()
    gap = lam[:, None] - lam
    leaf = lam.clone().requires_grad_()
    slope = torch.autograd.grad(f(leaf).sum() + 0 * leaf.sum(), leaf)[0]
    exact = torch.where(gap == 0, slope[:, None].expand_as(gap), (f(lam)[:, None] - f(lam)) / torch.where(gap == 0, 1, gap))
    G = torch.randn(len(lam), len(lam), **f64)
    psi = torch.diag(lam).to(dtype).requires_grad_()
    sp.spectral_filter(psi, f).backward((G + G.T).to(dtype))
    assert relative(psi.grad.double(), exact * (G + G.T)) < tolerance


def test_ridge_by_cholesky_equals_eigh_in_float32():
    x = torch.randn(400, 128).relu()
    psi = sp.moments(x).ffc
    for alpha in (1.0, 0.1, 0.01):
        assert relative(ridge_filter(psi, alpha), sp.spectral_filter(psi, lambda lam: 1 / (lam + alpha))) < 1e-5


def test_features_that_are_not_finite_show_in_a_filter_by_eigenvalues():
    """As NaN: LAPACK itself would raise, and no loss would be seen."""
    psi = torch.full((2, 3, 3), math.inf, requires_grad=True)
    found = sp.spectral_filter(psi, torch.exp)
    found.sum().backward()
    assert found.isnan().all() and found.shape == psi.shape and psi.grad.isnan().all()


def test_alpha_is_held_against_the_matrix_that_is_filtered():
    """With a large mean H^T H / n is far from the covariance, and so is the alpha that float32 resolves."""
    layers = {"fc": sp.moments(torch.randn(300, 8) + 100)}
    sp.matching(layers, sp.cfm_pairs(1e-3))(layers)
    with pytest.raises(ValueError, match="alpha: .* raise alpha"):
        sp.matching(layers, sp.cfm_pairs(1e-3), centred=False)(layers)
    whole = {"fc": sp.moments(torch.randn(300, 8))}
    loss = sp.matching(whole, sp.cfm_pairs(4 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(whole["fc"].ffc).item()))
    for n, singular in ((7, True), (8, True), (9, False)):                 # of 8 vectors' covariance the rank is 7
        with pytest.raises(ValueError, match="alpha: ") if singular else nullcontext():
            loss({"fc": sp.moments(torch.randn(n, 8))})


def test_ridge_becomes_a_scaled_identity_as_alpha_grows():
    psi = random_psi()
    errors = [relative(alpha * ridge_filter(psi, alpha), torch.eye(7, **f64)) for alpha in (1e2, 1e4, 1e6)]
    assert errors[0] < 0.1 and errors[1] < errors[0] / 50 and errors[2] < errors[1] / 50


@pytest.mark.parametrize("bad", [lambda: sp.ridge(0), lambda: sp.ridge(-1), lambda: sp.ridge(float("nan")),
                                 lambda: sp.gradient_descent(0, 3), lambda: sp.gradient_descent(0.1, 0),
                                 lambda: sp.gradient_descent(0.1, 1.5), lambda: ridge_filter(torch.eye(2), 0),
                                 lambda: sp.spectral_filter(torch.ones(2, 3), sp.identity), lambda: sp.alpha_schedule(5, 5, 1),
                                 lambda: sp.alpha_schedule(0, 5, 1, "step")])
def test_bad_arguments_raise_and_show_what_was_found(bad):
    with pytest.raises(ValueError, match="found"):
        bad()


# ---- CFM

def test_merge_with_a_step_is_the_mean_of_the_batches():
    batches, memory = [sp.moments(torch.randn(n, 7, **f64)) for n in (5, 9, 2, 30)], {}
    for b, seen in enumerate(batches, 1):
        memory = sp.merge(memory, {"x": seen}, b)
    for found, parts in zip(memory["x"][1:3], list(zip(*batches))[1:3]):
        assert torch.allclose(found, torch.stack(parts).mean(0), atol=1e-14)


def test_merge_is_the_statistics_of_all_rows():
    a, b = torch.randn(5, 4, **f64) + 3, torch.randn(9, 4, **f64) * 2
    Y = F.one_hot(torch.arange(14) % 3)
    found, wanted = sp.merge(sp.moments(a, Y[:5]), sp.moments(b, Y[5:])), sp.moments(torch.cat([a, b]), Y)
    assert found.count == 14 and all(torch.allclose(x, y) for x, y in zip(found[1:], wanted[1:]))
    for left, right in ((None, Y[5:]), (Y[:5], None)):     # one side without labels: nor has the whole
        partly = sp.merge(sp.moments(a, left), sp.moments(b, right))
        assert torch.equal(partly.ffc, found.ffc) and partly.flc is None and partly.share is None
    both = torch.cat([a, b])
    assert torch.allclose(found.uncentred, both.T @ both / 14)
    assert torch.autograd.gradcheck(lambda x: sp.merge(sp.moments(a), sp.moments(x))[1:3], b.requires_grad_())


def test_alpha_schedules():
    for kind in ("cosine", "linear", "constant"):
        assert sp.alpha_schedule(0, 10, 0.7, kind) == 0.7 and sp.alpha_schedule(0, 1, 0.7, kind) == 0.7
    cosine, linear = ([sp.alpha_schedule(k, 10, 1.0, kind) for k in range(10)] for kind in ("cosine", "linear"))
    assert np.allclose(cosine, [(1 + np.cos(np.pi * k / 10)) / 2 for k in range(10)])
    assert np.allclose(linear, 1 - np.arange(10) / 10)
    assert np.all(np.diff(cosine) < 0) and 0 < cosine[-1] < 0.03
    assert sp.alpha_schedule(5, 10, 1.0) == pytest.approx(0.5)
    assert sp.alpha_schedule(9, 10, 1.0, "constant") == 1.0


# ---- the objective

def some_layers(names="abc", n=30, K=3, shift=0.0, **kw):
    """Two layers of C = 5 and one of 4, with class sizes 1 : 2 : ... : K."""
    labels = F.one_hot(torch.arange(n) % (K * (K + 1) // 2) // 2 % K, K) if K else None
    return {name: sp.moments(torch.randn(n, C, **f64) + shift, labels) for name, C in zip(names, (5, 4, 5))}


@pytest.mark.parametrize("centred", [True, False])
def test_matching_is_equation_19_layer_by_layer(centred):
    real, syn = some_layers(), some_layers(n=12)
    pairs = [("I", sp.ridge(0.3)), ("diag", sp.low_pass), ("x", sp.ridge(0.3), sp.ridge(0.5))]
    wanted = 0
    for name in real:
        psi, psi_s = (side[name].ffc if centred else side[name].uncentred for side in (real, syn))
        eye = torch.eye(len(psi), **f64)
        inverse, inverse_s, other = (torch.linalg.inv(m + a * eye) for m, a in ((psi, 0.3), (psi_s, 0.3), (psi_s, 0.5)))
        wanted = wanted + torch.linalg.norm(inverse - inverse_s) + torch.linalg.norm((psi - psi_s).diagonal()) + \
            torch.linalg.norm(inverse @ real[name].mean - other @ syn[name].mean)
    assert torch.allclose(sp.matching(real, pairs, "mean", centred)(syn), wanted)


def test_class_signals_are_means_over_K_of_the_classes_in_the_batch():
    """Whatever the class sizes; a class that the batch lacks counts as matched, though the memory may hold it."""
    X, y = torch.randn(12, 4, **f64), torch.tensor([0] * 6 + [1] * 4 + [2] * 2)
    H, labels = torch.randn(5, 4, **f64), torch.tensor([0, 0, 0, 2, 2])
    loss = sp.matching({"x": sp.moments(X, F.one_hot(y, 3))}, [("x", sp.identity)], "class")
    means = lambda X, y: torch.stack([X[y == k].mean(0) / 3 for k in (0, 2)], 1)
    current = {"x": sp.moments(H, F.one_hot(labels, 3))}
    assert torch.allclose(loss(current), torch.linalg.norm(means(X, y) - means(H, labels)))
    old, old_labels = torch.randn(6, 4, **f64), torch.tensor([0, 0, 1, 1, 2, 2])
    joined = means(torch.cat([H, old]), torch.cat([labels, old_labels]))
    assert torch.allclose(loss(current, {"x": sp.moments(old, F.one_hot(old_labels, 3))}),
                          torch.linalg.norm(means(X, y) - joined))


def test_a_perfect_match_has_a_gradient_of_zero():
    x = torch.randn(9, 4, **f64, requires_grad=True)
    loss = sp.matching({"x": sp.moments(x.detach())}, [("I", sp.low_pass), ("x", sp.low_pass)])({"x": sp.moments(x)})
    loss.backward()
    assert loss == 0 and (x.grad == 0).all()


@pytest.mark.parametrize("step", [None, 3])
def test_the_objectives_gradient(step):
    """Features -> moments -> EMU -> ridge and an eigenvalue filter -> loss, against finite differences."""
    real, old = {"x": sp.moments(torch.randn(9, 4, **f64))}, {"x": sp.moments(torch.randn(9, 4, **f64))}
    loss = sp.matching(real, [*sp.cfm_pairs(0.2), ("I", torch.exp)])
    x = torch.randn(2, 4, 2, 2, **f64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss({"x": sp.moments(x)}, old, step), x)


@pytest.mark.parametrize("bad, word", [
    (lambda r: sp.matching({"a": r["a"]._replace(ffc=r["a"].ffc * float("nan"))}, sp.cfm_pairs(1)), "real: .*not finite"),
    (lambda r: sp.matching(r, sp.cfm_pairs(1), "classes"), "signal 'classes'"),
    (lambda r: sp.matching(some_layers(K=0), sp.cfm_pairs(1), "class"), "signal 'class'.*every class"),
    (lambda r: sp.matching(r, sp.cfm_pairs(1), "class")(some_layers(K=0)), "labels"),
    (lambda r: sp.matching(r, sp.cfm_pairs(1))(some_layers("ab")), "layers"),
    (lambda r: sp.matching(r, [("y", sp.low_pass)]), "pairs.*'y'"),
    (lambda r: sp.matching(r, sp.cfm_pairs(1e-8))({name: a.to(torch.float32) for name, a in r.items()}), "alpha"),
    (lambda r: sp.merge(r["a"], r["a"], step=1), "step"),
    (lambda r: sp.real_statistics(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), [], 3), "batches"),
    (lambda r: sp.real_statistics(nn.Sequential(nn.Conv2d(3, 4, 1)), [1], 3), "network is in training mode")])
def test_mistakes_name_the_argument(bad, word):
    with pytest.raises(ValueError, match=word):
        bad(some_layers())


def test_small_alpha_is_right_or_refused():
    """Ten rows in 64 dimensions, the hard case: what matching lets through has its gradient near float64's."""
    x, passed = torch.randn(10, 64), 0
    real = {"x": sp.moments(torch.randn(500, 64, **f64))}
    for alpha in (1e-1, 1e-3, 1e-5, 1e-6, 1e-7, 1e-8):
        grads = []
        for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
            try:
                grads += torch.autograd.grad(sp.matching(real, sp.cfm_pairs(alpha))({"x": sp.moments(leaf)}), leaf)
            except ValueError as error:
                assert "alpha" in str(error) and leaf.dtype == torch.float32
        if len(grads) == 2:
            passed += 1
            assert relative(grads[0].double(), grads[1]) < 0.3
    assert passed == 3 and len(grads) == 1


def test_a_mean_of_a_thousand_deviations():
    """X^T X / n - m m^T would lose all digits of the covariance; of the gradient X A + 1 b^T loses three of seven."""
    x = (torch.randn(500, 8, **f64) + 1000).float()
    grads, found = [], []
    for leaf in (x.clone().requires_grad_(), x.double().requires_grad_()):
        seen = sp.moments(leaf)
        found.append(seen.ffc.detach().double())
        grads.append(torch.autograd.grad(torch.linalg.norm(ridge_filter(seen.ffc, 0.01)), leaf)[0].double())
    assert relative(*found) < 1e-5 and relative(*grads) < 1e-4
    parts = [sp.moments(part).to(torch.float64) for part in x.split(100)]
    merged = parts[0]
    for part in parts[1:]:
        merged = sp.merge(merged, part)
    assert relative(merged.ffc, found[1]) < 1e-5


# ---- hooks

class Odd(nn.Module):
    """Calls its layers in the ways that hooks trip over."""

    def __init__(self):
        super().__init__()
        self.once, self.twice, self.tail = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, how=""):
        x = self.once(input=x) if how == "keyword" else self.once(x)
        x = self.twice(self.twice(x))
        if how.startswith("checkpoint"):
            return torch.utils.checkpoint.checkpoint(self.tail, x, use_reentrant=how.endswith("old"))
        return self.tail(x)


def of(*names):
    return lambda name, module: name in names


def gradient(how, x, names=("once", "tail")):
    net, leaf = Odd(), x.clone().requires_grad_()
    net.load_state_dict({key: torch.linspace(-1, 1, value.numel()).view_as(value) for key, value in net.state_dict().items()})
    loss = sp.matching({name: sp.moments(torch.eye(4)) for name in names}, sp.cfm_pairs(0.1))
    with sp.collect_inputs(net, of(*names), sp.moments) as layers:
        net(leaf, how)
        (loss(layers) + leaf.sum()).backward()
    return leaf.grad


@pytest.mark.parametrize("how", ["keyword", "checkpoint"])
def test_keyword_arguments_and_checkpoints_change_nothing(how):
    x = torch.randn(6, 4)
    assert torch.allclose(gradient(how, x), gradient("", x))


def test_what_hooks_refuse():
    x = torch.randn(6, 4)
    for names, how, word in ((("once", "twice"), "", "'twice' runs twice"), (("once", "tail"), "checkpoint old", "use_reentrant")):
        with pytest.raises(ValueError, match=word):
            gradient(how, x, names)
    pair = nn.Sequential(nn.LSTM(4, 4, batch_first=True), nn.Identity())
    with pytest.raises(ValueError, match="'1' takes or gives a tuple"):
        with sp.collect_inputs(pair, of("1")):
            pair(torch.randn(2, 3, 4))
    with sp.collect_inputs(pair, of("0"), sp.moments, outputs=True) as layers:
        out, _ = pair(torch.randn(2, 3, 4))
    assert torch.equal(layers["0"].ffc, sp.moments(out, layout="tokens").ffc)
    blocks = nn.Sequential(nn.Identity())
    with pytest.raises(ValueError, match="layout: that of module '0', Identity"):
        with sp.collect_inputs(blocks, of("0"), sp.moments):
            blocks(torch.randn(2, 3, 4))
    with sp.collect_inputs(blocks, of("0"), sp.moments, layout="tokens") as layers:
        blocks(torch.randn(2, 3, 4))
    assert layers["0"].mean.shape == (4,)
    for outputs in (False, True):                          # two axes are certain in any module
        with sp.collect_inputs(blocks, of("0"), sp.moments, outputs=outputs) as layers:
            out = blocks(torch.randn(2, 4))
        assert torch.equal(layers["0"].mean, out.mean(0))
    mixed = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(2), nn.LayerNorm(25), nn.Linear(25, 5), nn.Flatten(), nn.Linear(20, 2))
    for layout, width in (("tokens", 25), ("map", 4)):     # of the norm alone: the others are certain
        with sp.collect_inputs(mixed, of("0", "2", "3", "5"), sp.moments, layout=layout) as layers:
            mixed(torch.randn(6, 3, 6, 6))
        assert [len(layer.mean) for layer in layers.values()] == [3, width, 25, 20]


def test_each_pass_fills_anew_and_contexts_nest_and_keep_to_their_thread():
    net, x = small_net(), torch.randn(2, 3, 8, 8)
    with sp.collect_inputs(net) as outer:
        net(torch.zeros(2, 3, 8, 8))
        with sp.collect_inputs(net, lambda name, m: name == "0") as inner:
            net(x)
            with ThreadPoolExecutor(1) as worker:           # result() raises what a hook raised there
                worker.submit(net, torch.ones(2, 3, 8, 8)).result()
        assert inner["0"] is x and list(inner) == ["0"]
        assert outer["0"] is x and len(outer) == 3


def test_empty_batches_and_batches_of_one():
    with pytest.raises(ValueError, match="features"):
        sp.moments(torch.zeros(0, 3, 4, 4))
    one = sp.moments(torch.randn(1, 3), torch.eye(2)[:1])
    assert (one.ffc == 0).all() and torch.allclose(ridge_filter(one.ffc, 0.5), 2 * torch.eye(3))
    batches = [(torch.randn(1, 3, 8, 8), torch.tensor([k])) for k in range(3)]
    network = small_net().eval()
    alone, whole = sp.real_statistics(network, batches, 3), sp.real_statistics(
        network, [(torch.cat([x for x, _ in batches]), torch.arange(3))], 3)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for name in whole for a, b in zip(alone[name][1:], whole[name][1:]))


# ---- autocast, vmap, compilers, second derivatives

def whole_loss(x, loss=sp.matching({"x": sp.moments(torch.eye(4), torch.eye(4))}, sp.cfm_pairs(0.1), "class")):
    return loss({"x": sp.moments(x, torch.eye(4, device=x.device).repeat(2, 1))})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_leaves_autocast(dtype):
    """Bit by bit; only a backward that is itself called under autocast, which PyTorch advises against, has the signals'
    small products in half precision."""
    x = torch.randn(8, 4, requires_grad=True)
    wanted, = torch.autograd.grad(whole_loss(x), x)
    with torch.autocast("cpu", dtype=dtype):
        inside = whole_loss(x)
        careless, = torch.autograd.grad(inside, x, retain_graph=True)
    assert inside == whole_loss(x) and torch.equal(torch.autograd.grad(inside, x)[0], wanted)
    assert relative(careless, wanted) < 0.03


def test_a_stack_of_gradients_reaches_rows_in_blocks():
    """Many gradients at once (vmap over G, not over X), where the rows are more than a block holds."""
    X, G = torch.randn(40_000, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 3, 3, dtype=torch.float64)
    assert len(list(sp.blocks(X))) > 1
    psi = sp.moments(X).ffc
    found, = torch.autograd.grad(psi, X, G, is_grads_batched=True)
    for own, g in zip(found, G):
        assert torch.allclose(own, (X - X.mean(0)).detach() @ (g + g.T) / len(X), rtol=1e-9, atol=1e-12)


def test_vmap_over_a_stack():
    psi = torch.stack([random_psi(4) for _ in range(3)])
    assert torch.allclose(torch.func.vmap(lambda A: ridge_filter(A, 0.1))(psi), ridge_filter(psi, 0.1))
    x = torch.randn(3, 8, 4, **f64)
    for a, b in zip(torch.func.vmap(lambda x: sp.moments(x)[1:3])(x), list(zip(*map(sp.moments, x)))[1:3]):
        assert torch.allclose(a, torch.stack(b))
    grads = torch.func.vmap(torch.func.grad(lambda x: ridge_filter(sp.moments(x).ffc, 0.1).sum()))(x)
    leaf = x[1].clone().requires_grad_()
    ridge_filter(sp.moments(leaf).ffc, 0.1).sum().backward()
    assert torch.allclose(grads[1], leaf.grad)
    with pytest.raises(RuntimeError, match="vmap"):        # eigh's way takes stacks as they are
        torch.func.vmap(lambda A: sp.spectral_filter(A, torch.exp))(psi)


def test_second_derivatives_work_or_say_that_they_do_not():
    x = torch.randn(8, 4, **f64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ridge_filter(sp.moments(x).ffc, 0.5), x)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(sp.spectral_filter(sp.moments(x).ffc, torch.exp).sum(), x, create_graph=True)


def test_the_inverse_that_cuda_takes(monkeypatch):
    """By a triangular solve, and rows in fewer blocks: an inverse as exact as a CPU's, NaN where Psi is not positive
    definite; sums to 2e-6 (a CPU's: CUDA's own are compared where there is one, by tests/bench.py)."""
    X = torch.randn(3, 40, 24, **f64)
    psi, rows = X.mT @ X / 40, torch.randn(20_000, 128) + 1
    G, here = torch.randn(3, 24, 24, **f64), []
    for at in ("cpu", "cuda"):
        monkeypatch.setattr(torch.Tensor, "is_cpu", at == "cpu", raising=False)
        leaf = psi.clone().requires_grad_()
        F = ridge_filter(leaf, 1e-3)
        assert torch.allclose(F @ (psi + 1e-3 * torch.eye(24, **f64)), torch.eye(24, **f64).expand_as(F), atol=1e-9)
        F32 = ridge_filter(psi.float(), 1e-3)
        here.append((F, *torch.autograd.grad(F, leaf, G), relative(F32.double(), F), *sp.moments(rows)[1:3]))
        assert ridge_filter(-psi, 1e-3).isnan().any((1, 2)).all()
        assert len(list(sp.blocks(rows))) == (5 if at == "cpu" else 1)
    cpu, cuda = here
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(cpu[:2], cuda[:2]))
    exact = sp.moments(rows.double())[1:3]
    assert cuda[2] < 2 * cpu[2] < 1e-4 and all(relative(a.double(), b) < 2e-6 for a, b in zip((*cpu[3:], *cuda[3:]), exact * 2))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    """Through the compiler's front end, which needs no C++ compiler, and to the end."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("no C++ compiler here")
    x = torch.randn(8, 4, requires_grad=True)
    try:
        compiled = torch.compile(whole_loss, backend=backend)(x)
    except RuntimeError as error:
        pytest.skip(f"no torch.compile here: {error}")
    assert torch.allclose(compiled, whole_loss(x))
    assert torch.allclose(torch.autograd.grad(compiled, x)[0], torch.autograd.grad(whole_loss(x), x)[0], atol=1e-6)
    both = lambda x: sum(part.square().sum() for part in sp.moments(x)[1:3])   # the mean's own gradient, too
    parts = [torch.autograd.grad(f(x), x)[0] for f in (torch.compile(both, backend=backend), both)]
    assert parts[0].abs().sum() > 0 and torch.allclose(*parts, atol=1e-6)


def test_every_example_in_the_docstrings():
    torch.manual_seed(0)
    failed, tried = doctest.testmod(sp)
    public = [getattr(sp, name) for name in sp.__all__ if isinstance(getattr(sp, name), type(doctest.testmod))]
    named = [f for f in public if f.__name__ != "<lambda>"]
    assert failed == 0 and tried >= 20 and all(">>>" in f.__doc__ for f in named)
    assert all(set(typing.get_type_hints(f)) - {"return"} for f in named)


def test_many_channels():
    """C = 4096 with 32 rows, against Woodbury's form of the ridge filter in float64."""
    X, alpha, n = torch.randn(32, 4096, **f64), 0.1, 32
    centred = X - X.mean(0)
    inner = torch.linalg.solve(n * alpha * torch.eye(n, **f64) + centred @ centred.T, centred)
    exact = (torch.eye(4096, **f64) - centred.T @ inner) / alpha
    assert relative(ridge_filter(sp.moments(X.float()).ffc, alpha).double(), exact) < 1e-4


def test_features_that_are_not_finite_show_in_the_loss():
    X = torch.randn(20, 4)
    loss = sp.matching({"x": sp.moments(X)}, sp.cfm_pairs(0.1))
    for bad in (math.nan, math.inf):
        assert not loss({"x": sp.moments(torch.cat([X, torch.full((1, 4), bad)]))}).isfinite()


def test_alpha_is_judged_stack_by_stack():
    """Pairs by stack, alpha in units of its own norm: layers of 1e-2 and 1e3 are both resolved."""
    real = {name: sp.moments(scale * torch.randn(50, C)) for name, scale, C in (("a", 1e-2, 3), ("b", 1e3, 4))}
    pairs = lambda psi: sp.cfm_pairs(1e-3 * torch.linalg.matrix_norm(psi).max().item())
    assert sp.matching(real, pairs)(real) == 0
