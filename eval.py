"""Stage 4, eval: train students on nothing but the distilled set and test them on the real test set;
or look at the images (--report), or write them as PNGs (--export).

    python eval.py runs/toy-convnet/cfm-ipc10                              a minute on a CPU
    python eval.py runs/toy-convnet/cfm-ipc10 runs/toy-convnet/real-ipc10  one recipe, one table

Each epoch shows a student the views that relabel.py showed the teacher, with the teacher's soft labels as the target
(KL divergence at temperature T). Reported is the last epoch, mean and deviation over seeds, of the averaged student:
the exponential average of the weights (0.99 a step, less at first). Raw last epochs, shown beside it, swing by points;
best test epochs flatter and are not looked at. Missing labels are made first. Writes RUN/result.json."""
import itertools
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
from squeeze import BadInput, Namespace, number

def learning_rate(progress, args):
    """Rate at `progress` in [0, 1]: a cosine to zero, or `stretched` to end at half the rate (the authors' code)."""
    return args.lr * (1 + math.cos(math.pi * progress / (2 if args.schedule == "stretched" else 1))) / 2

def student_loss(logits, target, args):
    """KL(teacher || student) at temperature T, mean over the batch; --hard: cross-entropy to CutMix's mixed labels."""
    if args.hard:
        return F.cross_entropy(logits, target)
    student, teacher = F.log_softmax(logits / args.temperature, 1), F.log_softmax(target / args.temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

def answers(job, args):
    """answer(epoch, views) -> what the students are to say to an epoch's views, [N, K]: the stored logits; with
    --online the teacher's, asked now (rounded as if stored); with --hard one-hot labels, mixed by area."""
    device, K = job.images.device, len(job.content["classes"])
    hot = F.one_hot(job.content["labels"], K).float().to(device)
    if args.online:
        network, teacher, _ = squeeze.load_teacher(job.labeller, device)
    def answer(epoch, views):
        if args.hard:
            share = relabel.patch_mask(views.patch, job.images.shape[-1]).float().mean((1, 2, 3))[:, None]
            return (1 - share) * hot + share * hot[views.partner]
        if args.online:
            return relabel.soft_labels(network, teacher, job.images, views, 500).half().float()
        logits = np.load(job.stored / "soft_labels.npy", mmap_mode="r")[epoch]
        return torch.from_numpy(logits.astype(np.float32)).to(device)
    return answer

def make_student(job, args, seed):
    """(student, its average, optimiser). The average's decay after n steps is min(ema, (1 + n) / (10 + n)): with a
    constant one, 9 % of the random start would be left after 240 steps."""
    torch.manual_seed(seed)
    student = squeeze.build_network(args.network, len(job.content["classes"]), job.images.shape[-1],
                                    job.content["precision"]).to(job.images.device)
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, weight_decay=args.wd)
    def update(averages, weights, count):                  # count is on the device: reading it would wait
        get_ema_multi_avg_fn(min(args.ema, (1 + job.step) / (10 + job.step)))(averages, weights, count)
    return student, AveragedModel(student, multi_avg_fn=update, use_buffers=True), optimizer

