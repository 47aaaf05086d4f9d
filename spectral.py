"""spectral.py: dataset distillation as spectral filtering, in one file to read from top to bottom and to copy.

"Understanding Dataset Distillation via Spectral Filtering" (Bo, Liu, Wang; ICLR 2026; arXiv 2503.01212) shows that many
distillation objectives compare two matrices of a frozen network's features, after the same spectral filter:
    min over X_s  || f(FFC) g(FLC) - f(FFC_s) g(FLC_s) ||,   g = I (match filters) or g(x) = x (match signals)  (Eq. 1)

Letters:
    B batch  C channels  K classes  T = IPC rounds  N = K * IPC synthetic images  L layers of equal C, stacked
    X [n, C]    feature vectors as rows, one for every pixel or token; H [B, C] their means by image; Y [B, K] labels
    FFC         feature-feature correlation, Psi [C, C]: which directions the features share (biased covariance)
    FLC         feature-label correlation, Phi [C] or [C, K]: where in those directions the classes lie
    f(FFC)      U diag(f(lambda)) U^T of FFC = U diag(lambda) U^T, lambda >= 0, in the features' unit squared
    pairs       [(g, f), ...]: what is compared (Theorem 1); CFM's by `cfm_pairs`, other methods' in baselines.py
Large lambda is low frequency (colour, coarse shape), small lambda is high frequency (texture, diversity).

Needs torch alone. No I/O, no global state, no device choice. Most mistakes in arguments are ValueErrors that name them;
features that are not finite show as a loss that is not. All of it, from a loader to the gradient of some images:
    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    >>> loader = [(torch.rand(20, 3, 9, 9), torch.arange(20) % 5) for _ in range(3)]
    >>> images = torch.rand(5, 3, 9, 9, requires_grad=True)
    >>> real = real_statistics(network, loader, K=5)                    # once
    >>> loss = matching(real, cfm_pairs(alpha=0.1))                     # once for each alpha
    >>> with collect_inputs(network, transform=moments) as layers:      # around the steps
    ...     logits = network(images)
    ...     loss(layers).backward()
    >>> images.grad.shape
    torch.Size([5, 3, 9, 9])"""
import math
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Callable, Iterable, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["is_main_convolution", "collect_inputs", "Statistics", "moments", "merge", "real_statistics", "identity",
           "low_pass", "ridge", "gradient_descent", "spectral_filter", "alpha_schedule", "cfm_pairs", "matching"]
LAYOUTS = {"plain": (2,), "map": (3, 4, 5), "tokens": (3, 4, 5)}       # and how many axes such features have
# Statistics and filters never use half precision, whatever autocast is around. Blocks fit a cache; a GPU wants few.
single = lambda x: x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
full_precision = lambda x: torch.autocast(x.device.type, enabled=False) if torch.is_autocast_enabled(x.device.type) \
    else nullcontext()                                     # 3 us less, a dozen times a step
