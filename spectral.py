"""spectral.py: dataset distillation as spectral filtering, in one file to read from top to bottom and to copy.

"Understanding Dataset Distillation via Spectral Filtering" (Bo, Liu, Wang; ICLR 2026; arXiv 2503.01212) shows that many
distillation objectives compare two matrices of a frozen network's features, after the same spectral filter:

    min over X_s  || f(FFC) g(FLC) - f(FFC_s) g(FLC_s) ||,   g = I (match filters) or g(x) = x (match signals)  (Eq. 1)

Letters, fixed for the whole project:
    B batch   C channels   H W pixels   T tokens   K classes   N = K * IPC synthetic images   n rows of a feature matrix
    FFC  feature-feature correlation, Psi [C, C]: which directions the features share
    FLC  feature-label correlation, Phi [C] or [C, K]: where in those directions the classes lie
    FFC = U diag(lambda) U^T with lambda >= 0, and f(FFC) := U diag(f(lambda)) U^T
Large lambda is low frequency (colour, coarse shape), small lambda is high frequency (texture, diversity).
Suffixes: _real for the real set, _syn for the synthetic one.

Needs torch and einops. No I/O, no global state, no device choice: everything happens where the arguments are.
"""
import math
from contextlib import contextmanager
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn

LAYOUTS = {"map": "b c h w -> (b h w) c", "tokens": "b t c -> (b t) c", "plain": "b c -> b c"}


# ---------------------------------------------------------------------------------------------------------------------
# Features: the inputs of a frozen network's convolutions

def is_main_convolution(name, module):
    """The default choice of layers: every convolution but the shortcut ("downsample") ones."""
    return isinstance(module, nn.Conv2d) and "downsample" not in name and "shortcut" not in name


@contextmanager
def collect_inputs(network, select=is_main_convolution, transform=lambda features: features):
    """Collect `transform(input)` of every selected module during forward passes; the hooks are gone on leaving.

        with collect_inputs(network) as features:
            network(images)
        features["layer1.0.conv1"]                          # [B, C, H, W]

    The dict is filled anew by each forward pass, in the order of execution. A `transform` such as `moments` keeps the
    statistics instead of the features. select(name, module) -> bool. Raises ValueError if it selects nothing.
    """
    features, handles = {}, []

    def hook_for(name):
        def hook(module, inputs):
            features[name] = transform(inputs[0])
        return hook

    try:
        for name, module in network.named_modules():
            if select(name, module):
                handles.append(module.register_forward_pre_hook(hook_for(name)))
        if not handles:
            raise ValueError("collect_inputs: no module of the network is selected")
        yield features
    finally:
        for handle in handles:
            handle.remove()


def rows(features, layout="map"):
    """Feature vectors as the rows of one matrix [n, C].

    layout: "map" [B, C, H, W] -> n = B*H*W, "tokens" [B, T, C] -> n = B*T, "plain" [B, C] -> n = B. A view, not a copy,
    of channels-last maps, tokens and plain features. Raises ValueError on an unknown layout, or another number of axes.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} found, must be one of {', '.join(LAYOUTS)}")
    if features.ndim != len(LAYOUTS[layout].split("->")[0].split()) or features.numel() == 0:
        raise ValueError(f"layout {layout!r} takes {LAYOUTS[layout].split(' ->')[0]}, found {tuple(features.shape)}")
    return rearrange(features, LAYOUTS[layout])


def single(x):
    """x in float32 or better: statistics, factorisations and losses never use half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---------------------------------------------------------------------------------------------------------------------
# FFC and FLC (Eq. 15-16)

class _Covariance(torch.autograd.Function):
    """X [n, C] -> covariance [C, C] and mean [C], in float32 or better. Autograd's own backward would multiply X twice
    and keep a centred copy; written out, dL/dX = X A + 1 b^T with A = (G + G^T)/n and b = g/n - A mean is one product
    with the X that is there. Of bfloat16 features no float32 copy is kept. The product is formed in float32 all the
    same and only its result rounded: behind a filter at small alpha, A holds entries of order 1/alpha^2 along the weak
    directions of X, where X hardly lies; they cancel in X A, but A rounded to 8 bits first does not."""

    @staticmethod
    def forward(ctx, X):
        exact = single(X)
        mean = exact.mean(0)
        ctx.save_for_backward(X, mean)
        return torch.addmm(torch.outer(mean, mean), exact.T, exact, beta=-1, alpha=1 / len(X)), mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G, g):
        X, mean = ctx.saved_tensors
        A = (G + G.T) / len(X)
        return torch.addmm(g / len(X) - A @ mean, single(X), A).to(X.dtype)