def train_epoch(job, args, student, average, optimizer, epoch):
    """One epoch of a student on its views and labels. Returns the last step's loss."""
    content, N, stored = job.content, len(job.images), epoch % job.labels["keep_epochs"]
    views = relabel.draw_views(job.labels["seed"], stored, N, job.images.shape[-1], job.labels["scale"])
    views = views.to(job.images.device)
    wanted, steps = job.answer(stored, views), math.ceil(N / args.batch)
    order = torch.from_numpy(np.random.default_rng([job.seed, epoch]).permutation(N)).to(job.images.device)
    student.train()
    for job.step, index in enumerate(order.split(args.batch), epoch * steps):
        optimizer.param_groups[0]["lr"] = learning_rate(job.step / (args.epochs * steps), args)
        view = squeeze.normalise(relabel.render(job.images, views, index), content["mean"], content["std"])
        loss = student_loss(squeeze.forward(student, view), wanted[index], args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        average.update_parameters(student)
    return loss

def train_student(job, args, seed, checkpoint):
    """One student, from scratch or from its checkpoint (of at most a minute ago): (student, averaged student, seconds).
    job: content (of images.pt), images (uint8, on the device), labels (settings of relabel.py), answer (see answers)
    and identity, what a checkpoint must have been made with to be continued."""
    student, average, optimizer = make_student(job, args, seed)
    parts, job.seed = dict(student=student, average=average, optimizer=optimizer), seed
    state = squeeze.load_state(checkpoint) if checkpoint.is_file() else dict(epoch=0, seconds=0.0)
    if state["epoch"]:
        if state["identity"] != job.identity:
            raise BadInput(f"{checkpoint}: a student of other labels or settings: remove it")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    start = saved = time.time()
    for epoch in range(state["epoch"], args.epochs):
        loss = train_epoch(job, args, student, average, optimizer, epoch)
        if time.time() - saved > 60:
            saved, rate = time.time(), (time.time() - start) / (epoch + 1 - state["epoch"]) / 60
            squeeze.save(checkpoint, dict(identity=job.identity, epoch=epoch + 1, seconds=state["seconds"] + saved - start,
                                          **{name: part.state_dict() for name, part in parts.items()}))
            print(f"{checkpoint.parent.name}: {args.network} seed {seed} epoch {epoch + 1}/{args.epochs}  "
                  f"loss {loss.item():.4f}  {(args.epochs - epoch - 1) * rate:.1f} min left", flush=True)
    if not all(weight.isfinite().all() for weight in student.parameters()):
        raise BadInput(f"--lr {args.lr}: the student's weights are not finite: use a lower one")
    return student, average.module, state["seconds"] + time.time() - start

# ---- One row of the table: all seeds of one student network on one run -----------------------------------------------

def load_job(run, args):
    """What evaluate needs of a run, checked, and its test set, in memory if it is small. --validate: held-out training
    images, which the teacher must not have seen."""
    content, config, parent = relabel.load_run(run)
    labeller, stored, inputs = relabel.labeller(run, config, args.teacher)
    squeeze.lock(run)
    if not args.resume and ((Path(run) / "result.json").exists() or list(Path(run).glob("student-*.pt"))):
        raise BadInput(f"{run}: its result.json or student-*.pt is in use: add --resume to add to it, or remove it")
    made, validate = config["settings"], squeeze.read_config(parent, "squeeze")["settings"]["validate"]
    if args.validate != validate:
        raise BadInput(f"--validate: the teacher of {run} was trained with{'' if validate else 'out'} it: "
                       f"{'add it' if validate else 'leave it out, or squeeze.py --validate'}")
    data = squeeze.load_data(made["dataset"], args.data or made["data"], content["images"].shape[-1],
                             len(content["classes"]), validate)
    squeeze.check_data(data, content, config)
    data = data._replace(train=None, test=squeeze.in_memory(data, data.test, squeeze.pick_device()))
    return Namespace(run=run, content=content, made=made, labeller=labeller, stored=stored, inputs=inputs, data=data)

def find_labels(job, args):
    """Settings, hash and bytes of the labels a run's students learn from: those relabel.py stored, made if missing and
    checked, or with --online and --hard, which need none, the preset's."""
    if args.online or args.hard:
        preset = squeeze.PRESETS[job.made["dataset"]]["relabel"]
        epochs = args.epochs or preset["epochs"]
        views = {**preset, "epochs": epochs, "keep_epochs": epochs, "seed": 0}
        return views, job.inputs["teacher.pt"] if args.online else "", 0
    flags = [f"--{flag}={getattr(args, flag)}" for flag in ("epochs", "teacher") if getattr(args, flag)]
    squeeze.ensure(job.stored, "relabel", [job.run, *flags], relabel.main, args.resume)
    labels = squeeze.read_config(job.stored, "relabel")
    if labels["inputs"] != job.inputs:
        raise BadInput(f"{job.stored}: made for other images or by another teacher: remove it and relabel again")
    if (args.epochs or 0) > labels["settings"]["epochs"]:
        raise BadInput(f"--epochs {args.epochs}: {job.stored} holds {labels['settings']['epochs']}: relabel with more")
    shape = labels["settings"]["keep_epochs"], len(job.content["images"]), len(job.content["classes"])
    relabel.check_labels(squeeze.checked(job.stored, "soft_labels.npy", labels), shape)
    return labels["settings"], labels["artefacts"]["soft_labels.npy"], labels["results"]["label_bytes"]

def recipe(job, network, args):
    """(args, settings, name): the flags resolved for one student network on one run, of these what makes a student what
    it is, and a name that tells what is not the default. Few images are trained in small batches, as in the authors'
    code."""
    preset, N = squeeze.PRESETS[job.made["dataset"]], len(job.images)
    few, small, large = preset["batch"]
    defaults = {**vars(parse([job.run])), "epochs": preset["relabel"]["epochs"], "batch": small if N <= few else large}
    args = squeeze.fill(Namespace(**vars(args)), {"epochs": job.labels["epochs"], "batch": defaults["batch"]})
    args.batch, defaults["batch"] = min(args.batch, N), min(defaults["batch"], N)
    args.network, args.teacher = network, args.teacher and job.labeller.resolve().name     # its hash is in the labels'
    chosen = squeeze.settings(args, ("runs", "report", "export", "data", "seeds"))
    return args, chosen, "-".join([network, *squeeze.changed(chosen, defaults, ("network",))])

def evaluate(job, network, args):
    """One row: all seeds of a student network on one run; result.json after each seed. Returns the row."""
    args, chosen, name = recipe(job, network, args)
    path = Path(job.run) / "result.json"
    job.identity = {"settings": {**chosen, "precision": job.content["precision"]},
                    "views": job.labels, "labels": job.label_hash, "images": job.inputs["images.pt"]}
    result = squeeze.read_json(path)
    row = result.setdefault(name, {**job.identity, "seeds": {}})
    if row != {**row, **job.identity}:
        raise BadInput(f"{path}: {name} there is of other labels, images or settings: remove it to evaluate anew")
    job.answer = answers(job, args)
    squeeze.show(Namespace(run=job.run, **chosen, seeds=args.seeds))
    for seed in range(args.seeds):
        if str(seed) not in row["seeds"]:
            checkpoint = path.with_name(f"student-{name}-{seed}.pt")
            raw, averaged, seconds = train_student(job, args, seed, checkpoint)
            score, raw_score = (squeeze.accuracy(net, job.data, job.content) for net in (averaged, raw))
            row["seeds"][str(seed)] = {"averaged": score, "raw": raw_score, "seconds": seconds}
            print(f"{job.run}: {name} seed {seed}: {score:.2f} % averaged, {raw_score:.2f} % raw, {seconds:.0f} s",
                  flush=True)
            for kind in ("averaged", "raw"):               # deviation of the sample; 0 for one seed
                scores = [seed[kind] for seed in row["seeds"].values()]
                row[kind], row[kind + "_std"] = np.mean(scores), np.std(scores, ddof=min(1, len(scores) - 1))
            row.update(seconds=sum(seed["seconds"] for seed in row["seeds"].values()),
                       image_bytes=job.images.numel(), label_bytes=job.label_bytes)
            squeeze.save(path, result)
            checkpoint.unlink(missing_ok=True)
    return row

def export(run, target):
    """The run's images as lossless PNGs, target/<class>/<position>.png, as torchvision's ImageFolder reads them."""
    content, target = relabel.load_run(run)[0], Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise BadInput(f"--export {target}: not an empty folder: name a new one")
    try:
        for c, name in enumerate(squeeze.folder_names(content["classes"])):
            (target / name).mkdir(parents=True)
            for i, image in enumerate(content["images"][content["labels"] == c]):
                to_pil_image(image).save(target / name / f"{i:05d}.png")
    except OSError as error:
        raise BadInput(f"--export {target}: cannot be written ({error.strerror}): name another folder") from error
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
        for part in content["images"].split(500):
            network(squeeze.normalise(part.to(device), content["mean"], content["std"]))
            H.append(F.normalize(features[name].float(), dim=1).cpu())
    classes = (torch.cat(H)[content["labels"] == c] for c in range(len(content["classes"])))
    means = [((own @ own.T).sum() - n) / (n * (n - 1)) for own in classes if (n := len(own)) > 1]  # not with itself
    return torch.stack(means).mean().item() if means else None

def svg(path, curves, title, x_label, y_label, dashed=()):
    """{label: (x, y)} as one log-log line chart; no plotting package. dashed: labels drawn so, in the colour before."""
    curves = {label: [(x, y) for x, y in zip(*curve) if x > 0 and y > 0] for label, curve in curves.items()}
    colours = itertools.cycle(["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"])
    def axis(values, start, end):                          # (value -> pixel, ticks: decades, or steps within one)
        low, high = math.log10(min(values)), math.log10(max(values)) + 1e-9
        steps = [m * 10.0**d for d in range(math.floor(low), math.ceil(high)) for m in range(1, 10)]
        return (lambda v: start + (end - start) * (math.log10(v) - low) / (high - low),
                [t for t in steps if low <= math.log10(t) <= high and (high - low < 1 or f"{t:e}"[0] == "1")])
    xs, ys = zip(*itertools.chain(*curves.values()))
    (place_x, ticks_x), (place_y, ticks_y) = axis(xs, 70, 470), axis(ys, 330, 40)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="700" height="380" font-family="sans-serif" font-size="12">',
           '<rect width="700" height="380" fill="white"/><path d="M70 40V330H470" fill="none" stroke="black"/>',
           f'<text x="270" y="22" text-anchor="middle" font-size="14">{title}</text>',
           f'<text x="270" y="368" text-anchor="middle">{x_label}</text>',
           f'<text x="16" y="185" text-anchor="middle" transform="rotate(-90 16 185)">{y_label}</text>']
    out += [f'<text x="{place_x(t):.0f}" y="346" text-anchor="middle">{t:.3g}</text>' for t in ticks_x]
    out += [f'<text x="64" y="{place_y(t) + 4:.0f}" text-anchor="end">{t:.3g}</text>' for t in ticks_y]
    for i, (label, points) in enumerate(curves.items()):
        colour, dashes = (colour, " stroke-dasharray='6 4'") if label in dashed else (next(colours), "")
        spots = [f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points]
        out += [f'<polyline points="{" ".join(spots)}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>',
                f'<text x="484" y="{56 + 18 * i}" fill="{colour}">{label}</text>']
        if len(spots) <= 10:                               # few points: what was measured, and what lies between
            out += ['<circle cx="%s" cy="%s" r="4" fill="%s"/>' % (*spot.split(","), colour) for spot in spots]
    path.write_text("\n".join(out) + "\n</svg>\n")

