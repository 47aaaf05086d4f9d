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
import threading
from contextlib import contextmanager
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn

LAYOUTS = {"map": "b c ... -> (b ...) c", "tokens": "b ... c -> (b ...) c", "plain": "b c -> b c",
           "sequence": "t b c -> (b t) c"}


# ---------------------------------------------------------------------------------------------------------------------
# Features: the inputs of a frozen network's modules

def is_main_convolution(name, module):
    """The default choice of layers: every convolution but the shortcut ("downsample") ones."""
    return isinstance(module, nn.Conv2d) and "downsample" not in name and "shortcut" not in name


@contextmanager
def collected(network, select, reduce, outputs):
    """The hooks behind collect_inputs and collect_moments: {name: reduce(name, module, features)}."""
    layers, handles, owner = {}, [], threading.get_ident()

    def begin(module, args):
        if threading.get_ident() == owner:
            layers.clear()

    def hook_for(name):
        def hook(module, args, kwargs, output=None):
            if threading.get_ident() != owner:
                return
            features = output if outputs else next(iter((*args, *kwargs.values())), None)
            features = features[0] if outputs and isinstance(features, tuple) else features
            if not torch.is_tensor(features):
                raise ValueError(f"module {name!r}: its {'output' if outputs else 'first input'} is a "
                                 f"{type(features).__name__}, not a tensor: leave it out of select")
            if name in layers:
                raise ValueError(f"module {name!r} runs twice in a forward pass: leave it out of select")
            layers[name] = reduce(name, module, features)
        return hook

    try:
        handles.append(network.register_forward_pre_hook(begin))
        for name, module in network.named_modules():
            if select(name, module):
                register = module.register_forward_hook if outputs else module.register_forward_pre_hook
                handles.append(register(hook_for(name), with_kwargs=True))
        if len(handles) == 1:
            raise ValueError("select: no module of the network is selected")
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def collect_inputs(network, select=is_main_convolution, transform=lambda features: features, outputs=False):
    """Collect `transform(input)` of every selected module during forward passes; the hooks are gone on leaving.

        with collect_inputs(network) as features:
            network(images)
        features["layer1.0.conv1"]                          # [B, C, H, W]

    The dict is filled anew by each forward pass, in the order of execution. select(name, module) -> bool. outputs: what
    a module returns instead. Raises ValueError if nothing is selected, or if a module runs twice.
    """
    return collected(network, select, lambda name, module, features: transform(features), outputs)


def collect_moments(network, select=is_main_convolution, labels=None, layout=None, outputs=False):
    """collect_inputs of each layer's `moments`, {name: Statistics}, with the layout inferred from the module."""
    def reduce(name, module, features):
        return moments(features, labels, layout or layout_of(name, module, features))
    return collected(network, select, reduce, outputs)


def layout_of(name, module, features):
    """The layout of what a module takes or gives. Raises ValueError where it could be several."""
    if features.ndim == 2:
        return "plain"
    if isinstance(module, nn.modules.conv._ConvNd) and features.ndim == len(module.kernel_size) + 2:
        return "map"
    if isinstance(module, nn.Linear) or isinstance(module, nn.RNNBase) and features.ndim == 3:
        return "tokens" if getattr(module, "batch_first", True) else "sequence"
    raise ValueError(f"layout of module {name!r} ({type(module).__name__}, {tuple(features.shape)}) is not certain: say "
                     f"layout = one of {', '.join(LAYOUTS)}")


def rows(features, layout=None):
    """Feature vectors as the rows of one matrix [n, C].

    layout: "map" [B, C, ...] with one to three axes of pixels, "tokens" [B, ..., C] (tokens, or channels-last maps),
    "sequence" [T, B, C], "plain" [B, C]. Inferred for two axes (plain) and four (map). A view, not a copy, of maps in
    channels-last memory, tokens and plain features. Raises ValueError on an unknown layout, or another number of axes.
    """
    layout = layout or {2: "plain", 4: "map"}.get(features.ndim)
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} found for {tuple(features.shape)}, must be one of {', '.join(LAYOUTS)}")
    axes = {"map": (3, 4, 5), "tokens": (3, 4, 5), "plain": (2,), "sequence": (3,)}[layout]
    if features.ndim not in axes or features.numel() == 0:
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


