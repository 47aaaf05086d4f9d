"""Speed and memory of every stage against a plain reference and against the bare network; run by hand, never by pytest.

    python tests/bench.py                      all cases that fit the device
    python tests/bench.py --cases convnet-32-10 resnet18-32-100 --repetitions 5
    python tests/bench.py --growth             recover's time an image and memory against IPC and classes, alone
    python tests/bench.py --operations         what a step asks of the device, views not counted, on the way that CUDA takes
    python tests/bench.py --parity DIR         image gradients at small alpha in a teacher's precision, against float64;
                                               --precision bfloat16: in that one (slow where it is emulated)

The reference step is the paper's, written the plain way: unfolded network, contiguous NCHW, float32, a covariance and
two torch.linalg.solve a layer and side, the real side anew at each step. Before any timing both must give the same
loss (1e-3) and the same image gradient (1e-2, relative) in float32, and at the smallest alpha of a hundred rounds, in
the precision that runs, ours must point where float64 does (cosine 0.8). Then ours and the bare network run as the
scripts do, in bfloat16 on CUDA and on CPUs that have it. Repetitions are interleaved, since machines drift; a row is the
median of the per-repetition ratios. Peak memory comes from one process per variant: CUDA's counter, or the resident
set on a CPU. Prints a table and writes bench.json (--growth: growth.json) beside this file.
"""
import argparse
import copy
import json
import platform
import statistics as stats
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval as evaluation
import recover
import relabel
import spectral
import squeeze

CASES = {"convnet-32-10": ("convnet", 32, 10), "convnet-32-100": ("convnet", 32, 100),
         "resnet18-32-100": ("resnet18", 32, 100),
         "resnet18-64-200": ("resnet18", 64, 200), "resnet18-224-500": ("resnet18", 224, 500),
         "resnet18-224-8": ("resnet18", 224, 8)}
HALF = dict(mean=[0.5] * 3, std=[0.25] * 3)
ALPHA, GAMMA, SMALLEST = 0.1, 0.1, spectral.alpha_schedule(99, 100, 0.1)


