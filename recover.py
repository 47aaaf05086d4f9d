"""Stage 2, recover: optimise the synthetic images until their spectra match the real ones (Curriculum Frequency
Matching).

    python recover.py                                                    toy images, one to two minutes on two CPU cores
    python recover.py --dataset cifar10 --network convnet --ipc 10       a minute or less on one CPU core
    python recover.py --dataset cifar10 --network convnet --preset paper the paper's settings, 3 to 13 minutes
    python recover.py --dataset tiny --ipc 100 --alpha-max 1             the paper's settings, one GPU
    python recover.py --iterations 0                                     the honest rival: real images, untouched

Images are made in batches, one image of every class (or of a chunk of the classes) at a time. All batches of round k,
the k-th images of all classes, share alpha_k, which falls from alpha_max toward 0: early images match the low
frequencies of the teacher's features, late ones the high. One batch: start from real images; at each iteration take a
random view, push it through the frozen teacher, and step on  CE + gamma * sum over layers of (filter loss + signal
loss)  (Eq. 19-20).

Writes runs/<dataset>-<network>/<run>/ with images.pt, preview.png, config.json and log.jsonl. A missing teacher is
squeezed first. Baselines run through the same loop (baselines.py).
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image

import spectral
import squeeze
from squeeze import BadInput, number

PRESETS = {                                                # paper, Tables 9-12; toy is ours
    "toy": dict(alpha_max=0.1, iterations=100, lr=0.1, batch=10, gamma=0.1, init="real", emu="paper"),
    "cifar10": dict(alpha_max=0.1, iterations=1000, lr=0.25, batch=10, gamma=0.1, init="real", emu="paper"),
    "cifar100": dict(alpha_max=0.1, iterations=1000, lr=0.25, batch=100, gamma=0.1, init="real", emu="paper"),
    "tiny": dict(alpha_max=1.0, iterations=1000, lr=0.1, batch=200, gamma=0.1, init="real", emu="paper"),
    "imagenet": dict(alpha_max=0.1, iterations=1000, lr=0.1, batch=500, gamma=0.1, init="real", emu="paper"),
    "folder": dict(alpha_max=0.1, iterations=1000, lr=0.1, batch=200, gamma=0.1, init="real", emu="paper"),
}
# What did better where it was measured (README, "What the iterations buy"): a better start, steps that keep it, and a
# matching loss that outweighs cross-entropy.
OURS = {name: dict(init="confident", iterations=100, lr=0.02, gamma=10.0) for name in ("cifar10", "cifar100")}


# ---------------------------------------------------------------------------------------------------------------------
# The objective (spectral.matching): its pairs, its real side, and how batches join

def pairs_of_round(k, s):
    """The pairs of CFM in round k (Eq. 18-20), or of its ablations --filter high and low, --loss filter and signal."""
    pairs = spectral.cfm_pairs(alpha_of_round(k, s))
    return [pair for pair in pairs if s["loss"] in ("both", {"I": "filter", "x": "signal"}[pair[0]])]


def alpha_of_round(k, s):
    """alpha_k. high: alpha_max / 100 throughout, a fixed sharp filter; low: none, f is lambda."""
    if s["filter"] == "low":
        return None
    if s["filter"] == "high":
        return s["alpha_max"] / 100
    return spectral.alpha_schedule(k, s["ipc"], s["alpha_max"], s["schedule"])


def real_layers(found, s, device):
    """{name: Statistics} of the layers to match: the convolutions, or with --layers last the last linear layer."""
    share, last = found["class_counts"] / found["class_counts"].sum(), s.get("layers") == "last"
    return {name: spectral.Statistics(**{**layer, "share": share}).to(device)
            for name, layer in found["layers"].items() if (name == found["head"]) == last}


def collect(network, s, head, Y):
    """A context with the moments of the same layers. Y [B, K]: labels, looked at where signals are class-wise."""
    select = (lambda name, module: name == head) if s.get("layers") == "last" else spectral.is_main_convolution
    return spectral.collect_inputs(network, select, spectral.moments, Y if s["signal"] == "class" else None)


def step_of(b, s):
    """How batch b = 1, 2, ... joins those before it. --emu pool: as if all feature vectors were one set (None); paper:
    Eq. 17, the mean over batches, except for H^T H, whose mean is pooling."""
    return None if s["emu"] == "pool" or s.get("uncentred") else b


# ---------------------------------------------------------------------------------------------------------------------
# One batch

def random_views(rng, T, B, size, device):
    """The views of T iterations, drawn ahead with NumPy, the same on every device: view(images [B, 3, S, S], t). Crop
    and flip are drawn per image; a roll by 0-4 pixels is the batch's."""
    boxes = squeeze.crop_boxes(rng.random((T * B, 4)), (0.08, 1)).view(T, B, 4).to(device)
    flips = torch.from_numpy(rng.random((T, B)) < 0.5).to(device)
    rolls = rng.integers(0, 5, (T, 2)).tolist()

    def view(images, t):                                   # rolling the grid rolls the view
        return squeeze.resample(images, squeeze.crop_grid(boxes[t], flips[t], size).roll(rolls[t], (1, 2)))
    return view