def covariance(features, layout="map"):
    """(FFC, mean) in one go: Psi = X^T X / n - m m^T [C, C] and m = X^T 1 / n [C], with X = rows(features).

    X is neither copied nor centred, so in float32 its error grows with |m|^2 / variance; features behind
    a ReLU lose nothing by it. Steps out of autocast. Differentiable.
    """
    with torch.autocast(features.device.type, enabled=False):
        return _Covariance.apply(rows(features, layout))


def ffc(features, layout="map"):
    """FFC Psi [C, C] (Eq. 15): biased covariance of the feature vectors. It stands in for H^T H, which grows with n.

    Centred or not: Eq. 15-18 (CFM) and covariance matching centre, so a direction counts by how much features vary
    along it; a linear head without bias (Eq. 4-14: DC, MTT, FrePo) sees H^T H / n = Psi + m m^T (`second_moment`), in
    which the mean is one more direction, behind a ReLU by far the largest.
    """
    return covariance(features, layout)[0]


def second_moment(psi, mean):
    """H^T H / n = Psi + m m^T [..., C, C], the uncentred FFC, from the covariance and the mean [..., C]."""
    return psi + mean.unsqueeze(-1) * mean.unsqueeze(-2)


def flc(features, labels=None, layout="map"):
    """FLC Phi (Eq. 16): the mean feature vector [C], or with labels the class-wise form H^T Y / B [C, K] (Eq. 15).

    labels: Y [B, K], one-hot or soft. H [B, C]: the features, averaged over pixels or tokens.
    Raises ValueError if labels are not [B, K].
    """
    if labels is None:
        return single(rows(features, layout)).mean(0)
    if labels.ndim != 2 or len(labels) != len(features):
        raise ValueError(f"labels must be [B, K] with B = {len(features)} (see one_hot), found {tuple(labels.shape)}")
    H = single(rows(features, layout))
    H = rearrange(H, "(b p) c -> b p c", b=len(features)).mean(1)
    with torch.autocast(H.device.type, enabled=False):
        return H.T @ labels.to(H.dtype) / len(H)


class Statistics(NamedTuple):
    """What one pass over a set leaves of a layer, in float64."""
    count: int                  # n, feature vectors seen
    mean: torch.Tensor          # [C]
    ffc: torch.Tensor           # [C, C]
    flc: torch.Tensor           # [C, K]


def statistics(features, labels, layout="map"):
    """The Statistics of one batch, without gradient. labels: Y [B, K].

    Centred first (this pass can afford the copy), products in the features' precision over blocks of rows, their sum in
    float64: a float32 sum over 10^5 rows in one go was off by 2e-5.
    """
    X = single(rows(features.detach(), layout))
    with torch.autocast(X.device.type, enabled=False):
        mean = X.mean(0, dtype=torch.float64)
        centred = X - mean.to(X.dtype)
        psi = sum((block.T @ block).double() for block in centred.split(4096)) / len(X)
        return Statistics(len(X), mean, psi, flc(features.detach(), labels, layout).double())


def pool(psi_a, mean_a, psi_b, mean_b, w):
    """Covariance and mean of two disjoint sets together, exactly, the second of which holds a share w of the rows:
        Psi = (1 - w) Psi_a + w Psi_b + w (1 - w) d d^T,  d = m_b - m_a  (Chan, Golub, LeVeque 1979).
    Averaging covariances alone loses the last term, what lies between the means. Differentiable."""
    shift = mean_b - mean_a
    between = w * (1 - w) * shift.unsqueeze(-1) * shift.unsqueeze(-2)
    return torch.lerp(psi_a, psi_b, w) + between, mean_a + w * shift


def merge(a, b):
    """The Statistics of two disjoint sets together: any split into batches, in any order, gives the global ones."""
    n, w = a.count + b.count, b.count / (a.count + b.count)
    psi, mean = pool(a.ffc, a.mean, b.ffc, b.mean, w)
    return Statistics(n, mean, psi, torch.lerp(a.flc, b.flc, w))


# ---------------------------------------------------------------------------------------------------------------------
# Filters f(FFC) = U f(Lambda) U^T. A filter is a function of the eigenvalues; these are the named ones. Where f(FFC)
# can be had without eigenvalues, the filter carries that shortcut as f.matrix, and `apply_filter` takes it.