def responses(name, settings, layer):
    """{label: (lambda, f)} of the filters of a recover or baselines run over the real spectrum of a layer; none of real
    images."""
    if not settings.get("iterations"):
        return {}
    args = Namespace(**settings)
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
    """report.json, psd.svg, filters.svg, grid.png and rounds-<run>.png of one teacher's runs, in its report/."""
    loaded = [relabel.load_run(run) for run in runs]
    parent = loaded[0][2]
    if strange := [run for run, (_, _, other) in zip(runs, loaded) if other != parent]:
        raise BadInput(f"--report: {strange[0]} is not of {parent.name} as {runs[0]} is: name runs of one teacher")
    network, _, config = squeeze.load_teacher(parent, device)
    statistics = squeeze.load_state(squeeze.checked(parent, "statistics.pt", config))
    layer = [name for name in statistics["layers"] if name != statistics["head"]][-1]
    folder, rows, curves, filters, tiles = parent / "report", {}, {}, {}, []
    folder.mkdir(exist_ok=True)
    print(f"{'run':34s} {'power above S/4':>16s} {'similarity':>11s} {'seconds':>8s}")
    for run, (content, made, _) in zip(runs, loaded):
        name, images, K, ipc = Path(run).name, content["images"], len(content["classes"]), made["settings"]["ipc"]
        radius, power, share = radial_psd(images)
        similarity = intra_class_similarity(network, statistics["head"], content, device)
        seconds = made["results"].get("seconds")
        print(f"{name:34s} {100 * share:14.2f} % {similarity or math.nan:11.3f} {seconds or 0:8.0f}", flush=True)
        rows[name] = dict(high_share=share, similarity=similarity, psd=power.tolist(), seconds=seconds)
        curves[name] = radius.tolist(), power.tolist()
        filters.update(responses(name, made["settings"], statistics["layers"][layer]))
        by_round = images.view(ipc, K, *images.shape[1:]) if len(images) == ipc * K else images[None, :K]
        tiles += [by_round[k, c % K] for k in (0, len(by_round) - 1) for c in range(10)]
        rounds = by_round[:, :10].transpose(0, 1).flatten(0, 1) / 255
        save_image(rounds, folder / f"rounds-{name}.png", nrow=len(by_round), padding=1)
    save_image(torch.stack(tiles) / 255, folder / "grid.png", nrow=10, padding=1)
    svg(folder / "psd.svg", curves, "power spectral density of the images", "cycles per image", "share of power")
    if filters:
        svg(folder / "filters.svg", filters, f"filter responses on the real spectrum of layer {layer}",
            "eigenvalue of FFC", "f")
    squeeze.save(folder / "report.json", {"layer": layer, "radius": radius.tolist(), "runs": rows})
    print(f"pictures: {folder}; grid.png has two rows a run, its first and its last round")