def optimise(images, labels, network, matching_loss, s, teacher, rng, report):
    """T Adam steps on a batch of normalised images [B, 3, S, S]. matching_loss(): the loss of the network's last
    forward pass; report(t, cross-entropy, matching) is called every 100 iterations. Returns the images."""
    T, view = s["iterations"], random_views(rng, s["iterations"], len(images), images.shape[-1], images.device)
    black, white = (torch.full((1, 3, 1, 1), level, dtype=torch.uint8, device=images.device) for level in (0, 255))
    low, high = (squeeze.normalise(level, teacher["mean"], teacher["std"]) for level in (black, white))
    images.requires_grad_()
    optimizer = torch.optim.Adam([images], s["lr"], betas=(0.5, 0.9))
    for t in range(T):
        optimizer.param_groups[0]["lr"] = s["lr"] * (1 + math.cos(math.pi * t / T)) / 2
        with squeeze.autocast(network):
            logits = network(view(images, t))
        entropy, matching = F.cross_entropy(logits.float(), labels), matching_loss()
        images.grad, = torch.autograd.grad(entropy + s["gamma"] * matching, images)
        optimizer.step()
        with torch.no_grad():
            images.clamp_(low, high)
        if t % 100 == 99 or t == T - 1:                    # reading a loss waits for the GPU
            report(t + 1, entropy.item(), matching.item())
    return images.detach()