def identity():
    """f = 1: the all-pass filter, f(FFC) = I (DM)."""
    def f(lam):
        return torch.ones_like(lam)
    f.matrix = lambda psi: torch.eye(psi.shape[-1], dtype=psi.dtype, device=psi.device).expand_as(psi)
    return f


def low_pass():
    """f = lambda: f(FFC) = FFC (SRe2L, DC, CovM; the low-pass ablation)."""
    def f(lam):
        return lam
    f.matrix = lambda psi: psi
    return f


def ridge(alpha):
    """f = 1 / (lambda + alpha), high-pass: flat below alpha, falling above (FrePo, CFM). Its matrix form is a Cholesky
    factorisation, several times faster than eigh. ValueError unless alpha > 0."""
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0, found {alpha}")

    def f(lam):
        return 1 / (lam + alpha)
    f.matrix = lambda psi: _Ridge.apply(psi, alpha)
    return f


def gradient_descent(eta, p):
    """f = (1 - eta lambda)^p: what p steps of gradient descent at rate eta leave of the start (MTT, Eq. 8).

    Stable for eta * lambda <= 2. eta: a number, or [..., 1] for one a layer. ValueError unless eta > 0 and p >= 1."""
    check_descent(eta, p)
    return lambda lam: (1 - eta * lam) ** p


def gradient_descent_sum(eta, p):
    """f = eta sum_{i<p} (1 - eta lambda)^i = (1 - (1 - eta lambda)^p) / lambda: what the p steps learn (MTT, Eq. 8).

    By Horner's rule, right at lambda = 0 too, where it is eta p. ValueError unless eta > 0 and p >= 1."""
    check_descent(eta, p)

    def f(lam):
        total = torch.zeros_like(lam)
        for _ in range(p):
            total = total * (1 - eta * lam) + eta
        return total
    return f


def check_descent(eta, p):
    if not (torch.as_tensor(eta > 0).all() and p >= 1 and p == int(p)):
        raise ValueError(f"eta must be > 0 and p a whole number >= 1, found eta = {eta}, p = {p}")


class _SpectralFilter(torch.autograd.Function):
    """Autograd's eigh divides by lambda_i - lambda_j and is useless at repeated eigenvalues. The derivative of f(Psi)
    itself is finite (Daleckii and Krein 1965):
        d f(Psi) = U (Gamma o (U^T dPsi U)) U^T,  Gamma_ij = (f(l_i) - f(l_j)) / (l_i - l_j),  Gamma_ii = f'(l_i)."""

    @staticmethod
    def forward(ctx, psi, f):
        lam, U = torch.linalg.eigh(psi)
        ctx.f = f
        ctx.save_for_backward(lam, U)
        return (U * f(lam).unsqueeze(-2)) @ U.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G):
        lam, U = ctx.saved_tensors
        a, b = lam.unsqueeze(-1), lam.unsqueeze(-2)

        def slope(x):                                      # f' by autograd; 0 where f is constant
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                value = ctx.f(x)
                return torch.autograd.grad(value.sum(), x)[0] if value.requires_grad else torch.zeros_like(x)

        # Gamma_ij is the mean of f' between the two eigenvalues: a difference of f, or by Simpson's rule where they are
        # so close that the rule's last correction is below the difference's rounding. Both must then agree within that
        # rounding: f' can look alike at both ends and the middle and hide a narrow band or a step between them.
        ends, value = slope(lam), ctx.f(lam)
        trapezoid = (ends.unsqueeze(-1) + ends.unsqueeze(-2)) / 2
        middle = ((a + b) / 2).flatten(-2)                 # [..., C * C]: f may hold one number a layer, [L, 1]
        correction = 2 / 3 * (slope(middle).view_as(trapezoid) - trapezoid)
        gap = torch.where(a == b, 1, a - b)
        difference = (value.unsqueeze(-1) - value.unsqueeze(-2)) / gap
        unsure = value.abs() + (lam * ends).abs()          # f's own rounding, and that of its argument
        rounding = torch.finfo(lam.dtype).eps * (unsure.unsqueeze(-1) + unsure.unsqueeze(-2)) / gap.abs()
        agree = (trapezoid + correction - difference).abs() <= 4 * rounding
        close = (a == b) | (agree & (correction.abs() <= rounding))
        gamma = torch.where(close, trapezoid + correction, difference)
        return U @ (gamma * (U.mT @ G @ U)) @ U.mT, None


