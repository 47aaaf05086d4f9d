"""spectral.py: dataset distillation as spectral filtering, in one file to read from top to bottom and to copy.

"Understanding Dataset Distillation via Spectral Filtering" (Bo, Liu, Wang; ICLR 2026; arXiv 2503.01212) shows that many
distillation objectives compare two matrices of a frozen network's features, after the same spectral filter:

    min over X_s  || f(FFC) g(FLC) - f(FFC_s) g(FLC_s) ||,   g = I (match filters) or g(x) = x (match signals)  (Eq. 1)

Letters, fixed for the whole project:
    B batch  C channels  H W pixels  T tokens  K classes  N = K * IPC synthetic images  L layers of equal C, stacked
    X [n, C]    feature vectors as rows, one for every pixel or token; H [B, C]: averaged over an image's
    Y [B, K]    labels, one-hot or soft
    FFC         feature-feature correlation, Psi [C, C]: which directions the features share (biased covariance)
    FLC         feature-label correlation, Phi [C] or [C, K]: where in those directions the classes lie
    f(FFC)      U diag(f(lambda)) U^T of FFC = U diag(lambda) U^T, lambda >= 0
    pairs       [(g, f), ...]: what is compared (Theorem 1); CFM's by `cfm_pairs`, other methods' in baselines.py
Large lambda is low frequency (colour, coarse shape), small lambda is high frequency (texture, diversity).
Units are the features': FFC has their square, and a ridge's alpha too. Suffixes: _real, and _syn or _s for our images.

All of it: the statistics of a loader, an objective, and the gradient of some images.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    >>> loader = [(torch.rand(20, 3, 9, 9), torch.arange(20) % 5) for _ in range(3)]
    >>> images = torch.rand(5, 3, 9, 9, requires_grad=True)

    >>> real = real_statistics(network, loader, K=5)                    # once
    >>> loss = matching(real, cfm_pairs(alpha=0.1))                     # once for each alpha
    >>> with collect_inputs(network, transform=moments) as layers:      # around the steps
    ...     logits = network(images)
    ...     loss(layers).backward()
    >>> images.grad.shape
    torch.Size([5, 3, 9, 9])

Needs torch and einops. No I/O, no global state, no device choice: everything happens where the arguments are. Errors in the
arguments are ValueErrors that name them; features that are not finite show as a loss that is not.
"""
from __future__ import annotations

import math
import threading
from contextlib import contextmanager
from typing import Callable, Iterable, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["is_main_convolution", "collect_inputs", "Statistics", "moments", "merge", "join", "real_statistics",
           "identity", "low_pass", "ridge", "gradient_descent", "gradient_descent_sum", "spectral_filter", "ridge_filter",
           "alpha_schedule", "cfm_pairs", "matching"]
LAYOUTS = {"plain": "b c -> b c", "map": "b c ... -> (b ...) c", "tokens": "b ... c -> (b ...) c",
           "sequence": "t b c -> (b t) c"}


# ---------------------------------------------------------------------------------------------------------------------
# Features: the inputs of a frozen network's modules

def is_main_convolution(name: str, module: nn.Module) -> bool:
    """The default choice of layers: every convolution but the shortcut ("downsample") ones.
    >>> is_main_convolution("layer1.0.conv1", nn.Conv2d(3, 8, 3)), is_main_convolution("fc", nn.Linear(3, 8))
    (True, False)"""
    return isinstance(module, nn.Conv2d) and "downsample" not in name and "shortcut" not in name


