"""Stage 2, recover: optimise the synthetic images until their spectra match the real ones
(Curriculum Frequency Matching). A missing teacher is squeezed first.

    python recover.py                                               toy, one or two minutes on a CPU
    python recover.py --dataset cifar10 --network convnet --ipc 10  a minute, and the teacher

--preset paper takes the paper's settings (3 to 13 minutes there, and a teacher of 200 epochs); --iterations 0 leaves
real images untouched, the honest rival. On one GPU: python recover.py --dataset tiny --ipc 100 --alpha-max 1.

Images are made in batches, one image of every class (or of a chunk of them) at a time. Round k has alpha_k, falling
from alpha_max toward 0: a class's first images match low frequencies of the teacher's features, its last ones high.
Each step of Adam lowers, for random views, CE + gamma * sum over layers of (filter + signal loss), Eq. 19-20."""
import math
import time
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import spectral
import squeeze
from squeeze import BadInput, Namespace, number

# ---- What the stages after squeeze share: a finished teacher, and views of images ------------------------------------
def load_teacher(folder, device):
    """A finished squeeze run: (folded network, teacher.pt's dict, config)."""
    config = squeeze.read_config(folder, "squeeze")
    about = squeeze.load_state(squeeze.checked(folder, "teacher.pt", config))
    try:
        network = squeeze.build_network(about["network"], len(about["classes"]), about["size"], about["precision"])
        network.load_state_dict(about["state_dict"])
        squeeze.normalise(torch.zeros(1, 3, 1, 1), about["mean"], about["std"])    # raises where they are none
    except Exception as error:                             # a stranger's can hold anything
        raise BadInput(f"{folder}/teacher.pt: not as squeeze.py writes it today: squeeze again") from error
    return squeeze.fold(network.to(device)), about, config

def check_data(data, teacher, config):
    """The data set must be the one the teacher was trained on, class by class and image by image."""
    if data.classes != teacher["classes"] or data.sha256 != config["inputs"]["data"]:
        raise BadInput(f"--data: not the images and classes ({data.classes[:3]}...) of the teacher: squeeze again")

def ensure(folder, stage, flags, main, resume):
    """Run a stage that a later one needs, main(flags), if it is missing; resume it if it is unfinished."""
    if not (folder / "config.json").is_file() or not squeeze.read_config(folder, stage, resume)["artefacts"]:
        print(f"{folder}: not there yet, or unfinished, so first: python {stage}.py {' '.join(flags)}", flush=True)
        main([*flags, *["--resume"] * resume])

def peak_memory(device):
    """Peak memory of this process in MB: CUDA's counter on a GPU, the resident set where /proc tells it, else NaN."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")                     # getrusage would count the parent's memory before exec
    return float([*(status.read_text() if status.is_file() else "").partition("VmHWM:")[2].split(), "nan"][0]) * 1024e-6

def take(data, split, index):
    """Images of a split by position, under the evaluation transform: uint8 [len(index), 3, S, S]."""
    return torch.cat([images for images, _ in squeeze.batches(data, squeeze.select(split, index), 500)])

def crop_boxes(uniform, scale, ratio=(3 / 4, 4 / 3), flip=1.0):
    """Random resized crops from uniform numbers [n, 4]: centre x, y, half width and height [n, 4], of an image from -1
    to 1, as grid_sample has it; the width is negative and the crop mirrored where flip [n], uniform too, is below 0.5.
    Area uniform in `scale`, log aspect ratio in log `ratio`, as torchvision; but a side that does not fit is cut."""
    area, shape, x, y = uniform.astype(np.float64).T
    area, shape = scale[0] + (scale[1] - scale[0]) * area, ratio[0] * (ratio[1] / ratio[0]) ** shape
    w, h = np.minimum(np.sqrt(area * shape), 1), np.minimum(np.sqrt(area / shape), 1)
    x, y = (2 * x - 1) * (1 - w), (2 * y - 1) * (1 - h)
    return torch.from_numpy(np.stack([x, y, np.where(flip < 0.5, -w, w), h], 1).astype(np.float32))

def crop_grid(boxes, size, roll=(0, 0)):
    """The sampling grid [B, S, S, 2] of crops `boxes` [B, 4] resized to S pixels, then rolled by (rows, columns):
    F.affine_grid's values without its product, since x is a column's and y a row's."""
    line, (x, y, w, h) = torch.arange(1 - size, size, 2, device=boxes.device) / size, boxes.T.unsqueeze(-1)
    x, y = x + w * line.roll(roll[1]), y + h * line.roll(roll[0])
    return torch.stack(torch.broadcast_tensors(x[:, None], y[..., None]), -1)

