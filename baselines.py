"""baselines.py: other methods' objectives as pairs of filters (Theorem 1), run by recover.py's own
loop; and rivals of today, which differ in their start, views or weights.

    python baselines.py --method mtt                                      toy images
    python baselines.py --method dm --dataset cifar10 --network convnet --ipc 10

METHODS says with which f(FFC) g(FLC): the theory's forms for a linear head, on one trained teacher, under CFM's recipe
(start, cross-entropy, views). No number made here is the published method's: DM and DC draw many random networks, MTT
matches trajectories of a whole one, FrePo has a pool of them, CDA and DWA have their own rates and iterations."""
import copy
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

import recover
import squeeze
from spectral import gradient_descent, identity, low_pass, ridge
from squeeze import BadInput, number

# ---- The table: flags -> pairs (g, f) or (g, f_real, f_syn), which spectral.matching explains ------------------------
def mtt(args):
    """Eq. 6-9: p steps of gradient descent on a linear head turn W_0 into
    (I - eta FFC)^p W_0 + eta sum_{i<p} (I - eta FFC)^i FLC: one filter before W_0, one before FLC; q steps on ours.
    eta: --eta, or 1 / lambda_max of each real layer, which leaves the synthetic spectrum a factor of 2 to overshoot."""
    def pairs(psi):
        eta = args.eta or 1 / torch.linalg.eigvalsh(psi)[..., -1:]
        return list(zip(("I", "x"), gradient_descent(eta, args.p), gradient_descent(eta, args.q)))
    return pairs

# Then FLC, class-wise or mean, and whether FFC is centred: not where theory has a linear head without bias (X^T X / n)
METHODS = {
    # Eq. 2: class means, || H^T Y - H_s^T Y_s ||. All-pass: nothing is weighted, so what is large dominates.
    "dm": (lambda args: [("x", identity)], "class", True),
    # Eq. 3: BatchNorm's statistics, || diag FFC - diag FFC_s || + || mean - mean_s || of (here) convolution inputs.
    "sre2l": (lambda args: [("diag", low_pass), ("x", identity)], "mean", True),
    # Eq. 4-5: the gradient of a linear head is FFC W - FLC, so for any W the gradients differ by at most
    # || FFC - FFC_s || ||W|| + || FLC - FLC_s ||. The bound is what is minimised.
    "dc": (lambda args: [("I", low_pass), ("x", identity)], "class", False),
    # DM with covariance matching on top: DC's pairs, of the centred FFC.
    "covm": (lambda args: [("x", identity), ("I", low_pass)], "class", True),
    "mtt": (mtt, "class", False),
    # Eq. 10-14: kernel ridge regression, H H^T + beta I by its dual: || (FFC + beta I)^-1 FLC - (...)_s ||.
    "frepo": (lambda args: [("x", ridge(args.beta))], "class", False)}
METHODS.update(dict.fromkeys(("cda", "dwa", "rded"), METHODS["sre2l"]))    # with other views, weights; no step

# ---- What the rivals change beside the pairs -------------------------------------------------------------------------
def curriculum(progress):
    """CDA (Yin, Shen, 2023): the smallest crop, as share of the area, falls from 1 to 0.08 with a cosine: easy views
    first. progress: of a batch's iterations, 0 to 1; over all of them, as its authors run it."""
    return 0.08 + 0.92 * (1 + math.cos(math.pi * progress)) / 2

def adjusted(network, x, classes, rho=0.015, steps=12):
    """DWA (Du et al., 2024): a copy of the network, weights (BatchNorm folded in) moved by steps of rho / steps
    up the gradient of the starting images' cross-entropy: every batch meets another teacher. x: normalised images."""
    network = copy.deepcopy(network).requires_grad_(True)
    for _ in range(steps):
        parts = torch.autograd.grad(F.cross_entropy(squeeze.forward(network, x), classes), list(network.parameters()))
        length = torch.nn.utils.get_total_norm(parts)
        for weight, part in zip(network.parameters(), parts):
            weight.data += rho / steps / (length + 1e-12) * part
    return network.requires_grad_(False)