def setup(case):
    """Network (random weights, running statistics of real use), images, labels and real-side statistics for a case."""
    name, size, B = CASES[case]
    torch.manual_seed(0)
    network = squeeze.build_network(name, 10, size)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 3, size, size))
    network.to(squeeze.pick_device()).eval().requires_grad_(False)
    network.precision = squeeze.native_precision(squeeze.pick_device())
    images = squeeze.toy(-(-B // 10), 10, 0, size)[0][:B]
    images = squeeze.normalise(images.to(squeeze.pick_device()), **HALF)
    with spectral.collect_inputs(network, transform=spectral.moments) as seen, torch.no_grad():
        network(images.flip(-1).roll(3, 2)[: max(2, B // 2)])
    return network, images, torch.arange(B, device=images.device) % 10, dict(seen)


def reference_loss(network, view, labels, real):
    """Eq. 19-20 as the paper writes them."""
    with spectral.collect_inputs(network) as features:
        logits = network(view)
    loss = F.cross_entropy(logits, labels)
    for name, x in features.items():
        X = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        mean = X.mean(0, keepdim=True)
        psi, eye = (X - mean).T @ (X - mean) / len(X), torch.eye(X.shape[1], device=X.device)
        real_psi, real_mean = real[name].ffc, real[name].mean[:, None]
        filters = [torch.linalg.solve(m + ALPHA * eye, eye) for m in (real_psi, psi)]
        signals = [torch.linalg.solve(m + ALPHA * eye, v) for m, v in ((real_psi, real_mean), (psi, mean.T))]
        loss = loss + GAMMA * (torch.linalg.norm(filters[0] - filters[1]) + torch.linalg.norm(signals[0] - signals[1]))
    return loss


def reference_steps(network, images, labels, real, T):
    images = images.contiguous(memory_format=torch.contiguous_format).clone().requires_grad_()
    optimizer = torch.optim.Adam([images], 0.1, betas=(0.5, 0.9))
    view = recover.random_views(np.random.default_rng(0), T, images, recover.CFM["smallest"])
    for t in range(T):
        loss = reference_loss(network, view(images, t).contiguous(), labels, real)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def our_steps(network, images, labels, real, T):
    """recover.py's own loop, with what it prepares once a round."""
    job = squeeze.Namespace(**recover.CFM, network=network, teacher=HALF, select=spectral.is_main_convolution, step=None,
                            loss=spectral.matching(real, spectral.cfm_pairs(ALPHA)), report=lambda *found: None)
    args = squeeze.Namespace(iterations=T, lr=0.1, gamma=GAMMA, signal="mean", emu="off")
    levels = ((images * 0.25 + 0.5) * 255).round().clamp(0, 255).to(torch.uint8)
    recover.make_batch(job, args, levels, labels, {}, np.random.default_rng(0))


def bare_steps(network, images, labels, real, T):
    """The limit: the folded network forward and backward to the images, with cross-entropy alone and no views."""
    images = images.clone().requires_grad_()
    for _ in range(T):
        loss = F.cross_entropy(squeeze.forward(network, images), labels)
        images.grad, = torch.autograd.grad(loss, images)
    loss.item()


class RoundedFirst(spectral._Covariance):
    """The covariance with what was a defect until November 2026: A in bfloat16 before the product."""

    @staticmethod
    def backward(ctx, G, g):
        X, mean = ctx.saved_tensors
        A = (G + G.T) / len(X)
        return torch.addmm((g / len(X) - A @ mean).to(X.dtype), X, A.to(X.dtype))


def image_gradients(network, images, labels, real, memory, alpha):
    """(of cross-entropy, of the matching loss), in the images' precision; float32 means the network's own."""
    leaf = images.clone().requires_grad_()
    real = {name: layer.to(leaf.dtype) for name, layer in real.items()}
    matching = spectral.matching(real, spectral.cfm_pairs(alpha))
    with spectral.collect_inputs(network, transform=spectral.moments) as layers:
        logits = squeeze.forward(network, leaf)
        memory = {name: layer.to(leaf.dtype) for name, layer in memory.items()}
        losses = F.cross_entropy(logits.to(leaf.dtype), labels), matching(layers, memory)
    return [torch.autograd.grad(loss, leaf, retain_graph=True)[0].double().flatten() for loss in losses]


def cosines(network, images, labels, real, memory, alpha):
    """Cosine with float64 of the image gradients: (cross-entropy's, the matching loss's, and that with A rounded
    first)."""
    exact = copy.deepcopy(network).double()
    exact.precision, now = "float32", spectral._Covariance
    wanted = image_gradients(exact, images.double(), labels, real, memory, alpha)
    out = [F.cosine_similarity(a, b, dim=0).item() for a, b in
           zip(image_gradients(network, images, labels, real, memory, alpha), wanted)]
    try:
        spectral._Covariance = RoundedFirst
        found = image_gradients(network, images, labels, real, memory, alpha)[1]
    finally:
        spectral._Covariance = now
    return *out, F.cosine_similarity(found, wanted[1], dim=0).item()


def parity(folder, precision):
    """The table of cosines for the last round of IPC 1, 10, 50 and 100, with EMU (the rounds before it are real images)
    and without, on a trained teacher and its own statistics."""
    device = squeeze.pick_device()
    network, teacher, config = recover.load_teacher(folder, device)
    network.precision = precision or network.precision
    s, K = config["settings"], len(teacher["classes"])
    data = squeeze.load_data(s["dataset"], s["data"], s["size"], s["classes"], s["validate"])
    found = squeeze.load_state(squeeze.checked(folder, "statistics.pt", config))
    real = {name: spectral.Statistics(**layer).to(device) for name, layer in found["layers"].items()
            if name != found["head"]}
    index, labels = recover.starting_images(data, 100, found["confidence"]), torch.arange(K, device=device)
    norm = {key: teacher[key] for key in ("mean", "std")}
    load = lambda k: squeeze.normalise(recover.take(data, data.train, index[k]).to(device), **norm)
    print(f"{folder}, {network.precision}: cosine of image gradients with float64's\n{'alpha':>9s} {'EMU':>4s} "
          f"{'cross-entropy':>14s} {'matching':>9s} {'A rounded first':>16s}")
    for ipc in (1, 10, 50, 100):
        alpha, memory = spectral.alpha_schedule(ipc - 1, ipc, 0.1), {}
        with torch.no_grad(), spectral.collect_inputs(network, transform=spectral.moments) as layers:
            for k in range(ipc - 1):
                network(load(k))
                memory = spectral.merge(memory, layers)
        for emu, old in {"no": {}, "yes": memory}.items():
            if old or emu == "no":
                values = cosines(network, load(ipc - 1), labels, real, old, alpha)
                print(f"{alpha:9.2g} {emu:>4s} {values[0]:14.3f} {values[1]:9.3f} {values[2]:16.3f}", flush=True)


class Counted(TorchDispatchMode):
    """Counts operations that give new tensors or write into old ones: on a GPU, about what is launched."""
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        view = any(out.alias_info and not out.alias_info.is_write for out in function._schema.returns)
        self.seen += not view
        return function(*args, **(kwargs or {}))


def operations(cases):
    """A step's operations, of the reference and of ours: the difference of four steps and two, halved."""
    torch.Tensor.is_cpu = False                            # what spectral.py asks
    for case in cases:
        counts = {}
        for variant in ("reference", "ours"):
            function, args = prepared(case, variant)
            for T in (2, 4):
                with Counted() as counts[T]:
                    function(*args, T)
            counts[variant] = (counts[4].seen - counts[2].seen) / 2
        print(f"{case:18s} reference {counts['reference']:5.0f}, ours {counts['ours']:5.0f} operations a step")


def check_agreement(case):
    """Same loss to 1e-3 and same image gradient to 1e-2 in float32 (CUDA's convolutions too), on whole images; then, on
    ten of them at the smallest alpha and in the precision that runs, the cosine with float64."""
    torch.backends.cudnn.allow_tf32 = False                # else a ResNet-18's two gradients differ by 8 % on an H100
    network, images, labels, real = setup(case)
    plain = images.contiguous(memory_format=torch.contiguous_format).clone().requires_grad_()
    expected = reference_loss(network.to(memory_format=torch.contiguous_format), plain, labels, real)
    wanted, = torch.autograd.grad(expected, plain)
    squeeze.fold(network).to(memory_format=torch.channels_last)
    leaf = images.clone().requires_grad_()
    with spectral.collect_inputs(network, transform=spectral.moments) as layers:
        loss = F.cross_entropy(network(leaf), labels)
        loss = loss + GAMMA * spectral.matching(real, spectral.cfm_pairs(ALPHA))(layers)
    found, = torch.autograd.grad(loss, leaf)
    torch.backends.cudnn.allow_tf32 = True                 # PyTorch's default, and what both are timed with
    errors = abs(loss - expected).item() / expected.item(), ((found - wanted).norm() / wanted.norm()).item()
    assert errors[0] < 1e-3 and errors[1] < 1e-2, f"{case}: loss off by {errors[0]:.1e}, gradient by {errors[1]:.1e}"
    # with random weights some layers are so large that float32 does not resolve that alpha: then the least it does
    alpha = max(SMALLEST, 1e-6 * max(torch.linalg.matrix_norm(layer.ffc).item() for layer in real.values()))
    cosine = cosines(network, images[:10], labels[:10], real, {}, alpha)
    print(f"{case}: at alpha {alpha:.1e} in {network.precision}, cosine {cosine[1]:.3f} (cross-entropy "
          f"{cosine[0]:.3f})")
    assert cosine[1] > 0.8, f"{case}: at alpha {alpha:.1e} the gradient's cosine with float64 is {cosine[1]:.3f}"
    return *errors, cosine[1]


VARIANTS = {"reference": reference_steps, "ours": our_steps, "bare": bare_steps}


def prepared(case, variant):
    network, *rest = setup(case)
    if variant == "reference":
        return VARIANTS[variant], (network.to(memory_format=torch.contiguous_format), *rest)
    return VARIANTS[variant], (squeeze.fold(network), *rest)


def peaks(case):
    """{variant: peak memory in MB of a fresh process that takes three steps}, side by side on CUDA, which counts alone."""
    def one(variant):
        out = subprocess.run([sys.executable, __file__, "--peak", case, variant], capture_output=True, text=True,
                             check=True)
        return float(out.stdout.split()[-1])
    with ThreadPoolExecutor(len(VARIANTS) if torch.cuda.is_available() else 1) as pool:
        return dict(zip(VARIANTS, pool.map(one, VARIANTS)))


def synchronise():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function, *args):
    synchronise()
    start = time.perf_counter()
    function(*args)
    synchronise()
    return time.perf_counter() - start


def recover_rows(cases, repetitions, steps):
    rows = []
    for case in cases:
        errors = check_agreement(case)
        runs = {variant: prepared(case, variant) for variant in VARIANTS}
        for function, args in runs.values():
            function(*args, 1)
        # a hundred are a batch of recover.py on CIFAR: what it prepares once a batch is to weigh here as it does there
        T = steps or max(2, min(100, int(10 / timed(runs["reference"][0], *runs["reference"][1], 1))))
        seconds = [{variant: timed(function, *args, T) / T for variant, (function, args) in runs.items()}
                   for _ in range(repetitions)]
        speedup = [s["reference"] / s["ours"] for s in seconds]
        row = {"case": case, **{v: stats.median(s[v] for s in seconds) for v in VARIANTS},
               "speedup": stats.median(speedup),
               "spread": [min(speedup), max(speedup)],
               "over_bare": stats.median(s["ours"] / s["bare"] for s in seconds),
               "memory": peaks(case), "loss_error": errors[0], "gradient_error": errors[1],
               "cosine": errors[2]}
        rows.append(row)
        print(f"{case:18s} {1e3 * row['reference']:9.1f} {1e3 * row['ours']:9.1f} {1e3 * row['bare']:9.1f} ms   "
              f"{row['speedup']:5.2f}x ({min(speedup):.2f}-{max(speedup):.2f})   {row['over_bare']:5.2f} of bare   "
              f"{row['memory']['ours']:6.0f} / {row['memory']['reference']:6.0f} MB", flush=True)
    return rows


def stage_rows(repetitions, n=1000):
    """Statistics, relabel and eval in images/s for ConvNet-128 at 32 px, each beside the bare network's rate."""
    device = squeeze.pick_device()
    images, labels = squeeze.toy(n // 10, 10, 0)
    data = squeeze.Data([str(i) for i in range(10)], 32, squeeze.Split(images, labels), None, "")
    precision = squeeze.native_precision(device)
    build = lambda: squeeze.build_network("convnet", 10, 32, precision).to(device)
    network, teacher = squeeze.fold(build()), dict(mean=[0.5] * 3, std=[0.25] * 3)
    whole, views = images.to(device), relabel.draw_views(0, 0, n, 32, 0.08, device)
    batch, student = squeeze.normalise(whole[:50], [0.5] * 3, [0.25] * 3), build()
    content = dict(classes=data.classes, mean=[0.5] * 3, std=[0.25] * 3, precision=precision)
    args = squeeze.fill(evaluation.parse(["RUN"]), dict(batch=50, epochs=5))
    args.network, labels = "convnet", dict(keep_epochs=5, seed=0, scale=0.08)
    job = squeeze.Namespace(seed=0, content=content, images=whole[:100], views=labels, identity={})
    evaluation.targets = lambda *args: torch.zeros(100, 10, device=device)

    @torch.no_grad()
    def forward(size):
        for part in whole.split(size):
            squeeze.forward(network, squeeze.normalise(part, [0.5] * 3, [0.25] * 3))

    def train():
        for _ in range(10):
            squeeze.forward(student, batch).square().mean().backward()
    jobs = {"statistics": (lambda: squeeze.gather_statistics(network, data, teacher, 128), n,
                           lambda: forward(128), n),
            "relabel": (lambda: relabel.soft_labels(network, teacher, whole, views, 500), n,
                        lambda: forward(500), n),
            "eval": (lambda: evaluation.train_student(job, args, Path("no checkpoint")), 500, train, 500)}
    rows = []
    for stage, (ours, count, bare, bare_count) in jobs.items():
        ours(), bare()
        pairs = [(count / timed(ours), bare_count / timed(bare)) for _ in range(repetitions)]
        row = {"stage": stage, "images_per_second": stats.median(a for a, _ in pairs),
               "bare": stats.median(b for _, b in pairs),
               "share": stats.median(a / b for a, b in pairs)}
        rows.append(row)
        print(f"{stage:18s} {row['images_per_second']:8.0f} images/s, bare network {row['bare']:8.0f}: "
              f"{100 * row['share']:.0f} %", flush=True)
    return rows


GROWTH = [(1, 10), (10, 10), (50, 10), (100, 10), (10, 100), (10, 200)]       # IPC, classes


def growth(ipc, classes):
    """Seconds an image and peak MB of recover's loop in this process: chunks of 10 classes, 5 iterations a batch, out
    of 20,000 toy images whatever IPC and classes are."""
    device = squeeze.pick_device()
    images, labels = squeeze.toy(20000 // classes, classes, 0)
    data = squeeze.Data([str(c) for c in range(classes)], 32, squeeze.Split(images, labels), None, "")
    network = squeeze.fold(squeeze.build_network("convnet", classes, 32, squeeze.native_precision(device)).to(device))
    some = data._replace(train=squeeze.Split(images[::20], labels[::20]))
    found = squeeze.gather_statistics(network, some, HALF, 100)
    args = squeeze.fill(recover.parse(["--ipc", str(ipc), "--iterations", "5", "--batch", "10"]),
                        {**squeeze.PRESETS["toy"]["recover"], **squeeze.PRESETS["toy"]["ours"]})
    real = {name: spectral.Statistics(**layer).to(device) for name, layer in found["layers"].items()
            if name != found["head"]}
    with tempfile.TemporaryDirectory() as folder:
        job = squeeze.Namespace(**recover.CFM, folder=Path(folder), data=data, network=network, real=real,
                                select=spectral.is_main_convolution, teacher={**HALF, "classes": data.classes},
                                index=recover.starting_images(data, ipc))
        seconds = recover.distil(job, args)
    return seconds / (ipc * classes), recover.peak_memory(device)


def growth_rows():
    rows = []
    for ipc, classes in GROWTH:
        out = subprocess.run([sys.executable, __file__, "--growth-of", str(ipc), str(classes)], capture_output=True,
                             text=True, check=True).stdout.split()
        rows.append(dict(ipc=ipc, classes=classes, seconds_per_image=float(out[-2]), peak_mb=float(out[-1])))
        print(f"IPC {ipc:3d}, {classes:3d} classes: {1e3 * rows[-1]['seconds_per_image']:6.1f} ms an image, "
              f"{rows[-1]['peak_mb']:5.0f} MB", flush=True)
    return rows


def main():
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES),
                        default=[case for case in CASES if case != ("resnet18-224-8" if cuda else "resnet18-224-500")])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps a repetition (default: as many as fit in 10 s, 2 to 100)")
    parser.add_argument("--growth", action="store_true", help="only recover's growth; writes growth.json")
    parser.add_argument("--parity", metavar="DIR", help="only the table of cosines, of this squeeze run")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="--parity: instead of the teacher's")
    parser.add_argument("--operations", action="store_true", help="only the operations a step")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--growth-of", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    squeeze.keep_freed_memory()
    if args.operations:
        return operations(args.cases)
    if args.parity:
        return parity(args.parity, args.precision)
    if args.peak:
        function, rest = prepared(*args.peak)
        function(*rest, 3)
        return print(recover.peak_memory(squeeze.pick_device()))
    if args.growth_of:
        return print(*growth(*args.growth_of))
    if args.growth:
        return Path(__file__).with_name("growth.json").write_text(json.dumps(growth_rows(), indent=1) + "\n")
    device = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}\n{'recover step':18s} {'reference':>9s} {'ours':>9s} {'bare':>9s}")
    result = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
              "recover": recover_rows(args.cases, args.repetitions, args.steps),
              "stages": stage_rows(args.repetitions)}
    Path(__file__).with_name("bench.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