def resample(images, grid):
    """Bilinear values of float images [B, 3, S, S] at grid [B, S, S, 2], one batched call; channels last."""
    out = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return out.contiguous(memory_format=torch.channels_last)

# ---- One batch -------------------------------------------------------------------------------------------------------
def cfm_pairs(k, args):
    """CFM's pairs in round k (Eq. 18-20); of --filter high with alpha_max / 100 throughout, of low with f = lambda."""
    falling = spectral.alpha_schedule(k, args.ipc, args.alpha_max, args.schedule)
    pairs = spectral.cfm_pairs({"cfm": falling, "high": args.alpha_max / 100, "low": None}[args.filter])
    return {"filter": pairs[:1], "signal": pairs[1:], "both": pairs}[args.loss]

def objective(job, args):
    """loss(k, layers, memory, step): spectral.matching, made once a round; BadInput where alpha is not resolved."""
    made = lru_cache(1)(lambda k: spectral.matching(job.real, job.pairs_of(k, args), args.signal, args.centred))
    def loss(k, *sides):
        try:
            return made(k)(*sides)
        except ValueError as error:
            raise BadInput(f"--alpha-max (or --beta): {error}") from error
    return loss

def random_views(rng, T, images, smallest):
    """The views of T iterations, drawn ahead with NumPy, the same on every device: view(images [B, 3, S, S], t). Crop
    and flip are an image's, a roll by 0-4 pixels the batch's. smallest(t / T): the least share of area in a crop."""
    B, S, device = len(images), images.shape[-1], images.device
    least = np.repeat([smallest(t / T) for t in range(T)], B)
    boxes = crop_boxes(rng.random((T * B, 4)), (least, 1), flip=rng.random(T * B)).view(T, B, 4).to(device)
    rolls = rng.integers(0, 5, (T, 2)).tolist()            # of the grid, which rolls the view
    return lambda images, t: resample(images, crop_grid(boxes[t], S, rolls[t]))