@contextmanager
def collect_inputs(network: nn.Module, select: Callable = is_main_convolution, transform: Callable = lambda x: x,
                   labels: Tensor | None = None, layout: str | None = None, outputs: bool = False):
    """Context: a dict {name: transform(input)} of the selected modules, filled anew by each call of network.

    select(name, module) -> bool. A module's input is its first argument; outputs: what it returns instead (the first of
    several). transform: a function of the features, or `moments`, which is given labels and layout; without a layout it
    is the module's: convolutions take maps, linear layers have channels last, recurrent ones as their batch_first says,
    two axes are plain. The hooks see this thread's calls only and are gone on leaving. ValueError if select finds
    nothing, or a module that runs twice, takes no tensor, or whose layout is uncertain.
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3))
    >>> with collect_inputs(network) as features, collect_inputs(network, transform=moments) as layers:
    ...     logits = network(torch.rand(2, 3, 9, 9))
    >>> features["0"].shape, layers["0"].ffc.shape
    (torch.Size([2, 3, 9, 9]), torch.Size([3, 3]))"""
    layers, handles, owner, grad = {}, [], threading.get_ident(), []

    def begin(module, args):
        if threading.get_ident() == owner:
            layers.clear()
            grad[:] = [torch.is_grad_enabled()]

    def hook_for(name):
        def hook(module, args, kwargs, output=None):
            again = torch._C._current_graph_task_id() != -1   # a checkpoint in backward: it must save the same tensors
            if threading.get_ident() != owner and not again:
                return
            x = output if outputs else next(iter((*args, *kwargs.values())), None)
            x = x[0] if outputs and isinstance(x, tuple) else x
            for wrong, what in ((not torch.is_tensor(x), f"takes or gives a {type(x).__name__}"),
                                (name in layers and not again, "runs twice in a forward pass"),
                                (grad == [True] and not torch.is_grad_enabled(),
                                 "runs without gradient in a network with one (a checkpoint needs use_reentrant=False)")):
                if wrong:
                    raise ValueError(f"select: module {name!r} {what}: leave it out")
            value = moments(x, labels, layout or layout_of(name, module, x)) if transform is moments else transform(x)
            layers.setdefault(name, value)
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


def layout_of(name, module, x):
    if x.ndim == 2:
        return "plain"
    if isinstance(module, nn.modules.conv._ConvNd) and x.ndim == len(module.kernel_size) + 2:
        return "map"
    if isinstance(module, nn.Linear) or isinstance(module, nn.RNNBase) and x.ndim == 3:
        return "tokens" if getattr(module, "batch_first", True) else "sequence"
    raise ValueError(f"layout of module {name!r}, a {type(module).__name__} with {tuple(x.shape)}, is not certain: say "
                     f"which of {', '.join(LAYOUTS)}")


def rows(features, layout=None):
    """Feature vectors as the rows of one matrix [n, C]. layout: "plain" [B, C]; "map" [B, C, ...] with one to three axes
    of pixels; "tokens" [B, ..., C], channels-last maps included; "sequence" [T, B, C]. None: plain for two axes, map for
    four. A view of channels-last memory. ValueError on another layout or number of axes, or without features."""
    layout = layout or {2: "plain", 4: "map"}.get(features.ndim)
    axes = {"plain": (2,), "map": (3, 4, 5), "tokens": (3, 4, 5), "sequence": (3,)}.get(layout, ())
    if features.ndim not in axes or features.numel() == 0:
        raise ValueError(f"layout {layout!r} found for features {tuple(features.shape)}, must be one of {LAYOUTS}")
    return rearrange(features, LAYOUTS[layout])


def single(x):                                             # statistics and filters never use half precision
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---------------------------------------------------------------------------------------------------------------------
# FFC and FLC (Eq. 15-16)

class Statistics(NamedTuple):
    """What is kept of a layer: of a batch (with gradient), of a set, of the finished batches."""
    count: int                          # n, feature vectors seen
    mean: Tensor                        # [C]
    ffc: Tensor                         # [C, C], biased covariance
    flc: Tensor | None = None           # [C, K], H^T Y / B
    share: Tensor | None = None         # [K], 1^T Y / B, the classes' shares

    def to(self, *args) -> Statistics:
        """Tensor.to of each part: another device or precision."""
        return Statistics(self.count, *(part if part is None else part.to(*args) for part in self[1:]))

    @property
    def uncentred(self) -> Tensor:
        """H^T H / n = Psi + m m^T. Eq. 15-18 (CFM) and covariance matching centre, so a direction counts by how much
        features vary along it; for a linear head without bias (Eq. 4-14: DC, MTT, FrePo) the mean is one more."""
        return self.ffc + self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)


