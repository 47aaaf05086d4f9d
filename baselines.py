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
from spectral import gradient_descent, identity, low_pass, ridge
from squeeze import BadInput, number


# ---------------------------------------------------------------------------------------------------------------------
# The table: settings -> pairs (g, f) or (g, f_real, f_syn) as spectral.matching takes them. g: "I" matches filters
# f(Psi), "diag" their diagonals, "x" signals f(Psi) Phi.

def dm(s):
    """Eq. 2: class means, || H^T Y - H_s^T Y_s ||. All-pass: nothing is weighted, so what is large dominates."""
    return [("x", identity)]


def sre2l(s):
    """Eq. 3: BatchNorm's statistics, || diag FFC - diag FFC_s || + || mean - mean_s || of (here) convolution inputs."""
    return [("diag", low_pass), ("x", identity)]


def dc(s):
    """Eq. 4-5: the gradient of a linear head is FFC W - FLC, so for any W the gradients differ by at most
    || FFC - FFC_s || ||W|| + || FLC - FLC_s ||. The bound is what is minimised."""
    return [("I", low_pass), ("x", identity)]


def covm(s):
    """DM with covariance matching on top: DC's pairs, of the centred FFC."""
    return [("x", identity), ("I", low_pass)]


def mtt(s):
    """Eq. 6-9: p steps of gradient descent on a linear head turn W_0 into
    (I - eta FFC)^p W_0 + eta sum_{i<p} (I - eta FFC)^i FLC: one filter before W_0, one before FLC; q steps on ours.
    eta: --eta, or 1 / lambda_max of each real layer, which leaves the synthetic spectrum a factor of 2 to overshoot."""
    def pairs(psi):
        eta = s["eta"] or 1 / torch.linalg.eigvalsh(psi)[..., -1:]
        return list(zip("Ix", gradient_descent(eta, s["p"]), gradient_descent(eta, s["q"])))
    return pairs


def frepo(s):
    """Eq. 10-14: kernel ridge regression, H H^T + beta I by its dual: || (FFC + beta I)^-1 FLC - (...)_s ||."""
    return [("x", ridge(s["beta"]))]


# Their FLC, and whether FFC is centred: DC, MTT and FrePo are derived for a linear head without bias (H^T H / n).
METHODS = {"dm": (dm, "class", True), "sre2l": (sre2l, "mean", True), "dc": (dc, "class", False),
           "covm": (covm, "class", True), "mtt": (mtt, "class", False), "frepo": (frepo, "class", False)}


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def pairs_for(s, real):
    """recover.distil's pairs_of, the same in every round. BadInput if gradient descent diverges: eta * lambda > 2."""
    largest = max(torch.linalg.matrix_norm(layer.uncentred, 2) for layer in real.values())
    if (s["eta"] or 0) * largest > 2:
        raise BadInput(f"--eta {s['eta']}: gradient descent diverges, eta * lambda is {s['eta'] * largest:.3g}: "
                       f"use at most {2 / largest:.3g}, or leave it out to have it chosen")
    return lambda k: METHODS[s["method"]][0](s)


def parse(argv):
    parser = squeeze.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", required=True, choices=list(METHODS))
    recover.add_flags(parser)
    parser.add_argument("--eta", type=number(float, 0, strict=True), help="mtt: rate (default: 1 / lambda_max)")
    parser.add_argument("--p", type=number(int, 1), help="mtt: steps on the real side (default 10)")
    parser.add_argument("--q", type=number(int, 1), help="mtt: steps on the synthetic side (default 10)")
    parser.add_argument("--beta", type=number(float, 0, strict=True), help="frepo: ridge, > 0 (default 0.01)")
    parser.add_argument("--layers", choices=["conv", "last"], default="conv",
                        help="all convolutions' inputs, as CFM, or the last linear layer's alone, the theory's H")
    args = parser.parse_args(argv)
    for flag, owner, default in (("eta", "mtt", None), ("p", "mtt", 10), ("q", "mtt", 10), ("beta", "frepo", 0.01)):
        if getattr(args, flag) is not None and args.method != owner:
            raise BadInput(f"--{flag} is for --method {owner}, found {args.method}: leave it out")
        setattr(args, flag, getattr(args, flag) or default)
    args.signal, args.uncentred = METHODS[args.method][1], not METHODS[args.method][2]
    return args


def main(argv):
    args = parse(argv)
    recover.run(args, args.method, vars(parse(["--method", args.method])), pairs_for)


if __name__ == "__main__":
    squeeze.script(main)