class _Ridge(torch.autograd.Function):
    """F = (Psi + alpha I)^-1 by Cholesky; dF = -F dPsi F, so the backward is two products and no factorisation."""

    @staticmethod
    def forward(ctx, psi, alpha):
        eye = torch.eye(psi.shape[-1], dtype=psi.dtype, device=psi.device)
        factor, info = torch.linalg.cholesky_ex(psi + alpha * eye)   # _ex does not wait for the GPU, nor raise:
        factor = torch.where((info == 0)[..., None, None], factor, math.nan)     # so that a failure shows in the loss
        F = torch.cholesky_inverse(factor)
        ctx.save_for_backward(F)
        return F

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, G):
        F, = ctx.saved_tensors
        return -F @ ((G + G.mT) / 2) @ F, None


def spectral_filter(ffc, f):
    """f(Psi) = U diag(f(lambda)) U^T for symmetric ffc [..., C, C] and any differentiable f on the eigenvalues.

    Differentiable in ffc, at repeated eigenvalues too (not in what f holds); only the symmetric part of ffc counts.
    Rounding can put a zero eigenvalue at -1e-8 of the largest, so f must be defined there too.
    Raises ValueError unless the last two axes are equal.
    """
    with torch.autocast(ffc.device.type, enabled=False):
        return _SpectralFilter.apply(symmetric(ffc), f)


def apply_filter(ffc, f):
    """f(Psi) [..., C, C] by the cheapest way there is: f.matrix where f has it, else spectral_filter."""
    if not hasattr(f, "matrix"):
        return spectral_filter(ffc, f)
    with torch.autocast(ffc.device.type, enabled=False):
        return f.matrix(symmetric(ffc))


def ridge_filter(ffc, alpha):
    """(Psi + alpha I)^-1 [..., C, C] (Eq. 18) by Cholesky, recover.py's main job. ValueError unless alpha > 0."""
    return apply_filter(ffc, ridge(alpha))


def symmetric(ffc):
    """(Psi + Psi^T) / 2 in float32 or better. Raises ValueError unless ffc is [..., C, C]."""
    if ffc.ndim < 2 or ffc.shape[-1] != ffc.shape[-2]:
        raise ValueError(f"ffc must be [..., C, C], found {tuple(ffc.shape)}")
    ffc = single(ffc)
    return (ffc + ffc.mT) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Curriculum Frequency Matching

def emu(previous, current, b):
    """Eq. 17, exponential moving update: Psi^b = (1 - 1/b) Psi^(b-1) + (1/b) Psi_hat^b, b = 1, 2, ...: the mean of the
    statistics of the batches so far. Only `current` carries gradient. previous may be None at b = 1.

    A mean of covariances drops what lies between the batches' means (1-3 % of the trace for ten images) and takes
    unequal batches for equal; `pool` does neither."""
    if b < 1 or (b > 1 and previous is None):
        raise ValueError(f"emu counts batches from 1 and needs the previous mean from 2 on, found b = {b}")
    return current if b == 1 else torch.lerp(previous.detach(), current, 1 / b)


def alpha_schedule(k, T, alpha_max, kind="cosine"):
    """Eq. 18: alpha_k = alpha_max (1 + cos(pi k / T)) / 2 for k = 0 .. T-1, from alpha_max (low frequencies pass)
    toward 0 (high ones do). kind: cosine, or the ablations linear, alpha_max (1 - k/T), and constant. ValueError
    otherwise."""
    if not 0 <= k < T or kind not in ("cosine", "linear", "constant"):
        raise ValueError(f"0 <= k < T and kind cosine, linear or constant; found k = {k}, T = {T}, kind = {kind!r}")
    return alpha_max * {"cosine": (1 + math.cos(math.pi * k / T)) / 2, "linear": 1 - k / T, "constant": 1.0}[kind]


def filter_loss(filter_real, filter_syn):
    """Eq. 19, g = I: || f(Psi) - f(Psi_s) ||_Frobenius, of [C, C] or [L, C, C]; -> scalar or [L]. Not squared."""
    return torch.linalg.vector_norm(filter_real - filter_syn, dim=(-2, -1))


def signal_loss(filtered_real, filtered_syn):
    """Eq. 19, g(x) = x: || f(Psi) Phi - f(Psi_s) Phi_s ||_2 of signals [..., C, K] (K = 1: means). Not squared."""
    return torch.linalg.vector_norm(filtered_real - filtered_syn, dim=(-2, -1))