# ---- The stage -------------------------------------------------------------------------------------------------------

def parse(argv):
    parser = squeeze.Parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("runs", nargs="+", metavar="RUN", help="folders made by recover.py, baselines.py or relabel.py --images")
    add("--network", nargs="+", choices=squeeze.STUDENTS, metavar="NET",
        help="students (default: the teacher's network):\n" + " ".join(squeeze.STUDENTS))
    add("--teacher", metavar="DIR", help="whose labels students learn (default: the one whose spectra were matched)")
    add("--validate", action="store_true", help="test on images held out by squeeze.py --validate, to choose settings")
    add("--report", action="store_true", help="only compare the RUNs' images: spectra, similarity, pictures")
    add("--export", metavar="DIR", help="only write RUN's images to DIR as an image folder of PNGs")
    add("--data", metavar="DIR", help="where the test set lies (default: where recover.py found it)")
    add = parser.add_argument_group("how").add_argument
    add("--seeds", type=number(int, 1), default=3, help="students a row, seeds 0, 1, ... (default 3)")
    add("--epochs", type=number(int, 1), help="passes over the images (default: as many as there are labels for)")
    add("--lr", type=number(float, 0, strict=True), default=1e-3, help="rate of AdamW (default 1e-3)")
    add("--wd", type=number(float, 0), default=1e-2, help="weight decay (default 1e-2)")
    add("--batch", type=number(int, 2), help="images a step (toy 25; CIFAR-10 50 up to IPC 10; else 100 or 200)")
    add("--temperature", type=number(float, 0, strict=True), default=20.0, help="of the soft labels (default 20)")
    add("--schedule", choices=["stretched", "cosine"], default="stretched", help="cosine to half the rate, or to zero")
    add("--ema", type=number(float, 0, 1), default=0.99, help="averaging of the student, a step (default 0.99)")
    add("--hard", action="store_true", help="hard labels instead of the teacher's, on views of the same kind")
    add("--online", action="store_true", help="ask the teacher at every epoch and store no labels")
    args = parser.parse_args(argv)
    if args.export and (args.report or len(args.runs) > 1):
        raise BadInput(f"--export takes one RUN, found {len(args.runs)}, and no --report: leave one out")
    for flag, useless in (("teacher", args.teacher), ("online", args.online), ("temperature", args.temperature != 20)):
        if args.hard and useless:
            raise BadInput(f"--{flag} has no effect with --hard: leave one out")
    return args