@torch.no_grad()
def realistic_crops(job, args, c, candidates=300, crops=5):
    """RDED (Sun et al., 2024), class c: of 300 random images (more if wanted) the best of five square crops each, then
    the best of those (least cross-entropy, border filled); beyond 64 px four make an image: uint8 [ipc, 3, S, S]."""
    S, rng, teacher = job.data.size, np.random.default_rng([args.seed, c]), job.teacher
    grid, device = 2 if S > 64 else 1, next(job.network.parameters()).device
    d, wanted = -(-S // grid), args.ipc * grid**2
    own = rng.permutation((job.data.train.labels == c).nonzero()[:, 0].numpy())[:max(candidates, wanted)]
    images = recover.take(job.data, job.data.train, torch.from_numpy(own)).to(device).repeat(crops, 1, 1, 1)
    boxes = recover.crop_boxes(rng.random((len(images), 4)), (0.08, 1), (1, 1)).to(device)
    views = recover.resample(images.float(), recover.crop_grid(boxes, d)).round()
    seen = F.pad(squeeze.normalise(views, teacher["mean"], teacher["std"]), 2 * ((S - d) // 2, (S - d + 1) // 2))
    loss = torch.cat([-squeeze.forward(job.network, part).log_softmax(1)[:, c] for part in seen.split(500 // grid**2)])
    best, which = loss.view(crops, -1).min(0)
    first = best.argsort(stable=True)[:wanted]
    chosen = views.view(crops, -1, 3, d, d)[which[first], first]
    return rearrange(chosen, "(y x n) c h w -> n c (y h) (x w)", y=grid, x=grid)[..., :S, :S].byte().cpu()

# ---- The stage -------------------------------------------------------------------------------------------------------
def prepare(job, args):
    """What recover.run asks for: the method's pairs, the same in every round, and what a rival changes. BadInput if
    --eta is unstable: gradient descent diverges for eta * lambda > 2."""
    if args.eta:
        largest = max(torch.linalg.matrix_norm(layer.uncentred, 2) for layer in job.real.values())
        if args.eta * largest > 2:
            raise BadInput(f"--eta {args.eta}: gradient descent diverges, eta * lambda is {args.eta * largest:.3g}: "
                           f"use at most {2 / largest:.3g}, or leave it out to have it chosen")
    job.pairs_of = lambda k, args: METHODS[args.method][0](args)
    crops = functools.cache(lambda c: realistic_crops(job, args, c))       # not before they are wanted
    start = lambda job, k, classes, rng: torch.stack([crops(c)[k] for c in classes.tolist()])
    vars(job).update({"cda": dict(smallest=curriculum), "dwa": dict(network_for=adjusted),
                      "rded": dict(start=start)}.get(args.method, {}))

def parse(argv):
    parser = squeeze.Parser(__doc__)
    parser.add_argument("--method", required=True, choices=list(METHODS), help="whose objective")
    recover.add_flags(parser)
    add = parser.add_argument_group("spectra").add_argument
    add("--layers", choices=["conv", "last"], default="conv", help="convolutions' inputs, as CFM, or the head's, H")
    add("--eta", type=number(float, 0, strict=True), help="mtt: rate (default: 1 / lambda_max of each layer)")
    add("--p", type=number(int, 1), help="mtt: steps on the real side (default 10)")
    add("--q", type=number(int, 1), help="mtt: steps on the synthetic side (default 10)")
    add("--beta", type=number(float, 0, strict=True), help="frepo: ridge, > 0 (default 0.01)")
    args = parser.parse_args(argv)
    for flag, owner, default in (("eta", "mtt", None), ("p", "mtt", 10), ("q", "mtt", 10), ("beta", "frepo", 0.01)):
        if getattr(args, flag) is not None and args.method != owner:
            raise BadInput(f"--{flag} is for --method {owner}, found {args.method}: leave it out")
        setattr(args, flag, getattr(args, flag) or default)
    _, args.signal, args.centred = METHODS[args.method]
    if args.iterations == 0:
        raise BadInput("--iterations 0: real images as they are come from recover.py: leave it out")
    if args.method == "rded":
        if odd := [flag for flag in ("iterations", "init", "lr", "gamma", "emu") if getattr(args, flag) is not None]:
            raise BadInput(f"--method rded: crops of real images, no steps: leave out --{odd[0]}")
        args.iterations, args.init = 0, "rded"
    return args

def main(argv):
    recover.run(args := parse(argv), args.method, parse(["--method", args.method]), prepare)

if __name__ == "__main__":
    squeeze.script(main)
