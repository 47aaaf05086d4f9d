"""baselines.py: other methods' objectives as pairs of filters (Theorem 1), run by recover.py's own loop.

    python baselines.py --method mtt                                      toy images
    python baselines.py --method dm --dataset cifar10 --network convnet --ipc 10

Every objective compares  f(FFC) g(FLC)  of the real and the synthetic set; METHODS says with which. The run folder is
like recover.py's, so relabel.py and eval.py take it as it is.

These are the linear-head forms of the theory on one trained teacher, under CFM's recipe (start, cross-entropy, views).
They leave out what the published methods add: DM and DC draw many random networks, MTT matches trajectories of a whole
network, FrePo keeps a pool of networks. So no number made here is the published method's number.
"""
import torch

import recover
import squeeze
from spectral import gradient_descent, identity, low_pass, ridge
from squeeze import BadInput, number


# ---------------------------------------------------------------------------------------------------------------------
# The table: flags -> pairs (g, f) or (g, f_real, f_syn) as spectral.matching takes them. g: "I" matches filters
# f(Psi), "diag" their diagonals, "x" signals f(Psi) Phi.

def dm(args):
    """Eq. 2: class means, || H^T Y - H_s^T Y_s ||. All-pass: nothing is weighted, so what is large dominates."""
    return [("x", identity)]


def sre2l(args):
    """Eq. 3: BatchNorm's statistics, || diag FFC - diag FFC_s || + || mean - mean_s || of (here) convolution inputs."""
    return [("diag", low_pass), ("x", identity)]


def dc(args):
    """Eq. 4-5: the gradient of a linear head is FFC W - FLC, so for any W the gradients differ by at most
    || FFC - FFC_s || ||W|| + || FLC - FLC_s ||. The bound is what is minimised."""
    return [("I", low_pass), ("x", identity)]


def covm(args):
    """DM with covariance matching on top: DC's pairs, of the centred FFC."""
    return [("x", identity), ("I", low_pass)]


def mtt(args):
    """Eq. 6-9: p steps of gradient descent on a linear head turn W_0 into
    (I - eta FFC)^p W_0 + eta sum_{i<p} (I - eta FFC)^i FLC: one filter before W_0, one before FLC; q steps on ours.
    eta: --eta, or 1 / lambda_max of each real layer, which leaves the synthetic spectrum a factor of 2 to overshoot."""
    def pairs(psi):
        eta = args.eta or 1 / torch.linalg.eigvalsh(psi)[..., -1:]
        return list(zip("Ix", gradient_descent(eta, args.p), gradient_descent(eta, args.q)))
    return pairs


def frepo(args):
    """Eq. 10-14: kernel ridge regression, H H^T + beta I by its dual: || (FFC + beta I)^-1 FLC - (...)_s ||."""
    return [("x", ridge(args.beta))]


# Which FLC they look at, and whether FFC is centred: DC, MTT and FrePo are derived for a linear head without bias, so
# theirs is H^T H / n.
METHODS = {"dm": (dm, "class", True), "sre2l": (sre2l, "mean", True), "dc": (dc, "class", False),
           "covm": (covm, "class", True), "mtt": (mtt, "class", False), "frepo": (frepo, "class", False)}


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def pairs_for(args, real):
    """recover.distil's pairs_of: the same in every round, there is no curriculum. BadInput if --eta is unstable:
    gradient descent diverges for eta * lambda > 2."""
    largest = max(torch.linalg.matrix_norm(layer.uncentred, 2) for layer in real.values())
    if (args.eta or 0) * largest > 2:
        raise BadInput(f"--eta {args.eta}: gradient descent diverges, eta * lambda is {args.eta * largest:.3g}: "
                       f"use at most {2 / largest:.3g}, or leave it out to have it chosen")
    return lambda k: METHODS[args.method][0](args)


def parse(argv):
    parser = squeeze.Parser(__doc__)
    parser.add_argument("--method", required=True, choices=list(METHODS), help="whose pairs of filters")
    recover.add_flags(parser)
    add = parser.add_argument_group("spectra").add_argument
    add("--layers", choices=["conv", "last"], default="conv",
        help="all convolutions' inputs, as CFM, or the last linear layer's alone, the theory's H")
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
    return args


def main(argv):
    args = parse(argv)
    recover.run(args, args.method, parse(["--method", args.method]), pairs_for)


if __name__ == "__main__":
    squeeze.script(main)
