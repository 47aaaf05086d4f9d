"""spectral.py, proved by algebra: every short form against the definition it stands for, in float64 on random input."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectral as sp

f64 = dict(dtype=torch.float64)
FILTERS = {"identity": (sp.identity(), lambda lam: 1.0), "low_pass": (sp.low_pass(), lambda lam: lam),
           "ridge": (sp.ridge(0.3), lambda lam: 1 / (lam + 0.3)),
           "gradient_descent": (sp.gradient_descent(0.2, 5), lambda lam: (1 - 0.2 * lam) ** 5),
           "gradient_descent_sum": (sp.gradient_descent_sum(0.2, 5),
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
    return sp.ffc(torch.randn(n, C, **f64), "plain", **kw)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- features

def test_layouts_agree_and_are_never_guessed():
    x = torch.randn(2, 5, 3, 4)
    tokens, plain = x.flatten(2).mT, x.permute(0, 2, 3, 1).reshape(-1, 5)
    for layout, features in (("tokens", tokens), ("plain", plain)):
        assert torch.allclose(sp.ffc(features, layout), sp.ffc(x), atol=1e-6)
        assert torch.allclose(sp.flc(features, layout=layout), sp.flc(x), atol=1e-6)
    for layout, features in (("map", tokens), ("tokens", x), ("plain", x), ("image", x), ("map", x[:0])):
        with pytest.raises(ValueError, match="layout"):
            sp.ffc(features, layout)


def test_channels_last_rows_are_a_view():
    x = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    assert sp.rows(x).data_ptr() == x.data_ptr() and sp.rows(x).is_contiguous()


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (40, 6, 1, 1), (1, 8, 2, 2)])
def test_covariance_equals_numpy(shape):
    x = torch.randn(shape, **f64) + 0.5
    X = x.permute(0, 2, 3, 1).reshape(-1, shape[1]).numpy()
    assert np.allclose(sp.ffc(x), np.cov(X.T, bias=True), atol=1e-12)
    assert np.allclose(sp.flc(x), X.mean(0), atol=1e-12)


def test_classwise_flc_is_h_transposed_y():
    x, Y = torch.randn(6, 5, 3, 4, **f64), F.one_hot(torch.tensor([0, 1, 2, 0, 1, 3]), 4)
    assert torch.allclose(sp.flc(x, Y), x.mean((2, 3)).T @ Y.double() / 6, atol=1e-14)
    with pytest.raises(ValueError, match="labels must be"):
        sp.flc(x, torch.tensor([0, 1, 2, 0, 1, 3]))
    with pytest.raises(ValueError, match="labels must be"):
        sp.flc(x, Y[:5])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_covariance_gradient(memory_format):
    x = torch.randn(2, 4, 3, 2, **f64).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(sp.covariance, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_covariance_gradient_in_half_precision(dtype):
    """Rounded to the features' precision, but not lost where it is small."""
    x = torch.randn(20, 16, 8, 8).relu().to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    exact = x.detach().double().requires_grad_()
    G, g = 1e-3 * torch.randn(16, 16), 1e-3 * torch.randn(16)
    found, wanted = (torch.autograd.grad(sum((part * weight).sum() for part, weight in zip(sp.covariance(v), (G, g))),
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
    real, mean = sp.covariance((torch.randn(4000, 64) @ torch.diag(torch.logspace(0, -2, 64))).double(), "plain")
    x, grads = x.requires_grad_(), []
    for leaf in (x, x.detach().double().requires_grad_()):
        psi, phi = sp.covariance(leaf, "plain")
        F_real, F_syn = sp.ridge_filter(real.to(psi.dtype), alpha), sp.ridge_filter(psi, alpha)
        value = sp.filter_loss(F_real, F_syn) if loss == "filter" else \
            sp.signal_loss(F_real @ mean[:, None].to(psi.dtype), F_syn @ phi[:, None])
        grads.append(torch.autograd.grad(value, leaf)[0].double().flatten())
    assert F.cosine_similarity(*grads, dim=0) > 0.99


def test_autocast_does_not_reach_the_statistics():
    x = torch.randn(20, 16, 8, 8).relu().to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    exact_psi, exact_phi = sp.covariance(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        psi, phi = sp.covariance(x)
        F_half = sp.ridge_filter(psi, 0.1)
        seen = sp.statistics(x, torch.ones(20, 2))
        eigen = sp.spectral_filter(psi, sp.ridge(0.1))
        per_class = sp.flc(x, torch.ones(20, 2))
    assert psi.dtype == phi.dtype == F_half.dtype == per_class.dtype == torch.float32
    assert relative(psi.double(), exact_psi) < 1e-3 and relative(phi.double(), exact_phi) < 1e-3
    exact_F = torch.linalg.inv(exact_psi + 0.1 * torch.eye(16))
    assert relative(F_half.double(), exact_F) < 1e-3 and relative(eigen.double(), exact_F) < 1e-3
    assert relative(seen.ffc, exact_psi) < 1e-3
    assert relative(per_class.double(), exact_phi[:, None].expand(-1, 2)) < 1e-3


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_streaming_statistics_equal_the_whole_in_any_split_and_order(dtype, tolerance):
    x = (torch.randn(90, 6, 5, 5) + torch.arange(90).view(-1, 1, 1,
                                                          1) / 30).to(dtype)        # a class-ordered set drifts
    Y = F.one_hot(torch.arange(90) // 30, 3)
    whole = sp.statistics(x.double(), Y)
    assert np.allclose(whole.ffc, np.cov(x.double().permute(1, 0, 2, 3).reshape(6, -1), bias=True), atol=1e-12)
    for sizes in ([90], [1] * 90, [7, 50, 33], [40, 49, 1]):
        parts = [sp.statistics(a, b) for a, b in zip(x.split(sizes), Y.split(sizes))]
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
    for a, b in zip(sp.statistics(x, Y)[1:], sp.statistics(x[order], Y[order])[1:]):
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
    with sp.collect_inputs(net, lambda name, m: isinstance(m, nn.Linear), lambda h: sp.ffc(h, "plain")) as features:
        net(x)
    assert features["5"].shape == (72, 72)
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
    assert torch.allclose(sp.spectral_filter(psi, f), expected, atol=1e-10)
    assert torch.allclose(sp.apply_filter(psi, f), expected, atol=1e-10)
    lam = torch.linalg.eigvalsh(psi).clamp(min=0)
    assert torch.allclose(f(lam), torch.as_tensor(scalar(lam), **f64).expand_as(lam), atol=1e-12)


@pytest.mark.parametrize("name", FILTERS)
def test_filters_turn_with_the_features(name):
    psi, Q = random_psi(), torch.linalg.qr(torch.randn(7, 7, **f64)).Q
    f = FILTERS[name][0]
    assert torch.allclose(sp.apply_filter(Q @ psi @ Q.T, f), Q @ sp.apply_filter(psi, f) @ Q.T, atol=1e-10)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("psi", ["identity", "rank-deficient", "random", "batched", "zero"])
def test_filter_gradients(name, psi):
    A = {"identity": torch.eye(4, **f64), "rank-deficient": random_psi(5, 3), "random": random_psi(5),
         "zero": torch.zeros(3, 3, **f64),
         "batched": torch.stack([random_psi(4), torch.eye(4, **f64)])}[psi].requires_grad_()
    f = FILTERS[name][0]
    assert torch.autograd.gradcheck(lambda A: sp.spectral_filter(A, f), A)
    assert torch.autograd.gradcheck(lambda A: sp.apply_filter(A, f), A)


def test_filter_gradients_with_a_number_a_layer():
    """A stack of layers, each with its own rate, as MTT has it."""
    stack = torch.stack([random_psi(4), torch.eye(4, **f64), random_psi(4, 2)]).requires_grad_()
    eta = torch.tensor([[0.1], [0.2], [0.3]], **f64)
    for f in (sp.gradient_descent(eta, 3), sp.gradient_descent_sum(eta, 3)):
        assert torch.autograd.gradcheck(lambda A: sp.spectral_filter(A, f), stack)


def test_a_failed_factorisation_shows():
    """The ridge of a matrix that is not positive definite must not come back as numbers."""
    assert sp.ridge_filter(-torch.eye(3), 0.5).isnan().all()
    mixed = sp.ridge_filter(torch.stack([torch.eye(3), -torch.eye(3)]), 0.5)
    assert mixed[0].isfinite().all() and mixed[1].isnan().all()


def test_repeated_eigenvalues_break_eigh_but_not_the_filter():
    """The reason for Daleckii-Krein: autograd's own way through eigh gives NaN on the identity."""
    A = torch.eye(4, **f64, requires_grad=True)
    lam, U = torch.linalg.eigh(A)
    ((U * (1 / (lam + 0.3))) @ U.mT).sum().backward()
    assert not A.grad.isfinite().all()
    B = torch.eye(4, **f64, requires_grad=True)
    sp.spectral_filter(B, sp.ridge(0.3)).sum().backward()
    assert torch.allclose(B.grad, torch.full((4, 4), -1 / 1.3**2, **f64))


def test_nearly_repeated_eigenvalues():
    """Between 'equal' and 'apart' the divided difference must not lose digits: compare with the ridge's closed form."""
    for gap in 10.0 ** -np.arange(1, 16):
        U = torch.linalg.qr(torch.randn(5, 5, **f64)).Q
        A = (U * torch.tensor([0, gap, 1, 1 + gap, 2], **f64)) @ U.T
        G = torch.randn(5, 5, **f64)
        grads = []
        for function in (lambda A: sp.spectral_filter(A, sp.ridge(0.3)), lambda A: sp.ridge_filter(A, 0.3)):
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
    psi = sp.ffc(x, "plain")
    for alpha in (1.0, 0.1, 0.01):
        assert relative(sp.ridge_filter(psi, alpha), sp.spectral_filter(psi, sp.ridge(alpha))) < 1e-5


def test_ridge_becomes_a_scaled_identity_as_alpha_grows():
    psi = random_psi()
    errors = [relative(alpha * sp.ridge_filter(psi, alpha), torch.eye(7, **f64)) for alpha in (1e2, 1e4, 1e6)]
    assert errors[0] < 0.1 and errors[1] < errors[0] / 50 and errors[2] < errors[1] / 50


@pytest.mark.parametrize("bad", [lambda: sp.ridge(0), lambda: sp.ridge(-1), lambda: sp.ridge(float("nan")),
                                 lambda: sp.gradient_descent(0, 3), lambda: sp.gradient_descent(0.1, 0),
                                 lambda: sp.gradient_descent_sum(0.1, 1.5), lambda: sp.ridge_filter(torch.eye(2), 0),
                                 lambda: sp.spectral_filter(torch.ones(2, 3), sp.identity()),
                                 lambda: sp.emu(None, torch.eye(2), 2),
                                 lambda: sp.emu(None, torch.eye(2), 0), lambda: sp.alpha_schedule(5, 5, 1),
                                 lambda: sp.alpha_schedule(0, 5, 1, "step")])
def test_bad_arguments_raise_and_show_what_was_found(bad):
    with pytest.raises(ValueError, match="found"):
        bad()


# ---- CFM

def test_emu_is_the_mean_of_the_batches():
    batches = [random_psi() for _ in range(5)]
    mean = None
    for b, psi in enumerate(batches, 1):
        mean = sp.emu(mean, psi, b)
    assert torch.allclose(mean, torch.stack(batches).mean(0), atol=1e-14)
    same = None
    for b in range(1, 6):
        same = sp.emu(same, batches[0], b)
    assert torch.allclose(same, batches[0], atol=1e-14)


def test_pool_is_the_statistics_of_all_rows():
    a, b = torch.randn(5, 4, **f64) + 3, torch.randn(9, 4, **f64) * 2
    psi, mean = sp.pool(*sp.covariance(a, "plain"), *sp.covariance(b, "plain"), 9 / 14)
    assert torch.allclose(psi, sp.ffc(torch.cat([a, b]), "plain")) and torch.allclose(mean, torch.cat([a, b]).mean(0))
    both = torch.cat([a, b])
    assert torch.allclose(sp.second_moment(psi, mean), both.T @ both / 14)
    assert torch.autograd.gradcheck(lambda x: sp.pool(*sp.covariance(a, "plain"), *sp.covariance(x, "plain"), 0.6),
                                    b.requires_grad_())


def test_only_the_current_batch_carries_gradient():
    old, new = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    sp.emu(old, new, 4).sum().backward()
    assert old.grad is None and torch.allclose(new.grad, torch.full((2, 2), 0.25))


def test_alpha_schedules():
    for kind in ("cosine", "linear", "constant"):
        assert sp.alpha_schedule(0, 10, 0.7, kind) == 0.7 and sp.alpha_schedule(0, 1, 0.7, kind) == 0.7
    cosine, linear = ([sp.alpha_schedule(k, 10, 1.0, kind) for k in range(10)] for kind in ("cosine", "linear"))
    assert np.allclose(cosine, [(1 + np.cos(np.pi * k / 10)) / 2 for k in range(10)])
    assert np.allclose(linear, 1 - np.arange(10) / 10)
    assert np.all(np.diff(cosine) < 0) and 0 < cosine[-1] < 0.03
    assert sp.alpha_schedule(5, 10, 1.0) == pytest.approx(0.5)
    assert sp.alpha_schedule(9, 10, 1.0, "constant") == 1.0


def test_losses_are_unsquared_norms_per_layer():
    a, b = torch.randn(3, 4, 4, **f64), torch.randn(3, 4, 4, **f64)
    for loss in (sp.filter_loss, sp.signal_loss):
        assert torch.allclose(loss(a, b), torch.stack([torch.sqrt(((x - y) ** 2).sum()) for x, y in zip(a, b)]))
    a.requires_grad_()
    sp.filter_loss(a, a.detach()).sum().backward()         # a perfect match must not give NaN
    assert (a.grad == 0).all()


def test_cfm_loss_end_to_end_gradient():
    """Features -> covariance -> EMU -> ridge -> both losses, against finite differences."""
    real_psi, real_phi, old = random_psi(4), torch.randn(4, 1, **f64), random_psi(4)
    F_real = sp.ridge_filter(real_psi, 0.2)

    def loss(x):
        psi, phi = sp.covariance(x)
        F_syn = sp.ridge_filter(sp.emu(old, psi, 3), 0.2)
        return sp.filter_loss(F_real, F_syn) + sp.signal_loss(F_real @ real_phi, F_syn @ phi[:, None])
    assert torch.autograd.gradcheck(loss, torch.randn(2, 4, 2, 2, **f64, requires_grad=True))