def blocks(X, mean):                                       # X - mean, without a second X in memory
    return (single(block) - mean for block in X.split(max(4096, len(X) // 16)))


class _Covariance(torch.autograd.Function):
    """X [n, C] -> covariance [C, C] and mean [C], in float32 or better. Written out, dL/dX = (X - 1 m^T) A + 1 g^T / n with
    A = (G + G^T)/n is one product with the X that is there; autograd would keep a centred float32 copy and multiply
    twice. Both products are of centred rows, or a mean of many deviations would cancel digits. Only the gradient is
    rounded to X's precision: behind a filter at small alpha, A holds entries of order 1/alpha^2 along the weak
    directions of X, where X hardly lies; they cancel in X A, but A rounded to 8 bits first does not."""
    generate_vmap_rule = True

    @staticmethod
    def forward(X):
        mean = X.mean(0, dtype=single(X[:1]).dtype)        # summed in float64: in float32, 10^5 rows were off by 2e-5
        return (sum((part.T @ part).double() for part in blocks(X, mean)) / len(X)).to(mean.dtype), mean

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx, G, g):
        X, mean = ctx.saved_tensors
        A = (G + G.T) / len(X)
        return torch.cat([torch.addmm(g / len(X), block, A).to(X.dtype) for block in blocks(X, mean)])


def moments(features: Tensor, labels: Tensor | None = None, layout: str | None = None) -> Statistics:
    """The Statistics of one batch, with gradient: Psi = X^T X / n - m m^T and m = X^T 1 / n (Eq. 15-16).

    X [n, C]: the `rows` of features in layout. labels: Y [B, K], one-hot or soft, for the class-wise FLC H^T Y / B. In
    float32 or better, out of autocast. ValueError if labels are not [B, K], or on a wrong layout.
    >>> seen = moments(torch.rand(6, 8, 5, 5), torch.eye(3).repeat(2, 1))
    >>> seen.count, seen.ffc.shape, seen.flc.shape
    (150, torch.Size([8, 8]), torch.Size([8, 3]))"""
    with torch.autocast(features.device.type, enabled=False):
        X = rows(features, layout)
        psi, mean = _Covariance.apply(X)
        if labels is None:
            return Statistics(len(X), mean, psi)
        B = features.shape[layout == "sequence"]
        if labels.ndim != 2 or len(labels) != B:
            raise ValueError(f"labels must be [B, K] with B = {B} (see one_hot), found {tuple(labels.shape)}")
        H = rearrange(single(X), "(b p) c -> b p c", b=B).mean(1)
        Y = labels.to(H)
        return Statistics(len(X), mean, psi, H.T @ Y / B, Y.mean(0))


def statistics(features, labels=None, layout=None):        # until squeeze.py takes real_statistics
    return moments(features.detach(), labels, layout).to(torch.float64)


def merge(a: Statistics, b: Statistics, step: int | None = None) -> Statistics:
    """The Statistics of two disjoint sets together, exactly, in any split and order (Chan, Golub, LeVeque 1979):
        Psi = (1 - w) Psi_a + w Psi_b + w (1 - w) d d^T,  d = m_b - m_a,  w = n_b / n.
    step = 2, 3, ...: Eq. 17 instead, w = 1 / step and no last term: the mean of the batches' statistics. That drops what
    lies between their means (1-3 % of the trace for ten images) and takes unequal batches for equal. Differentiable.
    >>> a, b = (moments(torch.tensor([[x]])) for x in (0., 2.))
    >>> merge(a, b).ffc, merge(a, b, step=2).ffc
    (tensor([[1.]]), tensor([[0.]]))"""
    n, d = a.count + b.count, b.mean - a.mean
    w = b.count / n if step is None else 1 / step
    between = w * (1 - w) * d.unsqueeze(-1) * d.unsqueeze(-2) if step is None else 0
    mean, psi, *labelled = (None if x is None or y is None else torch.lerp(x, y, w) for x, y in zip(a[1:], b[1:]))
    return Statistics(n, mean, psi + between, *labelled)


def join(memory: dict | None, layers: dict, step: int | None = None) -> dict:
    """EMU: {name: Statistics} of the finished batches (none yet: {}) and of the current one, merged layer by layer.
    >>> join({"fc": moments(torch.zeros(3, 2))}, {"fc": moments(torch.ones(1, 2))})["fc"].mean
    tensor([0.2500, 0.2500])"""
    return {name: merge(memory[name], seen, step) if memory else seen for name, seen in layers.items()}


@torch.no_grad()
def real_statistics(network: nn.Module, batches: Iterable, K: int, select: Callable = is_main_convolution,
                    layout: str | None = None, forward: Callable | None = None) -> dict:
    """One pass over (images, labels [B]) batches: {name: Statistics} of the whole set in float64, class-wise FLC included.

    forward(images, labels) runs the network in place of network(images): under autocast, or to keep the logits.
    ValueError if network is in training mode or batches are empty.
    >>> batches = [(torch.rand(5, 3, 8, 8), torch.arange(5)), (torch.rand(1, 3, 8, 8), torch.tensor([4]))]
    >>> real_statistics(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), batches, K=5)["0"].count
    384"""
    if network.training:
        raise ValueError("network is in training mode, its statistics would change on the way: call network.eval()")
    layers = {}
    for images, labels in batches:
        Y = nn.functional.one_hot(labels, K)
        with collect_inputs(network, select, moments, Y, layout) as seen:
            forward(images, labels) if forward else network(images)
        layers = join(layers, {name: layer.to(torch.float64) for name, layer in seen.items()})
    if not layers:
        raise ValueError("batches: none found")
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# Filters f(FFC) = U f(Lambda) U^T. A filter is a function of the eigenvalues; these are the named ones. Where f(FFC)
# can be had without eigenvalues, the filter carries that shortcut as f.matrix.

def identity(lam: Tensor) -> Tensor:
    """f = 1: the all-pass filter, f(FFC) = I (DM).
    >>> identity(torch.tensor([0., 9.]))
    tensor([1., 1.])"""
    return torch.ones_like(lam)


def low_pass(lam: Tensor) -> Tensor:
    """f = lambda: f(FFC) = FFC (SRe2L, DC, CovM; the low-pass ablation).
    >>> low_pass(torch.tensor([0., 9.]))
    tensor([0., 9.])"""
    return lam


identity.matrix = lambda psi: torch.eye(psi.shape[-1], dtype=psi.dtype, device=psi.device).expand_as(psi)
low_pass.matrix = lambda psi: psi


def ridge(alpha: float) -> Callable:
    """f = 1 / (lambda + alpha), high-pass: flat below alpha, falling above (FrePo, CFM). ValueError unless alpha > 0.
    >>> ridge(1.)(torch.tensor([0., 9.]))
    tensor([1.0000, 0.1000])"""
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0, found {alpha}")

    def f(lam):
        return 1 / (lam + alpha)
    f.matrix, f.alpha = lambda psi: _Ridge.apply(psi, alpha), alpha
    return f


def gradient_descent(eta: float | Tensor, p: int) -> Callable:
    """f = (1 - eta lambda)^p: what p steps of gradient descent at rate eta leave of the start (MTT, Eq. 8).

    Stable for eta * lambda <= 2. eta: a number, or [..., 1] for one a layer. ValueError unless eta > 0 and p >= 1.
    >>> gradient_descent(0.1, 2)(torch.tensor([0., 10.]))
    tensor([1., 0.])"""
    if not (torch.as_tensor(eta > 0).all() and p >= 1 and p == int(p)):
        raise ValueError(f"eta must be > 0 and p a whole number >= 1, found eta = {eta}, p = {p}")
    return lambda lam: ((1 - eta * lam) ** p).to(lam.dtype)


def gradient_descent_sum(eta: float | Tensor, p: int) -> Callable:
    """f = eta sum_{i<p} (1 - eta lambda)^i = (1 - (1 - eta lambda)^p) / lambda: what the p steps learn (MTT, Eq. 8), by
    Horner's rule, right at lambda = 0 too, where it is eta p. ValueError as gradient_descent.
    >>> gradient_descent_sum(0.1, 2)(torch.tensor([0., 10.]))
    tensor([0.2000, 0.1000])"""
    gradient_descent(eta, p)

    def f(lam):
        total = torch.zeros_like(lam)
        for _ in range(p):
            total = total * (1 - eta * lam) + eta
        return total.to(lam.dtype)
    return f


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
        slope = torch.func.grad(lambda x: ctx.f(x).sum())  # f'
        # Gamma_ij is the mean of f' between the two eigenvalues: a difference of f, or by Simpson's rule where they are
        # so close that the rule's last correction is below the difference's rounding. Both must then agree within that
        # rounding: f' can look alike at both ends and the middle and hide a narrow band or a step between them.
        ends, value, gap = slope(lam), ctx.f(lam), torch.where(a == b, 1, a - b)
        trapezoid = (ends.unsqueeze(-1) + ends.unsqueeze(-2)) / 2
        middle = ((a + b) / 2).flatten(-2)                 # [..., C * C]: f may hold one number a layer, [L, 1]
        correction = 2 / 3 * (slope(middle).view_as(trapezoid) - trapezoid)
        difference = (value.unsqueeze(-1) - value.unsqueeze(-2)) / gap
        unsure = value.abs() + (lam * ends).abs()          # f's own rounding, and that of its argument
        rounding = torch.finfo(lam.dtype).eps * (unsure.unsqueeze(-1) + unsure.unsqueeze(-2)) / gap.abs()
        agree = (trapezoid + correction - difference).abs() <= 4 * rounding
        close = (a == b) | (agree & (correction.abs() <= rounding))
        return U @ (torch.where(close, trapezoid + correction, difference) * (U.mT @ G @ U)) @ U.mT, None


class _Ridge(torch.autograd.Function):
    """F = (Psi + alpha I)^-1 by Cholesky; dF = -F dPsi F, so the backward is two products and no factorisation."""
    generate_vmap_rule = True

    @staticmethod
    def forward(psi, alpha):
        eye = torch.eye(psi.shape[-1], dtype=psi.dtype, device=psi.device)
        factor, info = torch.linalg.cholesky_ex(psi + alpha * eye)   # _ex does not wait for the GPU, nor raise:
        factor = torch.where((info == 0)[..., None, None], factor, math.nan)     # so that a failure shows in the loss
        return torch.cholesky_inverse(factor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, G):
        F, = ctx.saved_tensors
        return -F @ ((G + G.mT) / 2) @ F, None


def spectral_filter(ffc: Tensor, f: Callable) -> Tensor:
    """f(Psi) = U diag(f(lambda)) U^T [..., C, C] for symmetric ffc and any differentiable f on the eigenvalues.

    By f.matrix where f has it, else by eigh. Differentiable in ffc, at repeated eigenvalues too (not in what f holds);
    only its symmetric part counts. Twice differentiable, and open to vmap, with f.matrix; else PyTorch says that it is
    not. Rounding can put a zero eigenvalue at -1e-8 of the largest, so f must be defined there too. ValueError unless
    the last two axes are equal.
    >>> spectral_filter(torch.diag(torch.tensor([1., 4.])), torch.sqrt).diagonal()
    tensor([1., 2.])"""
    if ffc.ndim < 2 or ffc.shape[-1] != ffc.shape[-2]:
        raise ValueError(f"ffc must be [..., C, C], found {tuple(ffc.shape)}")
    with torch.autocast(ffc.device.type, enabled=False):
        psi = (single(ffc) + single(ffc).mT) / 2
        return f.matrix(psi) if hasattr(f, "matrix") else _SpectralFilter.apply(psi, f)


def ridge_filter(ffc: Tensor, alpha: float) -> Tensor:
    """F = (Psi + alpha I)^-1 [..., C, C] (Eq. 18) by Cholesky, recover.py's main job. ValueError unless alpha > 0.

    TABLE
    >>> ridge_filter(torch.eye(2), alpha=0.25)
    tensor([[0.8000, 0.0000],
            [0.0000, 0.8000]])"""
    return spectral_filter(ffc, ridge(alpha))


# ---------------------------------------------------------------------------------------------------------------------
# Curriculum Frequency Matching, and the objective of Eq. 1

def alpha_schedule(k: int, T: int, alpha_max: float, kind: str = "cosine") -> float:
    """Eq. 18: alpha_k = alpha_max (1 + cos(pi k / T)) / 2 for k = 0 .. T-1, from alpha_max (low frequencies pass)
    toward 0 (high ones do). kind: cosine, or the ablations linear, alpha_max (1 - k/T), and constant. ValueError
    otherwise.
    >>> [alpha_schedule(k, T=2, alpha_max=0.1) for k in range(2)]
    [0.1, 0.05]"""
    if not 0 <= k < T or kind not in ("cosine", "linear", "constant"):
        raise ValueError(f"0 <= k < T and kind cosine, linear or constant; found k = {k}, T = {T}, kind = {kind!r}")
    return alpha_max * {"cosine": (1 + math.cos(math.pi * k / T)) / 2, "linear": 1 - k / T, "constant": 1.0}[kind]


def cfm_pairs(alpha: float | None) -> list:
    """The pairs (g, f) of CFM, Eq. 19-20; alpha None: of its low-pass ablation, f = lambda.
    >>> [g for g, f in cfm_pairs(0.1)]
    ['I', 'x']"""
    f = low_pass if alpha is None else ridge(alpha)
    return [("I", f), ("x", f)]


def filtered(layers, pairs, signal="mean", centred=True, side=0):
    """(pairs, what each of them compares) for a stack of layers [Statistics, ...] of equal C: f(Psi) [L, C, C], its
    diagonal [L, C, 1], or f(Psi) Phi [L, C, K]. side: 0 real, 1 synthetic."""
    stack = Statistics(0, *(None if parts[0] is None else torch.stack(parts) for parts in
                            zip(*(layer[1:] for layer in layers))))
    psi, phi = stack.ffc if centred else stack.uncentred, stack.mean.unsqueeze(-1)
    if signal == "class":                                  # a class that is not there has share and flc 0
        phi = stack.flc / (stack.share * stack.share.shape[-1]).clamp(min=torch.finfo(psi.dtype).tiny).unsqueeze(-2)
    pairs, filters, out = pairs(psi) if callable(pairs) else pairs, {}, []
    for g, *both in pairs:
        f = both[min(side, len(both) - 1)]
        if f not in filters:                               # CFM's two pairs share one factorisation
            filters[f] = spectral_filter(psi, f)
        out.append(filters[f] @ phi if g == "x" else filters[f] if g == "I" else filters[f].diagonal(0, -2, -1)[..., None])
    return pairs, out


def matching(real: dict, pairs: list | Callable, signal: str = "mean", centred: bool = True) -> Callable:
    """The objective: loss(layers, memory={}, step=None) -> sum over layers and pairs of
        || f(Psi) g(Phi) - f_s(Psi_s) g(Phi_s) ||, not squared (Eq. 1, 19), s: layers joined with memory.

    real, layers, memory: {name: Statistics}. The real side is filtered once, here; layers of equal C go together. pairs:
    (g, f), or (g, f_real, f_syn), or a function of a stack's real Psi [L, C, C] that gives them. g: "I" matches filters
    f(Psi), "diag" their diagonals, "x" signals f(Psi) Phi. signal: Phi is the mean [C, 1], or with "class" [C, K] the
    classes' means over K, whatever their sizes, of classes in the batch. centred: Psi is the covariance, else H^T H / n.
    ValueError on another g or signal, on a real side that is not finite or lacks classes, or if layers are not real's.
    >>> X = torch.rand(20, 4)
    >>> matching({"fc": moments(X)}, cfm_pairs(0.1))({"fc": moments(X)})
    tensor(0.)"""
    stacks = {}
    for name, layer in real.items():
        stacks.setdefault(len(layer.mean), []).append(name)
    targets = [filtered([real[name] for name in names], pairs, signal, centred) for names in stacks.values()]

    def loss(layers, memory=None, step=None):
        if layers.keys() != real.keys():
            raise ValueError(f"layers: {sorted(layers)} found, the real side has {sorted(real)}")
        joined, total = join(memory, layers, step), 0
        with torch.autocast(next(iter(layers.values())).mean.device.type, enabled=False):
            for names, (chosen, wanted) in zip(stacks.values(), targets):
                found = filtered([joined[name] for name in names], chosen, signal, centred, 1)[1]
                for (g, *_), a, b in zip(chosen, wanted, found):
                    a = a.to(b.dtype)
                    if g == "x" and signal == "class":
                        here = torch.stack([layers[name].share for name in names]).unsqueeze(-2) > 0
                        a, b = a * here, b * here
                    total = total + torch.linalg.vector_norm(a - b, dim=(-2, -1)).sum()
        return total
    return loss