@torch.no_grad()
def view_statistics(images, network, layers, rng, job, args):
    """What EMU remembers of a finished batch: {layer: Statistics} over random views of the images as saved (a crop
    blown up has less high frequency than a whole image). Each forward fills `layers` anew, by the caller's hooks."""
    seen, T, images = {}, min(10, args.iterations), squeeze.normalise(images, job.teacher["mean"], job.teacher["std"])
    view = random_views(rng, T, images, job.smallest)
    for t in range(T):
        squeeze.forward(network, view(images, t))
        seen = spectral.merge(seen, layers, t + 1 if job.step else None)
    return {name: layer._replace(count=layer.count // T) for name, layer in seen.items()}      # they weigh as one batch

def make_batch(job, args, images, classes, memory, rng):
    """T Adam steps on images [B, 3, S, S] of `classes` [B], uint8 to uint8, against CE + gamma * job.loss(layers,
    memory, job.step) of a random view; job.report: see progress. Returns images and EMU's memory, with them in it."""
    teacher, T = job.teacher, args.iterations
    mean, std = (squeeze.constant(tuple(teacher[v]), images.device) for v in ("mean", "std"))
    x = squeeze.normalise(images, teacher["mean"], teacher["std"]).contiguous()    # as grid_sample's gradient will be
    network, view = job.network_for(job.network, x, classes), random_views(rng, T, x, job.smallest)
    black, white = -mean / std, (1 - mean) / std
    optimizer = torch.optim.Adam([x.requires_grad_()], args.lr, betas=(0.5, 0.9), fused=True)
    Y = F.one_hot(classes, len(teacher["classes"])) if args.signal == "class" else None
    with spectral.collect_inputs(network, job.select, spectral.moments, Y) as layers:
        for t in range(T):
            optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * t / T)) / 2
            entropy = F.cross_entropy(squeeze.forward(network, view(x, t)), classes)
            matching = job.loss(layers, memory, job.step)
            x.grad, = torch.autograd.grad(entropy + args.gamma * matching, x)
            optimizer.step()
            with torch.no_grad():
                x.clamp_(black, white)
            if (t + 1) % job.every == 0 or t + 1 == T:     # reading a number waits for the GPU
                job.report(t + 1, (entropy.item(), matching.item(), x.mean().item()), layers)
        images = ((x.detach() * std + mean) * 255).round().to(torch.uint8)     # a cast alone darkens by half a level
        if args.emu != "off":
            memory = spectral.merge(memory, view_statistics(images, network, layers, rng, job, args), job.step)
    return images, memory

# ---- All batches -----------------------------------------------------------------------------------------------------
def initial_images(job, k, classes, rng):
    """uint8 [B, 3, S, S]: round k's training image of each class of the chunk, or Gaussian noise."""
    if job.index is not None:
        return take(job.data, job.data.train, job.index[k, classes])
    noise = rng.normal(127.5, 64, (len(classes), 3, job.data.size, job.data.size))
    return torch.from_numpy(noise.clip(0, 255).astype(np.uint8))

# What baselines may change of a job: the pairs of Theorem 1 in round k, the images to start from, the smallest crop at
# some progress of a batch, as share of the area, and the network that normalised images x meet. every: set by distil.
CFM = dict(every=100, pairs_of=cfm_pairs, start=initial_images, smallest=lambda progress: 0.08,
           network_for=lambda network, x, classes: network.to(getattr(torch, network.precision)))  # rounded once

def starting_images(data, ipc, confidence=None):
    """index [ipc, K]: of every class the k-th training image, or k-th surest by confidence [n]; BadInput if too few."""
    order = (data.train.labels * 0 if confidence is None else confidence).argsort(descending=True, stable=True)
    labels = data.train.labels[order]
    columns = [order[labels == c][:ipc] for c in range(len(data.classes))]
    for name, own in zip(data.classes, columns):
        if len(own) < ipc:
            raise BadInput(f"--ipc: class {name!r} has {len(own)} training images, {ipc} are needed: lower it")
    return torch.stack(columns, 1)

def progress(job, args, b, t, found, layers):
    """Print where batch b is. found: cross-entropy, matching loss, mean pixel; what is not finite is an error."""
    steps, seconds, k = b * args.iterations + t, time.time() - job.began, b * args.ipc // job.total
    left = (job.total * args.iterations - steps) * seconds / steps
    print(f"round {k + 1}/{args.ipc} batch {b + 1}/{job.total} iteration {t}/{args.iterations}  CE {found[0]:.3f}  "
          f"matching {found[1]:.4g}  {steps / seconds:.1f} it/s  {left / 60:.1f} min left", flush=True)
    if not math.isfinite(sum(found)):
        if job.every > 1:                                  # one of the last 100: distil repeats the batch
            raise FloatingPointError
        odd = "".join([f" in layer {n}" for n, layer in layers.items() if not layer.uncentred.isfinite().all()][:1])
        raise BadInput(f"{job.folder}: CE {found[0]:.3g}, matching {found[1]:.3g}, mean pixel {found[2]:.3g}: not "
                       f"finite in batch {b + 1} at iteration {t}{odd}: lower --lr or raise --alpha-max (--beta)")
    if t == args.iterations:
        squeeze.log(job.folder, batch=b + 1, round=k, ce=found[0], matching=found[1])