@torch.no_grad()
def view_statistics(images, network, current, teacher, rng, views, s):
    """What EMU remembers of a finished batch: {layer: Statistics} over random views of the images as saved, with the
    weight of one view.

    Views, since the next batches are seen through views: a crop blown up to full size has less high frequency than a
    whole image, and a memory of whole images would make late batches answer for the difference, b-fold.
    """
    images, seen = squeeze.normalise(images, teacher["mean"], teacher["std"]), {}
    view = random_views(rng, views, len(images), images.shape[-1], images.device)
    for t in range(views):
        with squeeze.autocast(network):
            network(view(images, t))
        seen = spectral.merge(seen, current, step_of(t + 1, s))
    return {name: layer._replace(count=layer.count // views) for name, layer in seen.items()}


def to_uint8(images, teacher):
    """Normalised [B, 3, S, S] -> uint8 levels, rounded (a truncating cast would darken by half a level)."""
    mean, std = (torch.tensor(teacher[v], device=images.device).view(1, 3, 1, 1) for v in ("mean", "std"))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).contiguous().cpu()


# ---------------------------------------------------------------------------------------------------------------------
# All batches

def initial_images(data, index, k, classes, s, rng):
    """uint8 [B, 3, S, S]: round k's training image of each class of the chunk, or Gaussian noise."""
    if index is not None:
        return squeeze.take(data, data.train, index[k, classes])
    noise = rng.normal(127.5, 64, (len(classes), 3, data.size, data.size))
    return torch.from_numpy(noise.clip(0, 255).astype(np.uint8))


def resumed(folder, chunks, K, pixels, device):
    """What a killed run left: batches done, their mean statistics (EMU) and the seconds they took."""
    if not (folder / "memory.pt").is_file():
        return dict(b=0, layers={}, seconds=0.0)
    memory, raw = squeeze.load_state(folder / "memory.pt"), folder / "images.raw"
    if not raw.is_file() or raw.stat().st_size < memory["b"] // chunks * K * pixels:
        raise BadInput(f"{raw}: not the {memory['b']} batches that memory.pt counts: remove {folder} and start again")
    print(f"resuming after batch {memory['b']}")
    memory["layers"] = {name: spectral.Statistics(*parts).to(device) for name, parts in memory["layers"].items()}
    return memory


def distil(folder, data, network, teacher, statistics, pairs_of, s, device):
    """Make all batches of a run, round by round. A finished one goes to images.raw at once, and memory.pt says how many
    there are and holds the EMU: a killed run goes on with the next batch, and memory does not grow with IPC.

    pairs_of(k): the pairs of round k, as spectral.matching takes them. Returns seconds.
    """
    K = len(data.classes)
    chunks = torch.arange(K).split(s["batch"])
    index = None if s["init"] == "noise" else starting_images(
        data, s["ipc"], statistics["confidence"] if s["init"] == "confident" else None)
    memory = resumed(folder, len(chunks), K, 3 * data.size**2, device)
    real, total, done = real_layers(statistics, s, device), s["ipc"] * len(chunks), memory["b"]
    start, before = time.time(), memory["seconds"]

    def report(t, entropy, matching):                      # b and k are the loop's
        rate = ((b - done) * s["iterations"] + t) / (time.time() - start)
        left = ((total - b) * s["iterations"] - t) / rate
        print(f"round {k + 1}/{s['ipc']} batch {b + 1}/{total} iteration {t}/{s['iterations']}  CE {entropy:.3f}  "
              f"matching {matching:.4g}  {rate:.1f} it/s  {left / 60:.1f} min left", flush=True)
        if not math.isfinite(entropy + matching):
            raise BadInput(f"{folder}: the loss is not finite in batch {b + 1}: lower --lr or raise --alpha-max")
        if t == s["iterations"]:
            squeeze.log(folder, batch=b + 1, round=k, ce=entropy, matching=matching)

    for b in range(done, total):
        k, here = b // len(chunks), chunks[b % len(chunks)]
        rng = np.random.default_rng([s["seed"], b])        # a batch's randomness depends on nothing before it
        classes = here.to(device)
        images = initial_images(data, index, k, here, s, rng)
        if s["iterations"]:
            if b == done or b % len(chunks) == 0:          # the real side is constant within a round
                loss = spectral.matching(real, pairs_of(k), s["signal"], not s.get("uncentred"))
            with collect(network, s, statistics["head"], F.one_hot(classes, K)) as current:
                step = step_of(b + 1, s)
                try:
                    images = optimise(squeeze.normalise(images.to(device), teacher["mean"], teacher["std"]), classes, network,
                                      lambda: loss(current, memory["layers"], step), s, teacher, rng, report)
                except ValueError as error:                # an alpha that the precision does not resolve
                    raise BadInput(str(error)) from error
                images = to_uint8(images, teacher)
                if s["emu"] != "off":
                    seen = view_statistics(images.to(device), network, current, teacher, rng, min(10, s["iterations"]), s)
                    memory["layers"] = spectral.merge(memory["layers"], seen, step)
        with open(folder / "images.raw", "r+b" if b else "wb") as file:
            file.seek(images[0].numel() * (k * K + int(here[0])))
            file.write(images.numpy().tobytes())
        memory.update(b=b + 1, seconds=before + time.time() - start)
        squeeze.save(folder / "memory.pt", {**memory, "layers": {name: tuple(seen) for name, seen in memory["layers"].items()}})
    return memory["seconds"]


def starting_images(data, ipc, confidence=None):
    """index [ipc, K]: row k holds the position of the k-th training image of every class; with confidence [n], of the
    k-th most confident one. BadInput if a class has fewer images."""
    columns = []
    for c, name in enumerate(data.classes):
        mine = (data.train.labels == c).nonzero().flatten()
        if len(mine) < ipc:
            raise BadInput(f"--ipc {ipc}: class {name!r} has {len(mine)} training images; use at most that many")
        if confidence is not None:
            mine = mine[confidence[mine].argsort(descending=True, stable=True)]
        columns.append(mine[:ipc])
    return torch.stack(columns, 1)


def finish(folder, config, teacher, s, seconds):
    """images.raw becomes images.pt, with all that is needed to use it, and preview.png (rows = classes)."""
    K, S, n = len(teacher["classes"]), teacher["size"], s["ipc"] * len(teacher["classes"])
    images = torch.from_file(str(folder / "images.raw"), size=n * 3 * S * S, dtype=torch.uint8).view(n, 3, S, S)
    squeeze.save(folder / "images.pt", dict(
        images=images, labels=torch.arange(K).repeat(s["ipc"]), classes=teacher["classes"], mean=teacher["mean"],
        std=teacher["std"], precision=teacher["precision"], settings={key: s[key] for key in s if key != "data"}, inputs=config["inputs"]))
    shown = images.view(s["ipc"], K, 3, S, S)[:10, :20].transpose(0, 1)
    save_image(make_grid(shown.reshape(-1, 3, S, S).float() / 255, nrow=shown.shape[1], padding=1),
               folder / "preview.png")
    squeeze.finish_run(folder, config, ["images.pt"], seconds=seconds, image_bytes=images.numel())
    for name in ("images.raw", "memory.pt"):
        (folder / name).unlink()


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def add_flags(parser):
    """The flags that recover.py and baselines.py share."""
    parser.add_argument("--teacher", metavar="DIR", help="the squeeze run to use (default: the data set's and network's, "
                        "made if absent)")
    parser.add_argument("--dataset", choices=list(PRESETS), help="default: the teacher's, or toy")
    parser.add_argument("--data", metavar="DIR",
                        help="where the data set lies (default: where squeeze.py found it, or data)")
    parser.add_argument("--network", choices=squeeze.TEACHERS,
                        help="the teacher (default: convnet for toy, else resnet18)")
    parser.add_argument("--ipc", type=number(int, 1), default=10, help="images per class (default 10)")
    parser.add_argument("--preset", choices=["ours", "paper"], default="ours",
                        help="what flags left out take; they differ on CIFAR: --init, --iterations, --lr, --gamma")
    parser.add_argument("--init", choices=["confident", "real", "noise"],
                        help="start from the training images the teacher is surest of (default on CIFAR), the first "
                        "ones of a class (elsewhere, and with --iterations 0), or noise")
    parser.add_argument("--iterations", type=number(int, 0), help="Adam steps a batch; 0: the random-real baseline")
    parser.add_argument("--lr", type=number(float, 0, strict=True),
                        help="Adam's learning rate on pixels, cosine to zero")
    parser.add_argument("--batch", type=number(int, 1), help="classes a batch, one image of each")
    parser.add_argument("--gamma", type=number(float, 0), help="weight of the matching losses (0.1; CIFAR: 10)")
    parser.add_argument("--emu", choices=["pool", "paper", "off"], help="memory of finished batches: their features as "
                        "one set (default), Eq. 17 (--preset paper), or none (the authors' code unless asked)")
    parser.add_argument("--seed", type=number(int, 0), default=0)
    parser.add_argument("--resume", action="store_true", help="continue what is in the run folder")


def parse(argv):
    parser = squeeze.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--alpha-max", type=number(float, 0, strict=True), help="where the curriculum starts, > 0")
    parser.add_argument("--schedule", choices=["cosine", "linear", "constant"], default="cosine",
                        help="of alpha over rounds")
    parser.add_argument("--filter", choices=["cfm", "high", "low"], default="cfm",
                        help="cfm: 1/(lambda + alpha_k); high: the same with alpha_max / 100 throughout; low: lambda")
    parser.add_argument("--loss", choices=["both", "filter", "signal"], default="both", help="which of Eq. 19's two")
    parser.add_argument("--signal", choices=["mean", "class"], default="mean",
                        help="FLC: mean [C], or class-wise [C, K]")
    args = parser.parse_args(argv)
    for flag, useless in (("alpha-max", args.filter == "low" and args.alpha_max),
                          ("schedule", args.filter != "cfm" and args.schedule != "cosine")):
        if useless:
            raise BadInput(f"--{flag} has no effect with --filter {args.filter}: leave it out")
    return args


def run_name(method, s, defaults):
    """The run's folder: method and IPC, then every setting that is not the default, so that no two runs share one."""
    if s["iterations"] == 0 and s["init"] != "noise":
        return f"{s['init']}-ipc{s['ipc']}"
    hidden = ("dataset", "data", "network", "teacher", "precision", "ipc", "filter", "method", "uncentred")
    return "-".join([method, f"ipc{s['ipc']}", *squeeze.changed(s, defaults, hidden)])


def preset_of(args):
    """What flags left out take: the paper's settings, or ours where we have some. Zero iterations are the random-real
    baseline under both."""
    ours = {"emu": "pool", **OURS.get(args.dataset, {})} if args.preset == "ours" and args.iterations != 0 else {}
    return {**PRESETS[args.dataset], "network": squeeze.PRESETS[args.dataset]["network"], **ours}


def choose_teacher(args):
    """The folder of the squeeze run to use and the flags that make it; what --teacher implies is filled into args."""
    if args.teacher:
        made = squeeze.read_config(args.teacher, "squeeze", True)["settings"]
        for flag in ("dataset", "network"):
            if getattr(args, flag) not in (None, made[flag]):
                raise BadInput(f"--{flag} {getattr(args, flag)}: --teacher {args.teacher} is of {made[flag]}: leave one out")
            setattr(args, flag, made[flag])
        return Path(args.teacher), []
    args.dataset = args.dataset or "toy"
    flags = ["--dataset", args.dataset, "--network", args.network or squeeze.PRESETS[args.dataset]["network"],
             "--data", args.data or "data"]
    return squeeze.teacher_folder(squeeze.settings(flags)), flags


def run(args, method, defaults, pairs_for):
    """The stage after its flags, for recover.py and baselines.py. pairs_for(settings, {name: Statistics} of the real
    set) -> distil's pairs_of."""
    parent, flags = choose_teacher(args)
    preset = preset_of(args)
    s, device = squeeze.resolve(args, preset), squeeze.pick_device()
    squeeze.show(s)
    made = squeeze.read_config(parent, "squeeze", args.resume)["settings"] if parent.is_dir() else {}
    s["data"] = s["data"] or made.get("data", "data")
    data = squeeze.load_data(s["dataset"], s["data"], *(made.get(key) for key in ("size", "classes", "validate")))
    if s["init"] != "noise":
        starting_images(data, s["ipc"])
    K, N = len(data.classes), s["ipc"] * len(data.classes)
    batches = s["ipc"] * math.ceil(K / s["batch"])
    print(f"plan: {s['ipc']} rounds of {K} images, {batches} batches of {s['iterations']} iterations on {device}; "
          f"images {3e-6 * N * data.size**2:.1f} MB, soft labels {2e-6 * N * K:.2f} MB an epoch", flush=True)
    squeeze.ensure(parent, flags, args.resume)
    network, teacher, parent_config = squeeze.load_teacher(parent, device)
    statistics = squeeze.load(parent, "statistics.pt", parent_config)
    squeeze.check_data(data, teacher, parent_config)
    pairs_of = pairs_for(s, real_layers(statistics, s, device))
    inputs = {"data": data.sha256, **parent_config["artefacts"]}
    folder = parent / run_name(method, s, {**defaults, **preset})
    s.update(data=str(Path(s["data"]).resolve()), precision=teacher["precision"])
    config = squeeze.open_run(folder, "recover", s, inputs, args.resume)
    if not config["artefacts"]:
        seconds = distil(folder, data, network, teacher, statistics, pairs_of, s, device)
        finish(folder, config, teacher, s, seconds)
    squeeze.checked(folder, "images.pt", config)
    print(f"images: {folder / 'images.pt'}, {config['results']['seconds']:.0f} s, peak memory "
          f"{squeeze.peak_memory(device):.0f} MB; look at {folder / 'preview.png'}\nnext: python eval.py {folder}")


def main(argv):
    run(parse(argv), parse(argv).filter, vars(parse([])), lambda s, real: lambda k: pairs_of_round(k, s))


if __name__ == "__main__":
    squeeze.script(main)