class Statistics(NamedTuple):
    """What is kept of a layer: of a batch (differentiable), of a set, of the finished batches."""
    count: int                              # n, feature vectors seen
    mean: torch.Tensor                      # [C]
    ffc: torch.Tensor                       # [C, C], covariance
    flc: torch.Tensor | None = None         # [C, K], H^T Y / B
    share: torch.Tensor | None = None       # [K], 1^T Y / B, the classes' shares

    def to(self, *args):
        """The same on another device or in another precision: Tensor.to of each part."""
        return Statistics(self.count, *(part if part is None else part.to(*args) for part in self[1:]))


def moments(features, labels=None, layout=None):
    """The Statistics of one batch, with gradient: Psi = X^T X / n - m m^T and m = X^T 1 / n, with X = rows(features).

    labels: Y [B, K], one-hot or soft, for the class-wise FLC, H^T Y / B (Eq. 15), with H [B, C] the features averaged
    over pixels or tokens. X is neither copied nor centred, so in float32 the error of Psi grows with |m|^2 / variance.
    Steps out of autocast. Raises ValueError if labels are not [B, K].
    """
    with torch.autocast(features.device.type, enabled=False):
        X = rows(features, layout)
        psi, mean = _Covariance.apply(X)
        return Statistics(len(X), mean, psi, *classwise(rows(features, layout), labels, layout, features))


def classwise(X, labels, layout, features):
    """(H^T Y / B [C, K], 1^T Y / B [K]), or two None without labels."""
    if labels is None:
        return None, None
    B = features.shape[1 if layout == "sequence" else 0]
    if labels.ndim != 2 or len(labels) != B:
        raise ValueError(f"labels must be [B, K] with B = {B} (see one_hot), found {tuple(labels.shape)}")
    H = rearrange(single(X), "(b p) c -> b p c", b=B).mean(1)
    Y = labels.to(H.dtype)
    return H.T @ Y / B, Y.mean(0)


def statistics(features, labels=None, layout=None):
    """The Statistics of one batch in float64, without gradient, to be merged into those of a whole set.

    Centred first (this pass can afford the copy), products in the features' precision over blocks of rows, their sum in
    float64: a float32 sum over 10^5 rows in one go was off by 2e-5.
    """
    X = single(rows(features.detach(), layout))
    with torch.autocast(X.device.type, enabled=False):
        mean = X.mean(0, dtype=torch.float64)
        centred = X - mean.to(X.dtype)
        psi = sum((block.T @ block).double() for block in centred.split(4096)) / len(X)
        return Statistics(len(X), mean, psi, *classwise(X, labels, layout, features)).to(torch.float64)


def second_moment(psi, mean):
    """H^T H / n = Psi + m m^T [..., C, C], the uncentred FFC, from the covariance and the mean [..., C].

    Centred or not: Eq. 15-18 (CFM) and covariance matching centre, so a direction counts by how much features vary
    along it; a linear head without bias (Eq. 4-14: DC, MTT, FrePo) sees H^T H / n, in which the mean is one more
    direction, behind a ReLU by far the largest.
    """
    return psi + mean.unsqueeze(-1) * mean.unsqueeze(-2)


def merge(a, b):
    """The Statistics of two disjoint sets together, exactly, in any split and order:
        Psi = (1 - w) Psi_a + w Psi_b + w (1 - w) d d^T,  d = m_b - m_a,  w = n_b / n  (Chan, Golub, LeVeque 1979).
    Averaging covariances alone loses the last term, what lies between the means. Differentiable."""
    n, w, d = a.count + b.count, b.count / (a.count + b.count), b.mean - a.mean
    psi = torch.lerp(a.ffc, b.ffc, w) + w * (1 - w) * d.unsqueeze(-1) * d.unsqueeze(-2)
    return Statistics(n, a.mean + w * d, psi, *(average(x, y, w) for x, y in zip(a[3:], b[3:])))


def emu(a, b, step):
    """Eq. 17, exponential moving update: Psi^b = (1 - 1/b) Psi^(b-1) + (1/b) Psi_hat^b, b = 2, 3, ...: the mean of the
    statistics of the batches so far.

    A mean of covariances drops what lies between the batches' means (1-3 % of the trace for ten images) and takes
    unequal batches for equal; `merge` does neither."""
    if step < 2:
        raise ValueError(f"step counts batches, this one included: 2 or more, found {step}")
    return Statistics(a.count + b.count, *(average(x, y, 1 / step) for x, y in zip(a[1:], b[1:])))


def average(x, y, w):
    return None if x is None or y is None else torch.lerp(x, y, w)