def distil(job, args):
    """Make all batches of a run, round by round. A finished one goes to the disk at once, and memory.pt says how many
    there are and holds the EMU: a killed run goes on with the next, and memory hardly grows. Returns seconds.
    job: folder, data, network, teacher (teacher.pt), index (None: noise), select, real {layer: Statistics}, and CFM."""
    chunks, device = torch.arange(len(job.data.classes)).split(args.batch), squeeze.pick_device()
    done, path = dict(b=0, layers={}, seconds=0.0), job.folder / "memory.pt"
    if path.is_file():
        done = squeeze.load_state(path)
        for b in range(done["b"]):                         # refused before any long work
            squeeze.load_state(job.folder / f"batch{b + 1}.pt", f"remove {job.folder} and start again")
        print(f"resuming after batch {done['b']}")
    memory = {name: spectral.Statistics(*parts).to(device) for name, parts in done["layers"].items()}
    loss, job.total, job.began = objective(job, args), args.ipc * len(chunks), time.time() - done["seconds"]
    for b in range(done["b"], job.total):
        k, classes = b // len(chunks), chunks[b % len(chunks)]
        job.step = b + 1 if args.emu == "paper" and args.centred else None     # Eq. 17; uncentred: the pool
        job.loss, job.report = partial(loss, k), partial(progress, job, args, b)
        for job.every in (100, 1):                         # what is not finite is made once more, step by step
            rng = np.random.default_rng([args.seed, b])    # depends on nothing before this batch
            images = job.start(job, k, classes, rng).to(device)
            with suppress(FloatingPointError):
                if args.iterations:
                    images, memory = make_batch(job, args, images, classes.to(device), memory, rng)
                break
        squeeze.save(job.folder / f"batch{b + 1}.pt", images.cpu())        # whoever finds the count finds the images
        squeeze.save(path, dict(b=b + 1, layers={n: (*s,) for n, s in memory.items()}, seconds=time.time() - job.began))
    return time.time() - job.began

def finish(folder, config, teacher, args, seconds):
    """The batches become images.pt, and preview.png (a row a class)."""
    K, S = len(teacher["classes"]), teacher["size"]
    images = torch.empty(args.ipc, K, 3, S, S, dtype=torch.uint8)
    for b, chunk in enumerate(chunk for row in images for chunk in row.split(args.batch)):
        chunk.copy_(squeeze.load_state(folder / f"batch{b + 1}.pt", f"remove {folder} and start again"))
    shown = images[:10, :20].transpose(0, 1)
    save_image(shown.flatten(0, 1) / 255, folder / "preview.png", nrow=shown.shape[1], padding=1)
    write_images(folder, config, teacher, images.flatten(0, 1), torch.arange(K).repeat(args.ipc), seconds=seconds)

def write_images(folder, config, teacher, images, labels, **results):
    """images.pt, with all that is needed to use it; the run is finished."""
    content = dict(images=images, labels=labels, inputs=config["inputs"], settings={**config["settings"], "data": ""})
    content |= {key: teacher[key] for key in ("classes", "mean", "std", "precision")}
    squeeze.save(folder / "images.pt", content)
    squeeze.finish_run(folder, config, ["images.pt"], **results, image_bytes=images.numel())