blocks = lambda X: map(single, X.split(max(4096, min(2**19 // X.shape[1] if X.is_cpu else 2**15, 2**15), len(X) // 16)))

# ---- Features, the inputs of a frozen network's modules, and their FFC and FLC (Eq. 15-16) ---------------------------
def is_main_convolution(name: str, module: nn.Module) -> bool:
    """The default choice of layers: every nn.Conv2d but the shortcut ("downsample") ones.
    >>> is_main_convolution("layer1.0.conv1", nn.Conv2d(3, 8, 3)), is_main_convolution("fc", nn.Linear(3, 8))
    (True, False)"""
    return isinstance(module, nn.Conv2d) and "downsample" not in name and "shortcut" not in name

@contextmanager
def collect_inputs(network: nn.Module, select: Callable = is_main_convolution, transform: Callable = lambda x: x,
                   labels: Tensor | None = None, layout: str | None = None, outputs: bool = False):
    """Context: a dict {name: transform(input)} of the selected modules, filled anew by each call of network in this
    thread. select(name, module) -> bool. Input: a module's first argument; outputs: what it returns (the first).
    transform: of the features (torch.clone keeps them from a later in-place module), or `moments`, given labels, layout
    (where layout_of is not sure). ValueError if nothing is selected, or what runs twice or takes no tensor.
    >>> with collect_inputs(network := nn.Sequential(nn.Conv2d(3, 8, 3))) as features:
    ...     logits = network(torch.rand(2, 3, 9, 9))
    >>> features["0"].shape
    torch.Size([2, 3, 9, 9])"""
    layers, owner, grad = {}, threading.get_ident(), []
    def begin(module, args):
        if threading.get_ident() == owner:
            layers.clear()
            grad[:] = [torch.is_grad_enabled()]
    def hook(name, module, args, kwargs, output=None):
        again = torch._C._current_graph_task_id() != -1    # a checkpoint in backward: it must save the same tensors
        if threading.get_ident() != owner and not again:
            return
        x = output if outputs else (*args, *kwargs.values())
        x = x[0] if isinstance(x, tuple) and x else x
        lost = grad == [True] and not torch.is_grad_enabled()
        wrong = f"takes or gives a {type(x).__name__}" if not torch.is_tensor(x) else "loses its gradient (in a " \
            "checkpoint: give that use_reentrant=False)" if lost else \
            "runs twice in a forward pass" if name in layers and not again else ""
        if wrong:
            raise ValueError(f"select: module {name!r} {wrong}: leave it out")
        value = moments(x, labels, layout_of(name, module, x, layout)) if transform is moments else transform(x)
        layers.setdefault(name, value)
    selected = [(name, module) for name, module in network.named_modules() if select(name, module)]
    if not selected:
        raise ValueError("select: no module of the network is selected")
    with ExitStack() as hooks:
        hooks.enter_context(network.register_forward_pre_hook(begin))
        for name, module in selected:
            register = module.register_forward_hook if outputs else module.register_forward_pre_hook
            hooks.enter_context(register(lambda *args, name=name: hook(name, *args), with_kwargs=True))
        yield layers

def layout_of(name, module, x, layout=None):
    """Channels first for convolutions, last for linear and batch_first recurrent modules; else layout or ValueError."""
    convolution = isinstance(module, nn.modules.conv._ConvNd) and x.ndim == len(module.kernel_size) + 2
    last = isinstance(module, nn.Linear) or isinstance(module, nn.RNNBase) and module.batch_first
    if x.ndim > 2 and not convolution and not last and not layout:
        raise ValueError(f"layout: that of module {name!r}, {type(module).__name__} with {tuple(x.shape)}, is not "
                         "certain: say map (channels first) or tokens (last)")
    return "plain" if x.ndim == 2 else "map" if convolution else "tokens" if last else layout

class Statistics(NamedTuple):
    """What is kept of a layer: of a batch (with gradient), of a set, of the finished batches."""
    count: int                          # n, feature vectors seen
    mean: Tensor                        # [C]
    ffc: Tensor                         # [C, C], biased covariance
    flc: Tensor | None = None           # [C, K], H^T Y / B
    share: Tensor | None = None         # [K], 1^T Y / B, the classes' shares

    def to(self, *args) -> "Statistics":    # each part's Tensor.to: another device or precision
        return Statistics(self.count, *(part if part is None else part.to(*args) for part in self[1:]))

    @property
    def uncentred(self) -> Tensor:
        """X^T X / n = Psi + m m^T. Eq. 15-18 (CFM) and covariance matching centre, so a direction counts by how much
        features vary along it; for a linear head without bias (Eq. 4-14: DC, MTT, FrePo) the mean counts, too."""
        return self.ffc + self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)

class _Covariance(torch.autograd.Function):
    """X [n, C] -> covariance [C, C], mean [C], in float32 or better, of centred rows, or a mean of many deviations
    would cancel digits; many rows go by blocks, joined by `merge` in float64. dL/dX = X A + 1 (g / n - A m)^T, A = (G +
    G^T)/n, is one product with X; autograd would keep a centred float32 copy. Only the gradient is rounded to X's type:
    at small alpha A has entries of order 1/alpha^2 where X hardly lies; they cancel in X A, not in a rounded A."""
    generate_vmap_rule = True

    @staticmethod
    def forward(X):
        seen = None
        for rows in blocks(X):
            rows = rows - (mean := rows.mean(0))
            part = Statistics(len(rows), mean, rows.T @ rows / len(rows))
            seen = merge(seen.to(torch.float64), part.to(torch.float64)) if seen else part
        return seen.ffc.to(mean, copy=True), seen.mean.to(mean, copy=True)    # compiled 2.11 gives an alias no gradient

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx, G, g):
        X, mean = ctx.saved_tensors
        with full_precision(G):
            A = (G + G.T) / len(X)
            row = g / len(X) - A @ mean
            out, end = row.new_empty(X.shape, dtype=X.dtype), 0        # row's: under vmap G may have an axis X lacks
            for rows in blocks(X):
                start, end = end, end + len(rows)
                out[start:end] = torch.addmm(row, rows, A)
            return out

def moments(features: Tensor, labels: Tensor | None = None, layout: str | None = None) -> Statistics:
    """The Statistics of one batch, with gradient: Psi = X^T X / n - m m^T and m = X^T 1 / n (Eq. 15-16), X [n, C] the
    features as rows. layout: "plain" [B, C]; "map" [B, C, ...] with one to three axes of pixels; "tokens" [B, ..., C],
    channels-last maps too; None: plain or map by two or four axes. labels: Y [B, K], one-hot or soft, for class-wise
    FLC, H^T Y / B. In float32 or better, out of autocast. ValueError if labels are not [B, K], or on a wrong layout.
    >>> moments(torch.rand(6, 8, 5, 5), torch.eye(3).repeat(2, 1)).flc.shape
    torch.Size([8, 3])"""
    layout = layout or {2: "plain", 4: "map"}.get(features.ndim)
    if features.ndim not in LAYOUTS.get(layout, ()) or not features.numel():
        raise ValueError(f"layout {layout!r} found for features {tuple(features.shape)}, must be one of {LAYOUTS}")
    X = (features.movedim(1, -1) if layout == "map" else features).flatten(0, -2)
    with full_precision(features):
        psi, mean = _Covariance.apply(X)
        if labels is None:
            return Statistics(len(X), mean, psi)
        if labels.ndim != 2 or len(labels) != len(features):
            raise ValueError(f"labels must be [B, K], B = {len(features)} (one-hot), found {tuple(labels.shape)}")
        H, Y = single(X).unflatten(0, (len(labels), -1)).mean(1), labels.to(single(X))
        return Statistics(len(X), mean, psi, H.T @ Y / len(H), Y.mean(0))

def merge(a, b, step: int | None = None):
    """The Statistics of two disjoint sets together, exactly (FLC: of equally large images; Chan, Golub, LeVeque):
        Psi = (1 - w) Psi_a + w Psi_b + w (1 - w) d d^T,  d = m_b - m_a,  w = n_b / n.
    EMU: a, b may be {name: Statistics}, of the finished batches (none yet: {} or None) and of the current one. step =
    2, 3, ...: Eq. 17 as written, w = 1 / step and no last term: the mean of the batches' statistics. It drops what lies
    between their means (1-3 % of the trace for ten images) and takes unequal batches for equal. Differentiable.
    >>> a, b = (moments(torch.tensor([[x]])) for x in (0., 2.))
    >>> merge(a, b).ffc, merge({"fc": a}, {"fc": b}, step=2)["fc"].ffc
    (tensor([[1.]]), tensor([[0.]]))"""
    if isinstance(b, dict):
        return {name: merge(a[name], seen, step) if a else seen for name, seen in b.items()}
    if step is not None and step < 2:
        raise ValueError(f"step counts batches, this one included, from 2 on: found {step}")
    n, d = a.count + b.count, b.mean - a.mean
    w = b.count / n if step is None else 1 / step
    between = w * (1 - w) * d.unsqueeze(-1) * d.unsqueeze(-2) if step is None else 0
    mean, psi, *labelled = (None if x is None or y is None else torch.lerp(x, y, w) for x, y in zip(a[1:], b[1:]))
    return Statistics(n, mean, psi + between, *labelled)

@torch.no_grad()
def real_statistics(network: nn.Module, batches: Iterable, K: int, select: Callable = is_main_convolution,
                    forward: Callable | None = None, **more) -> dict:
    """One pass over (images, labels [B]) batches: {name: Statistics} of the set in float64, class-wise FLC included.
    forward(images, labels) runs the network in place of network(images): under autocast, or to keep the logits. more:
    collect_inputs' layout and outputs. ValueError if network is in training mode or batches are empty.
    >>> real_statistics(nn.Conv2d(3, 8, 3).eval(), [(torch.rand(2, 3, 8, 8), torch.arange(2))], K=2)[""].count
    128"""
    if network.training:
        raise ValueError("network is in training mode, its statistics would change on the way: call network.eval()")
    layers = {}
    for images, labels in batches:
        with collect_inputs(network, select, moments, nn.functional.one_hot(labels.long(), K), **more) as seen:
            forward(images, labels) if forward else network(images)
        layers = merge(layers, {name: layer.to(torch.float64) for name, layer in seen.items()})
    if not layers:
        raise ValueError("batches: none, or no selected module ran")
    return layers

# ---- Filters f(FFC) = U f(Lambda) U^T: functions of the eigenvalues. Where it can be had without them, f has that
# shortcut as f.matrix, of the symmetric part. identity: f = 1, all-pass (DM); low_pass: f = lambda (SRe2L, DC, CovM).
identity, low_pass = (lambda lam: torch.ones_like(lam)), (lambda lam: lam)
identity.matrix = lambda psi: torch.eye(psi.shape[-1], dtype=psi.dtype, device=psi.device).expand_as(psi)
low_pass.matrix = lambda psi: (psi + psi.mT) / 2

def ridge(alpha: float) -> Callable:
    """f = 1 / (lambda + alpha), high-pass: flat below alpha, falling above (FrePo, CFM), with F = (Psi + alpha I)^-1
    (Eq. 18) by Cholesky. ValueError unless alpha > 0. Float32's relative errors at alpha = 1e-1, 1e-3, 1e-5: of F, of
    ten images (C = 2048, rank 9, lambda_max 14), 5e-7, 6e-5, 6e-3, of CFM's gradient there 1e-5, 1e-3, 0.14. `matching`
    refuses alpha below 1.2e-7 ||Psi||, 1e-6 if n <= C: where Psi is singular (few images) stay above 1e-6 lambda_max.
    >>> ridge(1.)(torch.tensor([0., 9.])), spectral_filter(torch.eye(2), ridge(0.25)).diagonal()
    (tensor([1.0000, 0.1000]), tensor([0.8000, 0.8000]))"""
    if not alpha > 0:
        raise ValueError(f"alpha must be > 0, found {alpha}")
    f = lambda lam: 1 / (lam + alpha)
    f.matrix, f.alpha = lambda psi: _Ridge.apply(psi, alpha), alpha
    return f

def gradient_descent(eta: float | Tensor, p: int) -> tuple[Callable, Callable]:
    """What p steps of gradient descent at rate eta leave of the start, f = (1 - eta lambda)^p, and what they learn (Eq.
    8), f = eta sum_{i<p} (1 - eta lambda)^i = (1 - (1 - eta lambda)^p) / lambda, summed: right at 0 too. Stable for
    eta * lambda <= 2. eta: a number, or [..., 1] for one a layer. ValueError unless eta > 0 and p >= 1.
    >>> [f(torch.tensor([0., 10.])).tolist() for f in gradient_descent(0.125, p=2)]
    [[1.0, 0.0625], [0.25, 0.09375]]"""
    if not (torch.as_tensor(eta > 0).all() and p >= 1 and p == int(p)):
        raise ValueError(f"eta must be > 0 and p a whole number >= 1, found eta = {eta}, p = {p}")
    return (lambda lam: ((1 - eta * lam) ** p).to(lam.dtype),
            lambda lam: sum(eta * (1 - eta * lam) ** i for i in range(p)).to(lam.dtype))

class _SpectralFilter(torch.autograd.Function):
    """Autograd's eigh divides by lambda_i - lambda_j and is useless at repeated eigenvalues. The derivative of f(Psi)
    itself is finite (Daleckii and Krein 1965):
        d f(Psi) = U (Gamma o (U^T dPsi U)) U^T,  Gamma_ij = (f(l_i) - f(l_j)) / (l_i - l_j),  Gamma_ii = f'(l_i)."""

    @staticmethod
    def forward(ctx, psi, f):
        lam, U = torch.linalg.eigh(psi) if psi.isfinite().all() else (psi[..., 0] * math.nan, psi * math.nan)
        ctx.f = f
        ctx.save_for_backward(lam, U)
        return (U * f(lam).unsqueeze(-2)) @ U.mT

    @staticmethod
    def backward(ctx, G):
        if torch.is_grad_enabled():                        # once_differentiable lets some second derivatives be 0
            raise RuntimeError("spectral_filter by eigenvalues is differentiable once: no create_graph")
        lam, U = ctx.saved_tensors
        mean, apart = (lambda v: (v.unsqueeze(-1) + v.unsqueeze(-2)) / 2), (lambda v: v.unsqueeze(-1) - v.unsqueeze(-2))
        slope = torch.func.grad(lambda x: ctx.f(x).sum())  # f'
        # Gamma_ij, the mean of f' between two eigenvalues: a difference of f, or Simpson's rule where its last term is
        # below that one's rounding (of f and its argument) and both agree: f' can hide a narrow band or step from it.
        ends, value, gap = slope(lam), ctx.f(lam), apart(lam)
        difference, trapezoid = apart(value) / gap, mean(ends)
        middle = slope(mean(lam).flatten(-2)).view_as(gap)      # [..., C * C]: f may hold one number a layer, [L, 1]
        correction = 2 / 3 * (middle - trapezoid)
        rounding = 2 * torch.finfo(lam.dtype).eps * mean(value.abs() + (lam * ends).abs()) / gap.abs()
        agree = ((trapezoid + correction - difference).abs() <= 4 * rounding) & (correction.abs() <= rounding)
        Gamma = torch.where((gap == 0) | agree, trapezoid + correction, difference)
        with full_precision(G):
            return U @ (Gamma * (U.mT @ G @ U)) @ U.mT, None

class _Ridge(torch.autograd.Function):
    """F = (Psi + alpha I)^-1, of Psi's symmetric part, by Cholesky; dF = -F dPsi F: the backward is two products. _ex
    neither waits for the GPU nor raises: a factorisation that fails is NaN, and the loss shows it."""
    generate_vmap_rule = True

    @staticmethod
    def forward(psi, alpha):
        (shifted := (psi + psi.mT) / 2).diagonal(0, -2, -1).add_(alpha)
        factor, info = torch.linalg.cholesky_ex(shifted)
        factor.diagonal(0, -2, -1).masked_fill_((info != 0).unsqueeze(-1), math.nan)
        if factor.is_cpu:                                  # on CUDA it takes a stack one by one, and waits for each
            return torch.cholesky_inverse(factor)
        root = torch.linalg.solve_triangular(factor, identity.matrix(factor), upper=False)
        return root.mT @ root

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, G):
        F, = ctx.saved_tensors
        with full_precision(G):
            return F @ ((G + G.mT) / -2) @ F, None

def spectral_filter(ffc: Tensor, f: Callable) -> Tensor:
    """f(Psi) = U diag(f(lambda)) U^T [..., C, C] for symmetric ffc and differentiable f, of each eigenvalue alone.
    By f.matrix where f has it, else by eigh. Differentiable in ffc, at repeated eigenvalues too (not in what f holds);
    twice, and in torch.func, only with f.matrix (else an error). Only ffc's symmetric part counts. Rounding can put a
    zero eigenvalue at -1e-8 of the largest: f must be defined there. ValueError unless the last two axes are equal.
    >>> spectral_filter(torch.diag(torch.tensor([1., 4.])), torch.sqrt).diagonal()
    tensor([1., 2.])"""
    if ffc.ndim < 2 or ffc.shape[-1] != ffc.shape[-2]:
        raise ValueError(f"ffc must be [..., C, C], found {tuple(ffc.shape)}")
    with full_precision(ffc):
        psi = single(ffc)
        return f.matrix(psi) if hasattr(f, "matrix") else _SpectralFilter.apply((psi + psi.mT) / 2, f)

# ---- Curriculum Frequency Matching, and the objective of Eq. 1 -------------------------------------------------------
def alpha_schedule(k: int, T: int, alpha_max: float, kind: str = "cosine") -> float:
    """Eq. 18: alpha_k = alpha_max (1 + cos(pi k / T)) / 2 for k = 0 .. T-1, from alpha_max (low frequencies pass)
    toward 0 (high ones do). kind: cosine, or linear, alpha_max (1 - k/T), or constant; else ValueError.
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
    """(pairs, what each compares) for layers [Statistics, ...] of equal C, stacked: f(Psi) [L, C, C], its diagonal [L,
    C, 1], or f(Psi) Phi [L, C, K]. side: 0 real, -1 synthetic."""
    psi = torch.stack([layer.ffc if centred else layer.uncentred for layer in layers])
    phi = torch.stack([layer.flc / (layer.share * len(layer.share)).clamp(min=1e-30) if signal == "class" else
                       layer.mean.unsqueeze(-1) for layer in layers])          # a class not there: share and flc are 0
    pairs = pairs(psi) if callable(pairs) else pairs
    if strange := [g for g, *_ in pairs if g not in ("I", "diag", "x")]:
        raise ValueError(f"pairs: g must be I, diag or x, found {strange[0]!r}")
    F = {f: spectral_filter(psi, f) for f in dict.fromkeys(both[side] for _, *both in pairs)}     # CFM's two share it
    show = {"I": lambda M: M, "diag": lambda M: M.diagonal(0, -2, -1)[..., None], "x": lambda M: M @ phi}
    return pairs, [show[g](F[both[side]]) for g, *both in pairs]

def matching(real: dict, pairs: list | Callable, signal: str = "mean", centred: bool = True) -> Callable:
    """The objective: loss(layers, memory={}, step=None) -> sum over layers and pairs of
        || f(Psi) g(Phi) - f_s(Psi_s) g(Phi_s) ||, not squared (Eq. 1, 19), of layers merged with memory.
    real, layers, memory: {name: Statistics}. The real side is filtered once, here; layers of equal C go together.
    pairs: (g, f), or (g, f_real, f_syn), or a function of a stack's real Psi [L, C, C] that gives them. g: "I" matches
    filters f(Psi), "diag" their diagonals, "x" signals f(Psi) Phi. signal: Phi is the mean [C, 1], or with "class"
    [C, K] the class means over K, of the classes in the batch. centred: Psi the covariance or X^T X / n.
    ValueError if real is not finite or lacks classes, layers lack labels or are not real's, or alpha is too small.
    >>> matching({"fc": moments(X := torch.rand(20, 4))}, cfm_pairs(0.1))({"fc": moments(X)})
    tensor(0.)"""
    groups, norm = {}, {}
    for name, layer in real.items():
        groups.setdefault(len(layer.mean), []).append(name)
        norm[name] = torch.linalg.matrix_norm(layer.ffc if centred else layer.uncentred).item() + 1e-300
        if not layer.uncentred.isfinite().all():
            raise ValueError(f"real: the statistics of {name!r} are not finite")
        if signal not in ("mean", "class") or signal == "class" and (layer.flc is None or not layer.share.all()):
            raise ValueError(f"signal {signal!r}: must be mean, or class with images of every class in real[{name!r}]")
    targets = [(names, *filtered([real[name] for name in names], pairs, signal, centred)) for names in groups.values()]
    ratio = min(getattr(f, "alpha", math.inf) / norm[n] for ns, t, _ in targets for n in ns for p in t for f in p[1:])
    def loss(layers, memory=None, step=None):
        if layers.keys() != real.keys():
            raise ValueError(f"layers: {sorted(layers)} found, the real side has {sorted(real)}")
        joined, norms, dtype = merge(memory, layers, step), [], next(iter(layers.values())).mean.dtype
        if ratio < torch.finfo(dtype).eps * (8 if any(s.count <= len(s.mean) for s in joined.values()) else 1):
            raise ValueError(f"alpha: {ratio:.1e} of ||Psi|| is below what {dtype} resolves: raise alpha")
        if signal == "class" and any(layer.share is None for layer in joined.values()):
            raise ValueError("labels: signal 'class' needs moments with labels")
        for names, chosen, wanted in targets:
            with full_precision(wanted[0]):
                found = filtered([joined[name] for name in names], chosen, signal, centred, -1)[1]
                for (g, *_), a, b in zip(chosen, wanted, found):
                    gap = b - a.to(b.dtype)        # in this order autograd need not negate its gradient
                    if g == "x" and signal == "class":
                        gap = gap * (torch.stack([layers[name].share for name in names]).unsqueeze(-2) > 0)
                    norms.append(torch.linalg.vector_norm(gap, dim=(-2, -1)))
        return torch.cat(norms).sum()
    return loss
