"""Stage 2, recover: optimise the synthetic images until their spectra match the real ones
(Curriculum Frequency Matching). A missing teacher is squeezed first.

    python recover.py                                               toy, one or two minutes on a CPU
    python recover.py --dataset cifar10 --network convnet --ipc 10  a minute, and the teacher

--preset paper takes the paper's settings (3 to 13 minutes there, and a teacher of 200 epochs); --iterations 0 leaves
real images untouched, the honest rival. On one GPU: python recover.py --dataset tiny --ipc 100 --alpha-max 1.

Images are made in batches, one image of every class (or of a chunk of the classes) at a time. All batches of round k,
the k-th images of all classes, share alpha_k, which falls from alpha_max toward 0: early images match the low
frequencies of the teacher's features, late ones the high. One batch: start from real images; at each iteration take a
random view, push it through the frozen teacher, and step on  CE + gamma * sum over layers of (filter loss + signal
loss)  (Eq. 19-20).

Writes runs/<dataset>-<network>/<run>/ with images.pt, preview.png, config.json and log.jsonl. Baselines run through the
same loop (baselines.py)."""
import contextlib
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import spectral
import squeeze
from squeeze import BadInput, Namespace, number

# ---- One batch -------------------------------------------------------------------------------------------------------

def random_views(rng, T, B, size, device, smallest):
    """The views of T iterations, drawn ahead with NumPy, the same on every device: view(images [B, 3, S, S], t). Crop
    and flip are drawn per image; a roll by 0-4 pixels is the batch's. smallest: crop, share of the area; or [T * B]."""
    boxes = squeeze.crop_boxes(rng.random((T * B, 4)), (smallest, 1)).view(T, B, 4).to(device)
    flips = torch.from_numpy(rng.random((T, B)) < 0.5).to(device)
    rolls = rng.integers(0, 5, (T, 2)).tolist()
    def view(images, t):                                   # rolling the grid rolls the view
        return squeeze.resample(images, squeeze.crop_grid(boxes[t], flips[t], size).roll(rolls[t], (1, 2)))
    return view

def optimise(images, losses, view, args, job):
    """T Adam steps on uint8 images [B, 3, S, S]; returns what they became. losses(x): cross-entropy and matching
    loss of a view; view(images, t); job.report(t, cross-entropy, matching, pixels finite): each job.every steps."""
    teacher, T = job.teacher, args.iterations
    mean, std = (squeeze.constant(tuple(teacher[v]), images.device) for v in ("mean", "std"))
    black, white = -mean / std, (1 - mean) / std
    images = squeeze.normalise(images, teacher["mean"], teacher["std"]).requires_grad_()
    optimizer = torch.optim.Adam([images], args.lr, betas=(0.5, 0.9))
    for t in range(T):
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * t / T)) / 2
        entropy, matching = losses(view(images, t))
        images.grad, = torch.autograd.grad(entropy + args.gamma * matching, images)
        optimizer.step()
        with torch.no_grad():
            images.clamp_(black, white)
        if (t + 1) % job.every == 0 or t == T - 1:         # reading a loss waits for the GPU
            job.report(t + 1, entropy.item(), matching.item(), images.isfinite().all().item())
    return to_uint8(images.detach(), teacher)

def to_uint8(images, teacher):
    """Normalised [B, 3, S, S] -> uint8 levels, rounded (a truncating cast would darken by half a level)."""
    mean, std = (squeeze.constant(tuple(teacher[v]), images.device) for v in ("mean", "std"))
    return ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).contiguous()

def step_of(b, args):
    """How batch b = 1, 2, ... joins those before it (see spectral.merge): as if all feature vectors were one set,
    None, or by Eq. 17, b. For H^T H / n of equal batches both are the same, so it is always the first."""
    return b if args.emu == "paper" and args.centred and b > 1 else None