# ---- The stage -------------------------------------------------------------------------------------------------------
def add_flags(parser):                                     # shared with baselines.py
    add = parser.add_argument_group("what").add_argument
    add("--dataset", choices=list(squeeze.PRESETS), help="default: the teacher's, or toy")
    add("--data", metavar="DIR", help="where it lies (default: where squeeze.py found it, or data)")
    add("--network", choices=squeeze.TEACHERS, help="the teacher's (default: convnet for toy, else resnet18)")
    add("--teacher", metavar="DIR", help="the squeeze run to use (default: one to suit --ipc, made if absent)")
    add("--ipc", type=number(int, 1), default=10, help="images per class (default 10)")
    add = parser.add_argument_group("how").add_argument
    add("--preset", choices=["ours", "paper"], default="ours", help="what flags left out take (default ours)")
    add("--init", choices=["confident", "real", "noise"], help="start: surest images (CIFAR), first ones (paper, else)")
    add("--iterations", type=number(int, 0), help="Adam steps (toy 100; CIFAR 100, paper 1000; else 1000); 0: none")
    add("--lr", type=number(float, 0, strict=True), help="Adam's, normalised pixels (CIFAR 0.02, paper 0.25; else 0.1)")
    add("--batch", type=number(int, 1), help="classes a batch (200; toy, CIFAR-10 10; CIFAR-100 100; imagenet 500)")
    add("--gamma", type=number(float, 0), help="weight of the matching losses (CIFAR 10, paper and else 0.1)")
    add("--emu", choices=["pool", "paper", "off"], help="memory of batches: one set (ours), Eq. 17 (paper), or none")
    add("--seed", type=number(int, 0), default=0, help="default 0")

def parse(argv):
    parser = squeeze.Parser(__doc__)
    add_flags(parser)
    add = parser.add_argument_group("spectra").add_argument
    add("--alpha-max", type=number(float, 0, strict=True), help="where alpha starts, in features^2 (0.1; tiny 1)")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine", help="of alpha (default cosine)")
    add("--filter", choices=["cfm", "high", "low"], default="cfm", help="alpha_k (default), alpha_max / 100, lambda")
    add("--loss", choices=["both", "filter", "signal"], default="both", help="which of Eq. 19's two (default both)")
    add("--signal", choices=["mean", "class"], default="mean", help="FLC: mean [C] (default), or class-wise [C, K]")
    args = parser.parse_args(argv)
    if args.filter == "low" and args.alpha_max or args.filter != "cfm" and args.schedule != "cosine":
        raise BadInput(f"--filter {args.filter} has no use for --alpha-max (low) or --schedule: leave it out")
    args.centred, args.layers = True, "conv"
    return args

def preset_of(args):
    """What flags left out take: our settings or the paper's (the paper's, too, with --iterations 0)."""
    preset = squeeze.PRESETS[args.dataset]
    ours = preset["ours"] if args.preset == "ours" and args.iterations != 0 else {}
    return {**preset["recover"], **ours, "network": preset["network"]}

def run_name(method, args, defaults):
    """The run's folder: method, IPC and what is not the default; of untouched images (--iterations 0) start and IPC."""
    if args.iterations == 0 and args.init != "noise":
        return f"{args.init}-ipc{args.ipc}" + (f"-seed{args.seed}" if args.init == "rded" and args.seed else "")
    hidden = ("dataset", "data", "network", "teacher", "ipc", "filter", "method", "centred", "resume")
    changed = squeeze.changed(vars(args), {**vars(defaults), **preset_of(args)}, hidden)
    return "-".join([method, f"ipc{args.ipc}", *changed])

def choose_teacher(args):
    """The folder of the squeeze run to use and the flags that make it; what --teacher implies is filled into args. With
    "ours" CIFAR's has early * sqrt(ipc) epochs, 13 or more (CIFAR-10: 28 at IPC 50); ConvNets of 13 smooth labels."""
    if args.teacher:
        made = squeeze.read_config(args.teacher, "squeeze", True)["settings"]
        for flag in ("dataset", "network"):
            if getattr(args, flag) not in (None, made[flag]):
                raise BadInput(f"--{flag} {getattr(args, flag)}: --teacher is of {made[flag]}: leave one out")
            setattr(args, flag, made[flag])
        return Path(args.teacher), []
    args.dataset = args.dataset or "toy"
    preset = squeeze.PRESETS[args.dataset]
    flags = ["--dataset", args.dataset, "--network", args.network or preset["network"]]
    if args.preset == "ours" and "early" in preset:        # few views want an early, soft teacher (tests/RESULTS.md)
        epochs = min(max(13, round(preset["early"] * args.ipc**0.5)), preset["squeeze"]["epochs"])
        flags += ["--epochs", str(epochs)] + ["--smoothing", "0.1"] * (epochs == 13 and "convnet" in flags)  # as tried
    return squeeze.teacher_folder(squeeze.parse([*flags, "--data", args.data or "data"])), flags