def join(memory, layers, update=merge):
    """Layer by layer, the finished batches' {name: Statistics} (none: {}) updated by those of the current batch."""
    return {name: update(memory[name], seen) if memory else seen for name, seen in layers.items()}


@torch.no_grad()
def real_statistics(network, batches, K, select=is_main_convolution, layout=None, forward=None):
    """One pass over (images, labels [B]) batches: {name: Statistics} of the whole set, in float64.

    forward(images, labels): what runs the network, if not network(images): under autocast, or to keep the logits.
    Raises ValueError if the network is in training mode or there is no batch.
    """
    layers = {}
    if network.training:
        raise ValueError("network is in training mode: its statistics would change on the way: call network.eval()")
    for images, labels in batches:
        Y = nn.functional.one_hot(labels, K).to(images.device)

        def reduce(name, module, features):
            return statistics(features, Y, layout or layout_of(name, module, features))
        with collected(network, select, reduce, False) as seen:
            forward(images, labels) if forward else network(images)
        layers = join(layers, seen)
    if not layers:
        raise ValueError("batches: none found")
    return layers


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


def cfm_pairs(alpha):
    """The pairs (g, f) of CFM, Eq. 19-20; alpha None: of its low-pass ablation LFM, f = lambda."""
    f = low_pass() if alpha is None else ridge(alpha)
    return [("I", f), ("x", f)]


def filtered(layers, pairs, signal, centred, side):
    """(pairs, what each of them compares) for a stack of layers [Statistics, ...] of equal C: f(Psi) [L, C, C], its
    diagonal [L, C, 1], or f(Psi) Phi [L, C, K]. side: 0 real, 1 synthetic."""
    mean, psi, flc, share = (None if parts[0] is None else torch.stack(parts) for parts in
                             zip(*(layer[1:] for layer in layers)))
    psi = psi if centred else second_moment(psi, mean)
    if signal == "mean":
        phi = mean.unsqueeze(-1)
    else:
        phi = flc / (share * share.shape[-1]).clamp(min=torch.finfo(share.dtype).tiny).unsqueeze(-2)
    pairs, filters, out = pairs(psi) if callable(pairs) else pairs, {}, []
    for g, *both in pairs:
        f = both[min(side, len(both) - 1)]
        if f not in filters:                               # CFM's two pairs share one factorisation
            filters[f] = apply_filter(psi, f)
        out.append(filters[f] @ phi if g == "x" else filters[f] if g == "I" else filters[f].diagonal(0, -2, -1)[..., None])
    return pairs, out


def matching(real, pairs, signal="mean", centred=True):
    """The objective: loss(layers, memory={}, update=merge) -> sum over layers and pairs of
        || f(Psi) g(Phi) - f_s(Psi_s) g(Phi_s) ||  (Eq. 1, 19),  _s: {name: Statistics} of a batch, and of those before it.

    real: {name: Statistics}; its side is filtered once, here; layers of equal C go together. pairs: (g, f), or
    (g, f_real, f_syn), or a function of a stack's real Psi [L, C, C] that returns them. g: "I" matches filters f(Psi),
    "diag" their diagonals, "x" signals f(Psi) Phi. signal: Phi is the mean [C], or with "class" [C, K] the classes'
    means over K, whatever their sizes, of the classes in the batch. centred: Psi is the covariance, else H^T H / n.
    """
    stacks = {}
    for name, layer in real.items():
        stacks.setdefault(len(layer.mean), []).append(name)
    targets = [filtered([real[name] for name in names], pairs, signal, centred, 0) for names in stacks.values()]

    def loss(layers, memory=None, update=merge):
        if layers.keys() != real.keys():
            raise ValueError(f"layers: {sorted(layers)} found, the real side has {sorted(real)}")
        joined, total = join(memory, layers, update), 0
        with torch.autocast(next(iter(layers.values())).mean.device.type, enabled=False):
            for names, (chosen, wanted) in zip(stacks.values(), targets):
                found = filtered([joined[name] for name in names], chosen, signal, centred, 1)[1]
                for (g, *_), a, b in zip(chosen, wanted, found):
                    a = a.to(b.dtype)
                    if g == "x" and signal == "class":
                        here = torch.stack([layers[name].share for name in names]).unsqueeze(-2) > 0
                        a, b = a * here, b * here
                    total = total + (signal_loss if g == "x" else filter_loss)(a, b).sum()
        return total
    return loss
