"""baselines.py: other methods' objectives as pairs of filters (Theorem 1), run by recover.py's own loop.

    python baselines.py --method mtt                                      toy images
    python baselines.py --method dm --dataset cifar10 --network convnet --ipc 10

Every objective compares  f(FFC) g(FLC)  of the real and the synthetic set; METHODS says with which. The run folder is
like recover.py's, so relabel.py and eval.py take it as it is.

These are the linear-head forms of the theory on one trained teacher, under CFM's recipe (real start, cross-entropy,
views). They leave out what the published methods add: DM and DC draw many random networks, MTT matches trajectories
of a whole network, FrePo keeps a pool of networks. So no number made here is the published method's number.
"""
import argparse

import torch

import recover
import squeeze
from spectral import gradient_descent, gradient_descent_sum, identity, low_pass, ridge
from squeeze import BadInput, number


# ---------------------------------------------------------------------------------------------------------------------
# The table: settings and the real spectrum of a layer -> pairs (g, f_real, f_syn), and which FLC they look at.
# g: "I" matches filters f(Psi), "diag" their diagonals, "x" signals f(Psi) Phi.

def dm(s, eta):
    """Eq. 2: class means, || H^T Y - H_s^T Y_s ||. All-pass: nothing is weighted, so what is large dominates."""
    return [("x", identity(), identity())]


def sre2l(s, eta):
    """Eq. 3: BatchNorm's statistics, || diag FFC - diag FFC_s || + || mean - mean_s || of (here) convolution inputs."""
    return [("diag", low_pass(), low_pass()), ("x", identity(), identity())]


def dc(s, eta):
    """Eq. 4-5: the gradient of a linear head is FFC W - FLC, so for any W the gradients differ by at most
    || FFC - FFC_s || ||W|| + || FLC - FLC_s ||. The bound is what is minimised."""
    return [("I", low_pass(), low_pass()), ("x", identity(), identity())]


def covm(s, eta):
    """DM with covariance matching on top: DC's pairs, of the centred FFC."""
    return dm(s, eta) + [("I", low_pass(), low_pass())]


def mtt(s, eta):
    """Eq. 6-9: p steps of gradient descent on a linear head turn W_0 into
    (I - eta FFC)^p W_0 + eta sum_{i<p} (I - eta FFC)^i FLC: one filter before W_0, one before FLC; q steps on ours."""
    return [("I", gradient_descent(eta, s["p"]), gradient_descent(eta, s["q"])),
            ("x", gradient_descent_sum(eta, s["p"]), gradient_descent_sum(eta, s["q"]))]


def frepo(s, eta):
    """Eq. 10-14: kernel ridge regression, H H^T + beta I by its dual: || (FFC + beta I)^-1 FLC - (...)_s ||."""
    return [("x", ridge(s["beta"]), ridge(s["beta"]))]


# What FFC and FLC are: DC, MTT and FrePo are derived for a linear head without bias, so theirs is H^T H / n, uncentred.
METHODS = {"dm": (dm, "class", False), "sre2l": (sre2l, "mean", False), "dc": (dc, "class", True),
           "covm": (covm, "class", False), "mtt": (mtt, "class", True), "frepo": (frepo, "class", True)}


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def step_size(s, psi):
    """MTT's eta for a stack of layers psi [L, C, C], as [L, 1]: --eta, or 1 / lambda_max of each layer.

    Gradient descent diverges for eta * lambda > 2. 1 / lambda_max leaves the synthetic spectrum a factor of 2 to
    overshoot.
    """
    largest = torch.linalg.eigvalsh(psi)[:, -1:]
    if s["eta"] is None:
        return 1 / largest
    if s["eta"] * largest.max() > 2:
        raise BadInput(f"--eta {s['eta']}: gradient descent diverges, eta * lambda is {s['eta'] * largest.max():.3g}: "
                       f"use at most {2 / largest.max():.3g}, or leave it out to have it chosen")
    return s["eta"] * torch.ones_like(largest)


def pairs_for(s):
    """settings -> pairs_of(k, psi) as recover.distil wants it; the same in every round: there is no curriculum."""
    method, _, _ = METHODS[s["method"]]
    return lambda k, psi: method(s, step_size(s, psi) if s["method"] == "mtt" else None)


def parse(argv):
    parser = squeeze.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, choices=list(METHODS))
    recover.add_flags(parser)
    parser.add_argument("--eta", type=number(float, 0, strict=True),
                        help="mtt: rate (default: 1 / lambda_max of each layer)")
    parser.add_argument("--p", type=number(int, 1), help="mtt: steps on the real side (default 10)")
    parser.add_argument("--q", type=number(int, 1), help="mtt: steps on the synthetic side (default 10)")
    parser.add_argument("--beta", type=number(float, 0, strict=True),
                        help="frepo: ridge, > 0 (default 0.01)")
    parser.add_argument("--layers", choices=["conv", "last"], default="conv",
                        help="all convolutions' inputs, as CFM, or the last linear layer's alone, the theory's H")
    args = parser.parse_args(argv)
    for flag, owner, default in (("eta", "mtt", None), ("p", "mtt", 10), ("q", "mtt", 10), ("beta", "frepo", 0.01)):
        if getattr(args, flag) is not None and args.method != owner:
            raise BadInput(f"--{flag} is for --method {owner}, found {args.method}: leave it out")
        setattr(args, flag, getattr(args, flag) or default)
    _, args.signal, args.uncentred = METHODS[args.method]
    return args


def main(argv):
    args = parse(argv)
    recover.run(args, args.method, vars(parse(["--method", args.method])), pairs_for)


if __name__ == "__main__":
    squeeze.script(main)