def run(args, method, defaults, prepare=lambda job, args: None):
    """The stage after its flags. defaults: args with no flag given. prepare(job, args) may change what is in CFM."""
    (parent, flags), device = choose_teacher(args), squeeze.pick_device()
    squeeze.show(squeeze.fill(args, preset_of(args)))
    made = squeeze.read_config(parent, "squeeze", args.resume)["settings"] if (parent / "config.json").is_file() else {}
    args.data = args.data or made.get("data", "data")
    data = squeeze.load_data(args.dataset, args.data, *(made.get(key) for key in ("size", "classes", "validate")))
    args.data = str(Path(args.data).resolve())
    wanted = args.ipc * (4 if args.init == "rded" and data.size > 64 else 1)        # its crops; refused before training
    index = None if args.init == "noise" else starting_images(data, wanted)
    K, N = len(data.classes), args.ipc * len(data.classes)
    print(f"plan: {args.ipc} rounds of {K} images, {args.ipc * math.ceil(K / args.batch)} batches of {args.iterations} "
          f"iterations on {device}; images {3e-6 * N * data.size**2:.1f} MB, labels {2e-6 * N * K:.2f} MB an epoch")
    if not args.teacher:
        ensure(parent, "squeeze", [*flags, "--data", args.data], squeeze.main, args.resume)
    network, teacher, teacher_config = load_teacher(parent, device)
    check_data(data, teacher, teacher_config)
    found = squeeze.load_state(squeeze.checked(parent, "statistics.pt", teacher_config))
    select = spectral.is_main_convolution if args.layers == "conv" else lambda name, module: name == found["head"]
    real = {name: spectral.Statistics(**found["layers"][name]).to(device)
            for name, module in network.named_modules() if select(name, module)}
    index = starting_images(data, args.ipc, found["confidence"]) if args.init == "confident" else index
    folder, args.precision = parent / run_name(method, args, defaults), teacher["precision"]
    job = Namespace(**CFM, folder=folder, data=data, network=network, teacher=teacher, index=index, select=select,
                    real=real)
    prepare(job, args)                                     # refuses an unstable rate; next, an alpha too small for as
    if args.iterations:                                    # many feature vectors as the last batch is matched with
        n = (N if args.emu != "off" else K % args.batch or args.batch) / len(data.train.labels)
        objective(job, args)(args.ipc - 1, {name: s._replace(count=round(n * s.count)) for name, s in real.items()})
    config = squeeze.open_run(folder, "recover", squeeze.settings(args, ("teacher",)),
                              {"data": data.sha256, **teacher_config["artefacts"]}, args.resume)
    if not config["artefacts"]:
        finish(folder, config, teacher, args, distil(job, args))
    for part in (folder / "memory.pt", *folder.glob("batch*.pt")):
        part.unlink(missing_ok=True)
    squeeze.checked(folder, "images.pt", config)
    print(f"images: {folder}, preview.png; {config['results']['seconds']:.0f} s, peak {peak_memory(device):.0f} MB\n"
          f"next: python eval.py {folder}" + " --validate" * teacher_config["settings"]["validate"])

def main(argv):
    run(args := parse(argv), args.filter, parse([]))

if __name__ == "__main__":
    squeeze.script(main)