def show_table(table, args):
    line = "%-44s %-24s %-13s %2s %13s %13s %10s %10s %8s"
    print("\n" + line % ("run", "labels of", "student", "n", "averaged", "raw", "images", "labels", "time"))
    for *what, row in table:
        scores = ("%6.2f ± %4.2f" % (row[kind], row[kind + "_std"]) for kind in ("averaged", "raw"))
        sizes = ("%.2f MB" % (row[kind + "_bytes"] / 1e6) for kind in ("image", "label"))
        print(line % (*what, len(row["seeds"]), *scores, *sizes, "%.0f s" % row["seconds"]))
    print(f"top-1 {'held-out' if args.validate else 'test'} accuracy in %, last epoch, mean and deviation over n seeds"
          f"; peak memory {squeeze.peak_memory(squeeze.pick_device()):.0f} MB\n"
          "next: the same with recover.py --iterations 0, the honest rival")

def main(argv):
    args, table = parse(argv), []
    if args.export:
        return export(args.runs[0], args.export)
    if args.report:
        return report(args.runs, squeeze.pick_device())
    jobs = [load_job(run, args) for run in args.runs]      # all runs are checked before any work
    for job in jobs:                                       # and have their labels before any student
        job.labels, job.label_hash, job.label_bytes = find_labels(job, args)
    while jobs:                                            # the images of one at a time on the device
        job = jobs.pop(0)
        job.images, labeller = job.content["images"].to(squeeze.pick_device()), job.labeller.resolve().name
        for network in args.network or [job.made["network"]]:
            table.append((job.run, "none" if args.hard else labeller, network, evaluate(job, network, args)))
    show_table(table, args)

if __name__ == "__main__":
    squeeze.script(main)
