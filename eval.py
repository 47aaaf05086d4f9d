"""Stage 4, eval: train students on nothing but the distilled set and test them on the real test set;
or look at the images (--report), or write them as PNGs (--export).

    python eval.py runs/toy-convnet/cfm-ipc10                   a minute on a CPU
    python eval.py runs/toy-convnet/{cfm,real}-ipc10 --resume   one table; what is done stays

Each epoch shows a student the views that relabel.py showed the teacher, to learn its soft labels (made if missing).
Reported is the last epoch, mean and deviation over seeds, of the student averaged along the way, and of the raw one."""
import html
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import save_image

import baselines
import recover
import relabel
import spectral
import squeeze
from squeeze import STUDENTS, BadInput, Namespace, number

def student_loss(logits, target, args):
    """KL(teacher || student) at temperature T, mean over the batch; --hard: cross-entropy to CutMix's mixed labels."""
    if args.hard:
        return F.cross_entropy(logits, target)
    student, teacher = F.log_softmax(logits / args.temperature, 1), F.log_softmax(target / args.temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

def targets(job, args, epoch, views):
    """What to say to an epoch's views, [N, K]: logits, stored or (--online) new; with --hard one-hot, mixed by area."""
    if args.online:
        return relabel.soft_labels(*job.teacher, job.images, views, 500).half().float()
    if args.hard:
        hot = F.one_hot(job.content["labels"].to(job.images.device), len(job.content["classes"])).float()
        share = relabel.patch_mask(views.patch, job.images.shape[-1]).float().mean((1, 2, 3))[:, None]
        return (1 - share) * hot + share * hot[views.partner]
    stored = torch.from_numpy(np.load(job.stored / "soft_labels.npy", mmap_mode="r")[epoch].astype(np.float32))
    return relabel.expand(stored, len(job.content["classes"])).to(job.images.device)

def train_epoch(job, args, epoch, student, average, optimizer):
    """One epoch of a student on its views and labels: the last step's loss. The rate is a cosine to zero, or stretched
    to end at half (the authors' code). The average's decay grows, or 240 steps would keep 9 % of the random start."""
    content, N, device, drawn = job.content, len(job.images), job.images.device, epoch % job.views["keep_epochs"]
    views = relabel.draw_views(job.views["seed"], drawn, N, job.images.shape[-1], job.views["scale"], device)
    wanted, steps = targets(job, args, drawn, views), math.ceil(N / args.batch)
    order = torch.from_numpy(np.random.default_rng([job.seed, epoch]).permutation(N)).to(device)
    student.train()
    torch.manual_seed(2**20 * epoch + job.seed)            # ConvNeXt drops blocks at random: resumed, the same ones
    for step, index in enumerate(order.split(args.batch), epoch * steps):
        angle = math.pi * step / (args.epochs * steps) / (2 if args.schedule == "stretched" else 1)
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(angle)) / 2
        average.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
        view = squeeze.normalise(relabel.render(job.images, views, index), content["mean"], content["std"])
        loss = student_loss(squeeze.forward(student, view), wanted[index], args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update_parameters(student)
    return loss

def train_student(job, args, checkpoint):
    """One student, from scratch or its checkpoint of a minute ago: (student, averaged student, seconds). job: seed,
    content (of images.pt), images (on the device), views (relabel.py's), what targets asks, a checkpoint's identity."""
    torch.manual_seed(job.seed)
    student = squeeze.build_network(args.network, len(job.content["classes"]), job.images.shape[-1],
                                    job.content["precision"]).to(job.images.device)
    parts = dict(student=student, average=AveragedModel(student, use_buffers=True),
                 optimizer=torch.optim.AdamW(student.parameters(), args.lr, weight_decay=args.wd))
    state = squeeze.load_state(checkpoint) if checkpoint.is_file() else dict(identity=job.identity, epoch=0, seconds=0)
    if state["identity"] != job.identity:
        raise BadInput(f"{checkpoint}: a student of other labels or settings: remove it")
    for name in parts.keys() & state.keys():               # at the start none
        parts[name].load_state_dict(state[name])
    start = saved = time.time()
    for epoch in range(state["epoch"], args.epochs):
        loss = train_epoch(job, args, epoch, **parts)
        due = time.time() - saved > 60
        if (due or epoch + 1 == args.epochs) and not all(weight.isfinite().all() for weight in student.parameters()):
            raise BadInput(f"--lr {args.lr}: the student's weights are not finite: use a lower one")
        if due:
            saved, rate = time.time(), (time.time() - start) / (epoch + 1 - state["epoch"]) / 60
            about = dict(identity=job.identity, epoch=epoch + 1, seconds=state["seconds"] + saved - start)
            squeeze.save(checkpoint, {**about, **{name: part.state_dict() for name, part in parts.items()}})
            print(f"{checkpoint.parent.name}: {args.network} seed {job.seed} epoch {epoch + 1}/{args.epochs}  "
                  f"loss {loss.item():.4f}  {(args.epochs - epoch - 1) * rate:.1f} min left", flush=True)
    return student, parts["average"].module, state["seconds"] + time.time() - start

# ---- One row of the table: all seeds of one student network on one run -----------------------------------------------
def load_job(run, args):
    """What evaluate needs of a run, checked, with its test set; with --validate, images that the teacher never saw."""
    content, config, parent = relabel.load_run(run)
    labeller, stored, inputs = relabel.labeller(run, config, args.teacher)
    squeeze.lock(run)
    if not args.resume and ((Path(run) / "result.json").exists() or list(Path(run).glob("student-*.pt"))):
        raise BadInput(f"{run}: its result.json or student-*.pt is in use: add --resume to add to it, or remove it")
    made, about = config["settings"], squeeze.read_config(parent, "squeeze")["settings"]
    if args.validate != about["validate"]:
        raise BadInput(f"--validate: {run}'s teacher was made with{'' if about['validate'] else 'out'} it: do the same")
    data = squeeze.load_data(made["dataset"], args.data or made["data"], about["size"], about["classes"], args.validate)
    recover.check_data(data, content, config)
    data = data._replace(train=None, test=squeeze.in_memory(data, data.test, squeeze.pick_device()))
    return Namespace(run=run, content=content, made=made, labeller=labeller, stored=stored, inputs=inputs, data=data)

def find_labels(job, args):
    """Settings, hash, bytes of the labels to learn: relabel.py's, made if missing, checked; else the preset's views."""
    if args.online or args.hard:
        usual = relabel.recipe(job.made["dataset"], len(job.content["images"]))
        views = dict.fromkeys(("epochs", "keep_epochs"), args.epochs or usual["epochs"])
        return {**views, "scale": usual["scale"], "seed": 0}, job.inputs["teacher.pt"] if args.online else "", 0
    flags = [f"--{flag}={getattr(args, flag)}" for flag in ("epochs", "teacher") if getattr(args, flag)]
    recover.ensure(job.stored, "relabel", [job.run, *flags], relabel.main, args.resume)
    labels = squeeze.read_config(job.stored, "relabel")
    if labels["inputs"] != job.inputs:
        raise BadInput(f"{job.stored}: made for other images or by another teacher: remove it and relabel again")
    if (k := labels["settings"].get("top_k")) and args.temperature != 20:
        raise BadInput(f"--temperature {args.temperature}: {job.stored} is of --top-k, made for 20: relabel without")
    if (args.epochs or 0) > labels["settings"]["epochs"]:
        raise BadInput(f"--epochs {args.epochs}: {job.stored} holds {labels['settings']['epochs']}: remove it, relabel")
    width = 2 * k + 1 if k else len(job.content["classes"])
    shape = labels["settings"]["keep_epochs"], len(job.content["images"]), width
    relabel.check_labels(squeeze.checked(job.stored, "soft_labels.npy", labels), shape)
    return labels["settings"], labels["artefacts"]["soft_labels.npy"], labels["results"]["label_bytes"]

def evaluate(job, network, args):
    """One row: all seeds of a student network on one run; result.json after each seed. Returns its name and it."""
    path, usual = Path(job.run) / "result.json", {**relabel.recipe(job.made["dataset"], len(job.images)), "seed": 0,
                                                  "top_k": None, "keep_epochs": job.views["epochs"]}
    args = Namespace(**{**vars(args), "network": network, "epochs": args.epochs or job.views["epochs"],
                        "batch": min(len(job.images), args.batch or usual["batch"]),
                        "teacher": args.teacher and job.labeller.resolve().name})      # its hash is in the labels' one
    chosen = squeeze.settings(args, ("runs", "report", "export", "data", "seeds"))
    name = "-".join([network, *squeeze.changed({**chosen, **job.views, "epochs": args.epochs},
                                               {**vars(parse([job.run])), **usual}, ("network", "precision"))])
    job.identity = {"settings": {**chosen, "precision": job.content["precision"]}, "test": job.data.tested,
                    "views": job.views, "labels": job.label_hash, "images": job.inputs["images.pt"]}
    result = squeeze.read_json(path)
    row = result.setdefault(name, {**job.identity, "seeds": {}})
    if any(row.get(key, value) != value for key, value in job.identity.items()):           # rows of old have no test
        raise BadInput(f"{path}: {name} there is of other labels, images, settings or tests: remove it to begin anew")
    squeeze.show(Namespace(run=job.run, **chosen, seeds=args.seeds))
    for job.seed in [seed for seed in range(args.seeds) if str(seed) not in row["seeds"]]:
        checkpoint = path.with_name(f"student-{name}-{job.seed}.pt")
        student, average, seconds = train_student(job, args, checkpoint)
        averaged, raw = (squeeze.accuracy(net, job.data, job.content) for net in (average, student))
        row["seeds"][str(job.seed)] = {"averaged": averaged, "raw": raw, "seconds": seconds}
        print(f"{job.run} {name} seed {job.seed}: {averaged:.2f} averaged, {raw:.2f} raw, {seconds:.0f} s", flush=True)
        for kind in ("averaged", "raw"):                   # deviation of the sample; 0 for one seed
            scores = [seed[kind] for seed in row["seeds"].values()]
            row[kind], row[kind + "_std"] = np.mean(scores), np.std(scores, ddof=min(1, len(scores) - 1))
        row.update(seconds=sum(seed["seconds"] for seed in row["seeds"].values()),
                   image_bytes=job.images.numel(), label_bytes=job.label_bytes)
        squeeze.save(path, result)
        checkpoint.unlink(missing_ok=True)
    return name, row

def export(run, target):
    """The run's images as lossless PNGs, target/<class>/<position>.png, as torchvision's ImageFolder reads them."""
    content, target = relabel.load_run(run)[0], Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise BadInput(f"--export {target}: not an empty folder: name a new one")
    for c, name in enumerate(relabel.folder_names(content["classes"])):
        (target / name).mkdir(parents=True)
        for i, image in enumerate(content["images"][content["labels"] == c]):
            to_pil_image(image).save(target / name / f"{i:05d}.png")
    print(f"exported {len(content['images'])} images to {target}")

# ---- --report: what the images look like, in numbers and pictures (paper, Section 4) ---------------------------------
def radial_psd(images):
    """Radially averaged power spectral density of uint8 [N, 3, S, S], each image centred and of unit total power:
    (radius [R] in cycles per image, mean power at that radius [R], share of power above half the Nyquist radius)."""
    S, power = images.shape[-1], 0
    for part in images.split(500):
        x = part.float()
        x = torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs().square().sum(1)
        power = power + (x / x.sum((1, 2), keepdim=True).clamp(min=1e-12)).sum(0) / len(images)
    f, radii = torch.fft.fftfreq(S) * S, torch.arange(1, S // 2 + 1)
    radius = torch.sqrt(f[:, None] ** 2 + f[None] ** 2)
    ring = radius.round().long().flatten()
    return radii, (ring.bincount(power.flatten()) / ring.bincount())[radii], power[radius > S / 4].sum().item()

@torch.no_grad()
def intra_class_similarity(network, name, content, device):
    """Mean cosine similarity of the input of the teacher's layer `name` over pairs of a class, then over classes."""
    H = []
    with spectral.collect_inputs(network, lambda n, module: n == name) as features:
        for part in content["images"].split(64):
            network(squeeze.normalise(part.to(device), content["mean"], content["std"]))
            H.append(F.normalize(features[name].float(), dim=1).cpu())
    classes = torch.cat(H)[content["labels"].argsort(stable=True)].split(content["labels"].bincount().tolist())
    means = [((own @ own.T).sum() - n) / (n * (n - 1)) for own in classes if (n := len(own)) > 1]  # not with itself
    return torch.stack(means).mean().item() if means else None

def svg(path, curves, title, x_label, y_label, dashed=()):
    """{label: (x, y)} as one log-log line chart; no plotting package. dashed: labels drawn so, in the colour before."""
    curves = {label: [(x, y) for x, y in zip(*curve) if x > 0 and y > 0] for label, curve in curves.items()}
    colours = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000 #999999".split() * len(curves)
    def axis(values, start, end):                          # (value -> pixel, ticks: fewer a decade the more there are)
        low, high = math.log10(min(values)), math.log10(max(values)) + 1e-9
        steps = [m * 10.0**d for d in range(math.floor(low), math.ceil(high)) for m in range(1, 10)]
        return (lambda v: start + (end - start) * (math.log10(v) - low) / (high - low),
                [t for t in steps if low <= math.log10(t) <= high
                 and f"{t:e}"[0] in "125346789"[:max(1, 9 // math.ceil(high - low))]])
    (place_x, ticks_x), (place_y, ticks_y) = map(axis, zip(*sum(curves.values(), [])), (70, 330), (470, 40))
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="700" height="380" font-family="sans-serif" font-size="12">',
           '<rect width="700" height="380" fill="white"/><path d="M70 40V330H470" fill="none" stroke="black"/>',
           f'<text x="270" y="22" text-anchor="middle" font-size="14">{title}</text>',
           f'<text x="270" y="368" text-anchor="middle">{x_label}</text>',
           f'<text x="16" y="185" text-anchor="middle" transform="rotate(-90 16 185)">{y_label}</text>']
    out += [f'<text x="{place_x(t):.0f}" y="346" text-anchor="middle">{t:.3g}</text>' for t in ticks_x]
    out += [f'<text x="64" y="{place_y(t) + 4:.0f}" text-anchor="end">{t:.3g}</text>' for t in ticks_y]
    for i, (label, points) in enumerate(curves.items()):
        colour, dashes = (colour, " stroke-dasharray='6 4'") if label in dashed else (colours.pop(0), "")
        spots = [f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points]
        out += [f'<polyline points="{" ".join(spots)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>',
                f'<text x="484" y="{56 + 18 * i}" fill="{colour}">{html.escape(label)}</text>']
        out += ['<circle cx="%s" cy="%s" r="4" fill="%s"/>' % (*s.split(","), colour) for s in spots if len(spots) < 11]
    path.write_text("\n".join(out) + "\n</svg>\n", "utf8")

def responses(name, args, layer):
    """{label: (lambda, f)} of the filters of a recover or baselines run over the real spectrum of a layer."""
    psi = layer["ffc"] if args.centred else spectral.Statistics(**layer).uncentred
    if "method" in args:
        pairs = baselines.METHODS[args.method][0](args)
        filters = {f", g = {g}": f for g, f, *_ in (pairs(psi[None]) if callable(pairs) else pairs)}
    else:
        rounds = {f" round {k + 1}": k for k in (0, args.ipc - 1)} if args.filter == "cfm" and args.ipc > 1 else {"": 0}
        filters = {label: recover.cfm_pairs(k, args)[0][1] for label, k in rounds.items()}
    lam = torch.linalg.eigvalsh(psi).clamp(min=0)
    return {name + label: (lam.tolist(), f(lam[None])[0].tolist()) for label, f in filters.items()}

def report(runs, device):
    """report.json, psd.svg, filters.svg, grid.png of one teacher's runs, in its report/."""
    loaded = [relabel.load_run(run) for run in runs]
    parent = loaded[0][2]
    if strange := [run for run, (_, _, other) in zip(runs, loaded) if other != parent]:
        raise BadInput(f"--report: {strange[0]} is not of {parent.name} as {runs[0]} is: name runs of one teacher")
    network, _, config = recover.load_teacher(parent, device)
    statistics = squeeze.load_state(squeeze.checked(parent, "statistics.pt", config))
    layer = [name for name in statistics["layers"] if name != statistics["head"]][-1]
    folder, rows, curves, filters, tiles = parent / "report", {}, {}, {}, []
    folder.mkdir(exist_ok=True)
    print(f"{'run':34s} {'power above S/4':>16s} {'similarity':>11s}")
    for run, (content, made, _) in zip(runs, loaded):
        name, images, K, ipc = Path(run).name, content["images"], len(content["classes"]), made["settings"]["ipc"]
        radius, power, share = radial_psd(images)
        similarity = intra_class_similarity(network, statistics["head"], content, device)
        rows[name] = dict(high_share=share, similarity=similarity, psd=power.tolist())
        print(f"{name:34s} {100 * share:14.2f} % {similarity or math.nan:11.3f}")
        curves[name] = radius.tolist(), power.clamp(min=1e-12).tolist()        # flat images have none
        if made["settings"].get("iterations") and made["settings"]["layers"] == "conv":   # real images have no filter
            filters.update(responses(name, Namespace(**made["settings"]), statistics["layers"][layer]))
        by_round = images.view(ipc, K, *images.shape[1:]) if len(images) == ipc * K else images[None, :K]
        tiles += [by_round[k, c % K] for k in (0, len(by_round) - 1) for c in range(10)]
    save_image(torch.stack(tiles) / 255, folder / "grid.png", nrow=10, padding=1)
    svg(folder / "psd.svg", curves, "power spectral density of the images", "cycles per image", "share of power")
    if filters:
        svg(folder / "filters.svg", filters, f"filters on the real spectrum of layer {layer}", "eigenvalue of FFC", "f")
    squeeze.save(folder / "report.json", {"layer": layer, "radius": radius.tolist(), "runs": rows})
    print(f"pictures: {folder}; grid.png has two rows a run, its first and its last round; all: RUN/preview.png")

# ---- The stage -------------------------------------------------------------------------------------------------------
def parse(argv):
    parser = squeeze.Parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("runs", nargs="+", metavar="RUN", help="folders made by recover.py, baselines.py or relabel.py --images")
    add("--network", nargs="+", choices=STUDENTS, metavar="NET", help="after RUN: teacher's or " + "\n".join(STUDENTS))
    add("--teacher", metavar="DIR", help="whose labels students learn (default: the one whose spectra were matched)")
    add("--validate", action="store_true", help="test on images held out by squeeze.py --validate, to choose settings")
    add("--report", action="store_true", help="only compare the RUNs' images: spectra, similarity, pictures")
    add("--export", metavar="DIR", help="only write RUN's images to DIR as an image folder of PNGs")
    add("--data", metavar="DIR", help="where the test set lies (default: where recover.py found it)")
    add = parser.add_argument_group("how").add_argument
    add("--seeds", type=number(int, 1), default=3, help="students a row, seeds 0, 1, ... (default 3)")
    add("--epochs", type=number(int, 1), help="passes over the images (default: relabel.py's)")
    add("--lr", type=number(float, 0, strict=True), default=1e-3, help="rate of AdamW (default 1e-3)")
    add("--wd", type=number(float, 0), default=1e-2, help="weight decay (default 1e-2)")
    add("--batch", type=number(int, 2), help="images a step (toy 25; CIFAR-10 10 up to IPC 10; else 100 or 200)")
    add("--temperature", type=number(float, 0, strict=True), default=20.0, help="of the soft labels (default 20)")
    add("--schedule", choices=["stretched", "cosine"], default="stretched", help="cosine to half the rate, or to zero")
    add("--ema", type=number(float, 0, 1), default=0.99, help="decay of the student's average, a step (default 0.99)")
    add("--hard", action="store_true", help="hard labels instead of the teacher's, on views of the default kind")
    add("--online", action="store_true", help="ask the teacher at every epoch, of default views; store no labels")
    args = parser.parse_args(argv)
    if args.export and (args.report or len(args.runs) > 1):
        raise BadInput(f"--export takes one RUN, found {len(args.runs)}, and no --report: leave one out")
    if args.hard and (args.teacher or args.online or args.temperature != 20):
        raise BadInput("--hard has no use for --teacher, --online or --temperature: leave one out")
    return args

def main(argv):
    args, device = parse(argv), squeeze.pick_device()
    if args.export or args.report:
        return export(args.runs[0], args.export) if args.export else report(args.runs, device)
    jobs = [load_job(run, args) for run in args.runs]      # all checks before any work, also of labels that are there
    for job in sorted(jobs, key=lambda job: not (job.stored / "soft_labels.npy").is_file()):
        job.views, job.label_hash, job.label_bytes = find_labels(job, args)
    line = f"%-{max(map(len, args.runs))}s %2s %13s %13s %10s %10s %8s  %-24s %s"
    table = ["", line % ("run", "n", "averaged", "raw", "images", "labels", "time", "labels of", "student")]
    while jobs:                                            # the images of one at a time on the device
        job = jobs.pop(0)
        job.images = job.content["images"].to(device)
        job.teacher = recover.load_teacher(job.labeller, device)[:2] if args.online else None
        for network in args.network or [job.made["network"]]:
            name, row = evaluate(job, network, args)
            scores = ("%6.2f ± %4.2f" % (row[kind], row[kind + "_std"]) for kind in ("averaged", "raw"))
            sizes = ("%.2f MB" % (row[kind + "_bytes"] / 1e6) for kind in ("image", "label"))
            who = "none" if args.hard else job.labeller.resolve().name
            table.append(line % (job.run, len(row["seeds"]), *scores, *sizes, f"{row['seconds']:.0f} s", who, name))
    print(*table, f"top-1 {'held-out' if args.validate else 'test'} accuracy in %, last epoch, mean and deviation over "
          f"n seeds; peak memory {recover.peak_memory(device):.0f} MB",
          "the honest rival: real images, recover.py --iterations 0", sep="\n")

if __name__ == "__main__":
    squeeze.script(main)