@torch.no_grad()
def view_statistics(images, network, layers, view, teacher, args):
    """What EMU remembers of a finished batch: {layer: Statistics} over random views of the images as saved. Views,
    since the next batches are seen through views: a crop blown up to full size has less high frequency than a whole
    image, and a memory of whole images would make late batches answer for the difference, b-fold."""
    images, seen, T = squeeze.normalise(images, teacher["mean"], teacher["std"]), {}, min(10, args.iterations)
    for t in range(T):
        squeeze.forward(network, view(images, t))
        seen = spectral.merge(seen, layers, step_of(t + 1, args))
    return {name: layer._replace(count=layer.count // T) for name, layer in seen.items()}      # they weigh as one batch

@contextlib.contextmanager
def naming_alpha():
    """spectral.matching's refusal of an alpha that the precision does not resolve, with the flag's name."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"--alpha-max (or --beta): {error}") from error

def make_batch(job, args, images, classes, memory, rng):
    """Optimise the starting images [B, 3, S, S] of `classes` [B]; EMU's memory then holds them too. uint8 to uint8."""
    Y = F.one_hot(classes, len(job.teacher["classes"])) if args.signal == "class" else None
    old, step = {} if args.emu == "off" else memory["layers"], step_of(memory["b"] + 1, args)
    def views(T):
        smallest = np.repeat([job.smallest(t / T) for t in range(T)], len(images))
        return random_views(rng, T, len(images), images.shape[-1], images.device, smallest)
    network = job.meets(job, images, classes)
    with spectral.collect_inputs(network, job.select, spectral.moments, Y) as layers:
        def losses(x):
            entropy = F.cross_entropy(squeeze.forward(network, x), classes)
            with naming_alpha():                           # few feature vectors resolve less than the real side
                return entropy, job.matching(layers, old, step)
        job.layers = layers
        images = optimise(images, losses, views(args.iterations), args, job)
        if args.emu != "off":
            seen = view_statistics(images, network, layers, views(min(10, args.iterations)), job.teacher, args)
            memory["layers"] = spectral.merge(old, seen, step)
    return images

# ---- All batches -----------------------------------------------------------------------------------------------------

def initial_images(job, k, classes, rng):
    """uint8 [B, 3, S, S]: round k's training image of each class of the chunk, or Gaussian noise."""
    if job.index is not None:
        return squeeze.take(job.data, job.data.train, job.index[k, classes])
    noise = rng.normal(127.5, 64, (len(classes), 3, job.data.size, job.data.size))
    return torch.from_numpy(noise.clip(0, 255).astype(np.uint8))

# What baselines may change of a job: the images to start from, the smallest crop at some progress of a batch, as share
# of the area, and the network that a batch meets.
PLAIN = dict(start=initial_images, smallest=lambda progress: 0.08, meets=lambda job, images, classes: job.network)

def starting_images(data, ipc, confidence=None):
    """index [ipc, K]: row k holds the position of the k-th training image of every class; with confidence [n], of the
    k-th most confident one. BadInput if a class has fewer images."""
    columns = []
    for c, name in enumerate(data.classes):
        own = (data.train.labels == c).nonzero().flatten()
        if len(own) < ipc:
            raise BadInput(f"--ipc {ipc}: class {name!r} has {len(own)} training images; use at most that many")
        if confidence is not None:
            own = own[confidence[own].argsort(descending=True, stable=True)]
        columns.append(own[:ipc])
    return torch.stack(columns, 1)

def resumed(folder, device):
    """What a killed run left: batches done (their images: batch1.pt, ...), their statistics (EMU) and their seconds."""
    if not (folder / "memory.pt").is_file():
        return dict(b=0, layers={}, seconds=0.0)
    memory = squeeze.load_state(folder / "memory.pt")
    for b in range(memory["b"]):
        try:
            squeeze.load_state(folder / f"batch{b + 1}.pt")
        except BadInput as error:
            raise BadInput(f"{folder}/batch{b + 1}.pt: missing or damaged: remove {folder} and start again") from error
    print(f"resuming after batch {memory['b']}")
    memory["layers"] = {name: spectral.Statistics(*parts).to(device) for name, parts in memory["layers"].items()}
    return memory

def store(folder, memory, images, seconds):
    """Write a finished batch's images, then count it in memory.pt: whoever finds the count finds the images."""
    memory.update(b=memory["b"] + 1, seconds=seconds)
    squeeze.save(folder / f"batch{memory['b']}.pt", images)
    layers = {name: tuple(layer) for name, layer in memory["layers"].items()}
    squeeze.save(folder / "memory.pt", {**memory, "layers": layers})

def what_broke(job, entropy, matching, pixels):
    """(which terms are not finite, the first layer whose statistics are not), in words."""
    terms = {"cross-entropy": math.isfinite(entropy), "pixels": pixels, "matching loss": math.isfinite(matching)}
    layers = [name for name, layer in job.layers.items() if not (layer.mean + layer.ffc).isfinite().all()]
    return ", ".join(term for term, fine in terms.items() if not fine), (layers or ["(none: a filter)"])[0]

def distil(job, args):
    """Make all batches of a run, round by round. A finished one goes to the disk at once, and memory.pt says how many
    there are and holds the EMU: a killed run goes on with the next batch, and memory does not grow with IPC. job:
    folder, data, network, teacher (teacher.pt's dict), index (see starting_images; None: noise), select, real {layer:
    Statistics}, pairs_of(k), and what is in PLAIN. Returns seconds."""
    K, device = len(job.data.classes), squeeze.pick_device()
    chunks = torch.arange(K).split(args.batch)
    memory, total = resumed(job.folder, device), args.ipc * len(chunks)
    done, start, before = memory["b"], time.time(), memory["seconds"]
    def report(t, entropy, matching, pixels):              # b and k are the loop's
        rate = ((b - done) * args.iterations + t) / (time.time() - start)
        left = ((total - b) * args.iterations - t) / rate
        print(f"round {k + 1}/{args.ipc} batch {b + 1}/{total} iteration {t}/{args.iterations}  CE {entropy:.3f}  "
              f"matching {matching:.4g}  {rate:.1f} it/s  {left / 60:.1f} min left", flush=True)
        if not (math.isfinite(entropy + matching) and pixels):
            if job.every > 1:
                raise FloatingPointError
            terms, layer = what_broke(job, entropy, matching, pixels)
            raise BadInput(f"{job.folder}: {terms} not finite in batch {b + 1} by iteration {t}, first in layer {layer}"
                           f": lower --lr or raise --alpha-max; --resume keeps the {b} batches before")
        if t == args.iterations:
            squeeze.log(job.folder, batch=b + 1, round=k, ce=entropy, matching=matching)
    job.report = report
    for b in range(done, total):
        k, classes = b // len(chunks), chunks[b % len(chunks)]
        if args.iterations and (b == done or b % len(chunks) == 0):        # the real side is constant within a round
            job.matching = spectral.matching(job.real, job.pairs_of(k), args.signal, args.centred)
        for job.every in (100, 1):                         # once more, to see which iteration, term and layer it was
            with contextlib.suppress(FloatingPointError):
                rng = np.random.default_rng([args.seed, b])            # depends on nothing before this batch
                images = job.start(job, k, classes, rng)
                if args.iterations:
                    images = make_batch(job, args, images.to(device), classes.to(device), memory, rng).cpu()
                break
        store(job.folder, memory, images, before + time.time() - start)
    return memory["seconds"]

def finish(folder, config, teacher, args, seconds):
    """The batches become images.pt, with all that is needed to use it, and preview.png (rows = classes)."""
    K, S = len(teacher["classes"]), teacher["size"]
    images, n = torch.empty(args.ipc * K, 3, S, S, dtype=torch.uint8), 0
    for b in range(args.ipc * math.ceil(K / args.batch)):
        part = squeeze.load_state(folder / f"batch{b + 1}.pt")
        images[n:n + len(part)], n = part, n + len(part)
    about = {key: teacher[key] for key in ("classes", "mean", "std", "precision")}
    squeeze.save(folder / "images.pt", dict(
        images=images, labels=torch.arange(K).repeat(args.ipc), **about, inputs=config["inputs"],
        settings=squeeze.settings(args, ("data", "teacher"))))
    shown = images.unflatten(0, (args.ipc, K))[:10, :20].transpose(0, 1)
    save_image(shown.flatten(0, 1) / 255, folder / "preview.png", nrow=shown.shape[1], padding=1)
    squeeze.finish_run(folder, config, ["images.pt"], seconds=seconds, image_bytes=images.numel())

# ---- The stage -------------------------------------------------------------------------------------------------------

def cfm_pairs(k, args):
    """The pairs of CFM in round k (Eq. 18-20), or of its ablations. --filter high: alpha_max / 100 throughout, a fixed
    sharp filter; low: f is lambda. --loss: one of Eq. 19's two."""
    if args.filter == "cfm":
        alpha = spectral.alpha_schedule(k, args.ipc, args.alpha_max, args.schedule)
    else:
        alpha = args.alpha_max / 100 if args.filter == "high" else None
    pairs = spectral.cfm_pairs(alpha)
    return {"filter": pairs[:1], "signal": pairs[1:], "both": pairs}[args.loss]

def add_flags(parser):
    """The flags that recover.py and baselines.py share."""
    add = parser.add_argument_group("what").add_argument
    add("--dataset", choices=list(squeeze.PRESETS), help="default: the teacher's, or toy")
    add("--data", metavar="DIR", help="where it lies (default: where squeeze.py found it, or data)")
    add("--network", choices=squeeze.TEACHERS, help="the teacher's (default: convnet for toy, else resnet18)")
    add("--teacher", metavar="DIR", help="the squeeze run to use (default: the data set's, made if absent)")
    add("--ipc", type=number(int, 1), default=10, help="images per class (default 10)")
    add = parser.add_argument_group("how").add_argument
    add("--preset", choices=["ours", "paper"], default="ours", help="what flags left out take (default ours)")
    add("--init", choices=["confident", "real", "noise"], help="start from the training images the teacher is\n"
        "surest of (CIFAR), the first ones (else, and with --iterations 0), or noise")
    add("--iterations", type=number(int, 0), help="Adam steps a batch (CIFAR, toy 100; paper 1000); 0: real images")
    add("--lr", type=number(float, 0, strict=True), help="Adam's, normalised pixels (CIFAR 0.02, paper 0.25; else 0.1)")
    add("--batch", type=number(int, 1), help="classes a batch, one image of each (at most 200; imagenet 500)")
    add("--gamma", type=number(float, 0), help="weight of the matching losses (CIFAR 10, else 0.1)")
    add("--emu", choices=["pool", "paper", "off"], help="memory of finished batches: their features as one set\n"
        "(default), Eq. 17 (--preset paper), or none (the authors' code unless asked)")
    add("--seed", type=number(int, 0), default=0, help="default 0")

def parse(argv):
    parser = squeeze.Parser(__doc__)
    add_flags(parser)
    add = parser.add_argument_group("spectra").add_argument
    add("--alpha-max", type=number(float, 0, strict=True), help="where alpha starts, in features^2 (0.1; tiny 1)")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="of alpha (default cosine)")
    add("--filter", choices=["cfm", "high", "low"], default="cfm",
        help="cfm (default): 1/(lambda + alpha_k); high: alpha_max / 100; low: lambda")
    add("--loss", choices=["both", "filter", "signal"], default="both", help="which of Eq. 19's two (default both)")
    add("--signal", choices=["mean", "class"], default="mean", help="FLC: mean [C] (default), or class-wise [C, K]")
    args = parser.parse_args(argv)
    for flag, useless in (("alpha-max", args.filter == "low" and args.alpha_max),
                          ("schedule", args.filter != "cfm" and args.schedule != "cosine")):
        if useless:
            raise BadInput(f"--{flag} has no effect with --filter {args.filter}: leave it out")
    args.centred, args.layers = True, "conv"
    return args

def preset_of(args):
    """What flags left out take: the paper's settings, or ours where we have some. Zero iterations are the honest rival
    under both, the first real images of each class."""
    preset = squeeze.PRESETS[args.dataset]
    ours = preset["ours"] if args.preset == "ours" and args.iterations != 0 else {}
    return {**preset["recover"], **ours, "network": preset["network"]}

def run_name(method, args, defaults):
    """The run's folder: method and IPC, then every setting that is not the default, so that no two runs share one."""
    if args.iterations == 0 and args.init != "noise":
        return f"{args.init}-ipc{args.ipc}" + (f"-seed{args.seed}" if args.init == "rded" and args.seed else "")
    hidden = ("dataset", "data", "network", "teacher", "ipc", "filter", "method", "centred", "resume")
    defaults = {**vars(defaults), **preset_of(args)}
    return "-".join([method, f"ipc{args.ipc}", *squeeze.changed(vars(args), defaults, hidden)])

def choose_teacher(args):
    """The folder of the squeeze run to use and the flags that make it; what --teacher implies is filled into args.
    Without --teacher, CIFAR's is one of early * sqrt(ipc) epochs: for 10, 100, 500 and 1000 images 4, 13, 28 and 40 (4,
    and 8 to 16, were measured, on ConvNet-128)."""
    if args.teacher:
        made = squeeze.read_config(args.teacher, "squeeze", True)["settings"]
        for flag in ("dataset", "network"):
            if getattr(args, flag) not in (None, made[flag]):
                raise BadInput(f"--{flag} {getattr(args, flag)}: --teacher is of {made[flag]}: leave one out")
            setattr(args, flag, made[flag])
        return Path(args.teacher), []
    args.dataset = args.dataset or "toy"
    preset, epochs = squeeze.PRESETS[args.dataset], []
    if args.preset == "ours" and "early" in preset:        # few images want an early teacher (tests/RESULTS.md)
        epochs = ["--epochs", str(min(round(preset["early"] * args.ipc**0.5), preset["squeeze"]["epochs"]))]
    flags = ["--dataset", args.dataset, "--network", args.network or preset["network"], *epochs,
             "--data", args.data or "data"]
    return squeeze.teacher_folder(squeeze.parse(flags)), flags

def load_job(data, parent, args):
    """What distil needs of a finished squeeze run, and that run's config."""
    device = squeeze.pick_device()
    network, teacher, config = squeeze.load_teacher(parent, device)
    squeeze.check_data(data, teacher, config)
    found = squeeze.load_state(squeeze.checked(parent, "statistics.pt", config))
    last = lambda name, module: name == found["head"]
    real = {name: spectral.Statistics(**layer).to(device) for name, layer in found["layers"].items()
            if last(name, None) == (args.layers == "last")}
    index = None if args.init == "noise" else starting_images(
        data, args.ipc, found["confidence"] if args.init == "confident" else None)
    return Namespace(**PLAIN, data=data, network=network, teacher=teacher, real=real, index=index,
                     select=last if args.layers == "last" else spectral.is_main_convolution), config

def run(args, method, defaults, prepare):
    """The stage after its flags, for recover.py and baselines.py. defaults: args with no flag given. prepare(job, args)
    sets job.pairs_of(k), the pairs of Theorem 1 in round k, and may change what is in PLAIN."""
    (parent, flags), device = choose_teacher(args), squeeze.pick_device()
    squeeze.fill(args, preset_of(args))
    squeeze.show(args)
    made = squeeze.read_config(parent, "squeeze", args.resume)["settings"] if (parent / "config.json").is_file() else {}
    args.data = args.data or made.get("data", "data")
    data = squeeze.load_data(args.dataset, args.data, *(made.get(key) for key in ("size", "classes", "validate")))
    args.data = str(Path(args.data).resolve())
    if args.init != "noise":
        starting_images(data, args.ipc)
    K, N = len(data.classes), args.ipc * len(data.classes)
    print(f"plan: {args.ipc} rounds of {K} images, {args.ipc * math.ceil(K / args.batch)} batches of {args.iterations} "
          f"iterations on {device}; images {3e-6 * N * data.size**2:.1f} MB, labels {2e-6 * N * K:.2f} MB an epoch",
          flush=True)
    if flags:
        squeeze.ensure(parent, "squeeze", [*flags[:-1], args.data], squeeze.main, args.resume)
    job, parent_config = load_job(data, parent, args)
    job.folder, args.precision = parent / run_name(method, args, defaults), job.teacher["precision"]
    prepare(job, args)                                     # refuses an unstable rate; the next line, a tiny alpha
    if args.iterations:
        with naming_alpha():
            spectral.matching(job.real, job.pairs_of(args.ipc - 1), args.signal, args.centred)(job.real)
    config = squeeze.open_run(job.folder, "recover", squeeze.settings(args, ("teacher",)),
                              {"data": data.sha256, **parent_config["artefacts"]}, args.resume)
    if not config["artefacts"]:
        finish(job.folder, config, job.teacher, args, distil(job, args))
    for part in (job.folder / "memory.pt", *job.folder.glob("batch*.pt")):
        part.unlink(missing_ok=True)
    squeeze.checked(job.folder, "images.pt", config)
    print(f"images: {job.folder / 'images.pt'}, {config['results']['seconds']:.0f} s, peak memory "
          f"{squeeze.peak_memory(device):.0f} MB; look at {job.folder / 'preview.png'}\n"
          f"next: python eval.py {job.folder}")

def main(argv):
    def prepare(job, args):
        job.pairs_of = lambda k: cfm_pairs(k, args)
    args = parse(argv)
    run(args, args.filter, parse([]), prepare)

if __name__ == "__main__":
    squeeze.script(main)
