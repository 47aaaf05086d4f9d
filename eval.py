"""Stage 4, eval: train students on nothing but the distilled set, test them on the real test set.

    python eval.py runs/toy-convnet/cfm-ipc10                                      a minute on two CPU cores
    python eval.py runs/cifar10-convnet/cfm-ipc10 runs/cifar10-convnet/real-ipc10  two runs, one recipe, one table
    python eval.py runs/toy-convnet/cfm-ipc10 --export DIR                         the images as PNGs, for other code

Each epoch shows a student the views that relabel.py showed the teacher, with the teacher's soft labels as the target
(KL divergence at temperature T). Reported is the last epoch, mean and deviation over seeds, of the averaged student:
the exponential average of the weights (0.99 a step). Raw last epochs swing by points; best test epochs flatter;
neither is used. Missing labels are made first. Writes RUN/result.json.
"""
import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid, save_image

import baselines
import recover
import relabel
import spectral
import squeeze
from squeeze import BadInput, number

# Images a step for N images, as in the authors' code; toy is ours.
BATCH = {"toy": lambda N: 25, "cifar10": lambda N: 50 if N <= 100 else 100,
           "cifar100": lambda N: 100 if N <= 1000 else 200, "tiny": lambda N: 100,
           "imagenet": lambda N: 100, "folder": lambda N: 100}


def learning_rate(progress, s):
    """Rate at `progress` in [0, 1]: a cosine to zero, or `stretched` to end at half the rate (the authors' code)."""
    return s["lr"] * (1 + math.cos(math.pi * progress / (2 if s["schedule"] == "stretched" else 1))) / 2


def student_loss(logits, target, s):
    """KL(teacher || student) at temperature T, mean over the batch; --hard: cross-entropy to CutMix's mixed labels."""
    if s["hard"]:
        return F.cross_entropy(logits, target)
    student, teacher = F.log_softmax(logits / s["temperature"], 1), F.log_softmax(target / s["temperature"], 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def answers(run, content, images, label_settings, s, device):
    """answer(epoch, views) -> what the students are to say to an epoch's views, [N, K]: the stored logits; with
    --online the teacher's, asked now (rounded as if stored); with --hard one-hot labels, mixed by area."""
    K, size = len(content["classes"]), images.shape[-1]
    hot = F.one_hot(content["labels"], K).float().to(device)
    if s["online"]:
        network, teacher, _ = squeeze.load_teacher(s["teacher"] or Path(run).resolve().parent, device)

    def answer(epoch, views):
        if s["hard"]:
            share = relabel.patch_mask(views.patch, size).float().mean((1, 2, 3))[:, None]
            return (1 - share) * hot + share * hot[views.partner]
        if s["online"]:
            asked = relabel.soft_labels(network, teacher, images, views, 500)
            return torch.cat([part.half().float() for part in asked])
        return relabel.read_epoch(relabel.label_folder(run, s["teacher"]), label_settings, epoch, K).to(device)
    return answer


def train_student(content, images, answer, label_settings, s, identity, seed, checkpoint):
    """One student, from scratch or from its checkpoint: (student, averaged student, seconds).

    images: uint8, on the device. identity: what a checkpoint must have been made with to be continued. The average's
    decay after n steps is min(ema, (1 + n) / (10 + n)), so that nothing of the random start is left in it."""
    device, K, N, size = images.device, len(content["classes"]), len(images), images.shape[-1]
    torch.manual_seed(seed)
    student, step = squeeze.build_network(s["network"], K, size, content["precision"]).to(device), 0

    def update(averages, weights, count):                  # count is on the device: reading it would wait
        get_ema_multi_avg_fn(min(s["ema"], (1 + step) / (10 + step)))(averages, weights, count)
    average = AveragedModel(student, multi_avg_fn=update, use_buffers=True)
    optimizer = torch.optim.AdamW(student.parameters(), s["lr"], weight_decay=s["wd"])
    steps, first, before = math.ceil(N / s["batch"]), 0, 0.0
    if checkpoint.is_file():
        state = squeeze.load_state(checkpoint)
        if state["identity"] != identity:
            raise BadInput(f"{checkpoint}: a student of other labels or settings: remove it")
        student.load_state_dict(state["student"]), average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, before = state["epoch"], state["seconds"]
    start, saved = time.time(), time.time()
    for epoch in range(first, s["epochs"]):
        stored = epoch % label_settings["keep_epochs"]
        views = relabel.draw_views(label_settings["seed"], stored, N, size, label_settings["scale"]).to(device)
        wanted = answer(stored, views)
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(N)).to(device)
        student.train()
        for step, index in enumerate(order.split(s["batch"]), epoch * steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step / (s["epochs"] * steps), s)
            view = squeeze.normalise(relabel.render(images, views, index), content["mean"], content["std"])
            with squeeze.autocast(student):
                logits = student(view)
            loss = student_loss(logits.float(), wanted[index], s)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            average.update_parameters(student)
        if time.time() - saved > 60:
            saved, seconds = time.time(), before + time.time() - start
            rate = (time.time() - start) / (epoch + 1 - first) / 60
            squeeze.save(checkpoint, dict(identity=identity, student=student.state_dict(), average=average.state_dict(),
                                          optimizer=optimizer.state_dict(), epoch=epoch + 1, seconds=seconds))
            print(f"{checkpoint.parent.name}: {s['network']} seed {seed} epoch {epoch + 1}/{s['epochs']}  "
                  f"loss {loss.item():.4f}  {(s['epochs'] - epoch - 1) * rate:.1f} min left",
                  flush=True)
    if not all(weight.isfinite().all() for weight in student.parameters()):
        raise BadInput(f"--lr {s['lr']}: the student's weights are not finite: use a lower one")
    return student, average.module, before + time.time() - start


RECIPE = ("teacher", "validate", "epochs", "lr", "wd", "batch", "temperature", "schedule", "ema", "hard", "online")


def label_source(run, config, args):
    """Settings, hash and bytes of the labels a run's students learn from: RUN/labels, checked, or with --online and
    --hard, which need none stored, the preset's."""
    folder, preset = relabel.label_folder(run, args.teacher), relabel.PRESETS[config["settings"]["dataset"]]
    _, teacher = relabel.labeller(run, config, args.teacher)
    if args.online or args.hard:
        epochs = args.epochs or preset["epochs"]
        return ({**preset, "epochs": epochs, "keep_epochs": epochs, "seed": 0},
                teacher["artefacts"]["teacher.pt"] if args.online else "", 0)
    labels = squeeze.read_config(folder, "relabel")
    if labels["inputs"]["images.pt"] != config["artefacts"]["images.pt"]:
        raise BadInput(f"{folder}: made for other images: remove the folder and relabel again")
    if labels["inputs"]["teacher.pt"] != teacher["artefacts"]["teacher.pt"]:
        raise BadInput(f"{folder}: made by another teacher of that name: remove the folder and relabel again")
    if (args.epochs or 0) > labels["settings"]["epochs"]:
        raise BadInput(f"--epochs {args.epochs}: {folder} holds {labels['settings']['epochs']}: relabel with more")
    for name in labels["artefacts"]:
        squeeze.checked(folder, name, labels)
    return labels["settings"], labels["artefacts"]["soft_labels.npy"], labels["results"]["label_bytes"]


def test_set(run, args, device):
    """The data set of a run, checked to be the teacher's, its test split in memory if it is small. --validate: held-out
    training images, which the teacher must not have seen."""
    content, config, parent = relabel.load_run(run)
    s, validate = config["settings"], squeeze.read_config(parent, "squeeze")["settings"]["validate"]
    if args.validate != validate:
        raise BadInput(f"--validate: the teacher of {run} was trained with{'' if validate else 'out'} it: "
                       f"{'add it' if validate else 'leave it out, or squeeze.py --validate'}")
    data = squeeze.load_data(s["dataset"], args.data or s["data"], content["images"].shape[-1], len(content["classes"]),
                             validate)
    squeeze.check_data(data, content, config)
    return data._replace(test=squeeze.in_memory(data, data.test, device))


def evaluate(run, network, data, source, args, device):
    """All seeds of one student network on one run; result.json after each seed. source: label_source's. Returns the
    row of the table."""
    content, config, _ = relabel.load_run(run)
    dataset, folder, images = config["settings"]["dataset"], Path(run), content["images"].to(device)
    label_settings, label_hash, label_bytes = source
    defaults = {**vars(parse([run])), "epochs": relabel.PRESETS[dataset]["epochs"],
                "batch": min(BATCH[dataset](len(images)), len(images))}
    s = {key: defaults[key] if value is None else value for key, value in vars(args).items()}
    s.update(network=network, batch=min(s["batch"], len(images)), epochs=args.epochs or label_settings["epochs"])
    recipe = {key: s[key] for key in RECIPE}
    path, name = folder / "result.json", "-".join([network, *squeeze.changed(recipe, defaults)])
    identity = {"settings": {"network": network, **recipe, "precision": content["precision"]}, "views": label_settings,
                "labels": label_hash, "images": config["artefacts"]["images.pt"]}
    result = squeeze.read_json(path)
    row = result.setdefault(name, {**identity, "seeds": {}})
    if any(row.get(key) != identity[key] for key in identity):
        raise BadInput(f"{path}: {name} there is of other labels, images or settings: remove it to evaluate anew")
    answer = answers(run, content, images, label_settings, s, device)
    print(f"settings: run={run} network={network} " + " ".join(f"{key}={s[key]}" for key in ("seeds", *RECIPE)))
    for seed in range(s["seeds"]):
        if str(seed) not in row["seeds"]:
            checkpoint = folder / f"student-{name}-{seed}.pt"
            raw, averaged, seconds = train_student(content, images, answer, label_settings, s, identity, seed,
                                                   checkpoint)
            score, raw_score = (squeeze.accuracy(net, data, content["mean"], content["std"], device)
                                for net in (averaged, raw))
            row["seeds"][str(seed)] = {"averaged": score, "raw": raw_score, "seconds": seconds}
            print(f"{run}: {name} seed {seed}: {score:.2f} % averaged, {raw_score:.2f} % raw, {seconds:.0f} s",
                  flush=True)
            row.update(summary(list(row["seeds"].values())), image_bytes=images.numel(), label_bytes=label_bytes)
            squeeze.save(path, result)
            checkpoint.unlink(missing_ok=True)
    return row


def export(run, target):
    """The run's images as lossless PNGs, target/<class>/<position>.png, as torchvision's ImageFolder reads them."""
    content, target = relabel.load_run(run)[0], Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise BadInput(f"--export {target}: not an empty folder: name a new one")
    seen = [0] * len(content["classes"])
    try:
        for image, label in zip(content["images"], content["labels"].tolist()):
            folder = target / content["classes"][label]
            folder.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(folder / f"{seen[label]:05d}.png")
            seen[label] += 1
    except OSError as error:
        raise BadInput(f"--export {target}: cannot be written ({error.strerror}): name another folder") from error
    print(f"exported {sum(seen)} images to {target}")


def summary(seeds):
    """Mean and deviation (of the sample; 0 for one seed) over seeds of both students."""
    out = {"seconds": sum(seed["seconds"] for seed in seeds)}
    for kind in ("averaged", "raw"):
        scores = np.array([seed[kind] for seed in seeds])
        out[kind], out[kind + "_std"] = scores.mean(), scores.std(ddof=1) if len(scores) > 1 else 0.0
    return out


# ---------------------------------------------------------------------------------------------------------------------
# --report: what the images look like, in numbers and pictures (paper, Section 4)

def radial_psd(images):
    """Radially averaged power spectral density of uint8 [N, 3, S, S], each image centred and of unit total power:
    (radius [R] in cycles per image, mean power at that radius [R], share of power above half the Nyquist radius)."""
    S, power = images.shape[-1], 0
    for part in images.split(500):
        x = part.float()
        x = torch.fft.fft2(x - x.mean((2, 3), keepdim=True)).abs().square().sum(1)
        power = power + (x / x.sum((1, 2), keepdim=True).clamp(min=1e-12)).sum(0) / len(images)
    f = torch.fft.fftfreq(S) * S
    radius = torch.sqrt(f[:, None] ** 2 + f[None] ** 2)
    ring, inside = radius.round().long().flatten(), S // 2 + 1
    total, count = (torch.zeros(ring.max() + 1).index_add_(0, ring, v) for v in (power.flatten(), torch.ones(S * S)))
    return torch.arange(1, inside), (total / count)[1:inside], power[radius > S / 4].sum().item()


@torch.no_grad()
def intra_class_similarity(network, content, device, batch=500):
    """Mean cosine similarity of the teacher's last features over the pairs of a class, then over classes."""
    name, H = squeeze.head_name(network), []
    with spectral.collect_inputs(network, lambda n, module: n == name) as features:
        for part in content["images"].split(batch):
            network(squeeze.normalise(part.to(device), content["mean"], content["std"]))
            H.append(F.normalize(features[name].float(), dim=1).cpu())
    H, out = torch.cat(H), []
    for c in range(len(content["classes"])):
        mine = H[content["labels"] == c]
        if (n := len(mine)) > 1:
            out.append(((mine @ mine.T).sum() - n) / (n * (n - 1)))      # without each image's similarity to itself
    return torch.stack(out).mean().item() if out else None


def svg(path, curves, title, x_label, y_label):
    """{label: (x, y)} as one log-log line chart; polylines and text, no plotting package."""
    points = [(x, y) for xs, ys in curves.values() for x, y in zip(xs, ys) if x > 0 and y > 0]
    (x0, x1), (y0, y1) = ((math.log10(min(v)), math.log10(max(v)) + 1e-9) for v in zip(*points))
    colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"]

    def place(x, y):
        return 70 + 400 * (math.log10(x) - x0) / (x1 - x0), 330 - 290 * (math.log10(y) - y0) / (y1 - y0)
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="700" height="380" font-family="sans-serif" font-size="12">',
           '<rect width="700" height="380" fill="white"/><path d="M70 40V330H470" fill="none" stroke="black"/>',
           f'<text x="270" y="22" text-anchor="middle" font-size="14">{title}</text>',
           f'<text x="270" y="368" text-anchor="middle">{x_label}</text>',
           f'<text x="16" y="185" text-anchor="middle" transform="rotate(-90 16 185)">{y_label}</text>']
    for d in range(math.ceil(x0), math.floor(x1) + 1):
        out.append(f'<text x="{place(10.0**d, 10**y0)[0]:.0f}" y="346" text-anchor="middle">1e{d}</text>')
    for d in range(math.ceil(y0), math.floor(y1) + 1):
        out.append(f'<text x="64" y="{place(10**x0, 10.0**d)[1] + 4:.0f}" text-anchor="end">1e{d}</text>')
    for i, (label, (xs, ys)) in enumerate(curves.items()):
        colour = colours[i % len(colours)]
        line = " ".join("%.1f,%.1f" % place(x, y) for x, y in zip(xs, ys) if x > 0 and y > 0)
        out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
                   f'<text x="484" y="{56 + 18 * i}" fill="{colour}">{label}</text>')
    path.write_text("\n".join(out) + "\n</svg>\n")


def responses(s, layer):
    """{label: f(lambda)} of a recover or baselines run over the real spectrum of a layer; empty for real images."""
    if s["iterations"] == 0:
        return {}
    psi = spectral.Statistics(**layer).uncentred if s.get("uncentred") else layer["ffc"]
    lam = torch.linalg.eigvalsh(psi).clamp(min=0)
    if "method" in s:
        pairs = baselines.METHODS[s["method"]][0](s)
        pairs = {"": pairs(psi[None]) if callable(pairs) else pairs}
    else:
        rounds = (0, s["ipc"] - 1) if s["filter"] == "cfm" and s["ipc"] > 1 else (0,)
        pairs = {f" round {k + 1}" if len(rounds) > 1 else "": recover.pairs_of_round(k, s) for k in rounds}
    return {f"{name}, g = {g}": (lam.tolist(), f(lam[None])[0].tolist()) for name, group in pairs.items()
            for g, f, *_ in ({pair[0]: pair for pair in group}.values() if "method" in s else group[:1])}


def report(runs, device):
    """report.json, psd.svg, filters.svg, grid.png and rounds-<run>.png of one teacher's runs, in its report/."""
    loaded = [relabel.load_run(run) for run in runs]
    parent = loaded[0][2]
    for run, (_, _, other) in zip(runs, loaded):
        if other != parent:
            raise BadInput(f"--report: {run} is of {other.name} and {runs[0]} of {parent.name}: they must be one's")
    network, _, config = squeeze.load_teacher(parent, device)
    statistics = squeeze.load(parent, "statistics.pt", config)
    layer = [name for name in statistics["layers"] if name != statistics["head"]][-1]
    folder, rows, curves, filters, tiles = parent / "report", {}, {}, {}, []
    folder.mkdir(exist_ok=True)
    for run, (content, run_config, _) in zip(runs, loaded):
        name, images, K, ipc = Path(run).name, content["images"], len(content["classes"]), run_config["settings"]["ipc"]
        radius, power, share = radial_psd(images)
        rows[name] = dict(high_share=share, similarity=intra_class_similarity(network, content, device),
                          psd=power.tolist(), seconds=run_config["results"].get("seconds"))
        curves[name] = radius.tolist(), power.tolist()
        if "iterations" in run_config["settings"]:
            found = responses(run_config["settings"], statistics["layers"][layer])
            filters.update({f"{name}{label}": curve for label, curve in found.items()})
        by_round = images.view(ipc, K, *images.shape[1:]) if len(images) == ipc * K else images[None, :K]
        tiles += [by_round[k, c % K] for k in (0, len(by_round) - 1) for c in range(10)]
        rounds = by_round[:, :10].transpose(0, 1).flatten(0, 1).float() / 255
        save_image(make_grid(rounds, nrow=len(by_round), padding=1), folder / f"rounds-{name}.png")
    save_image(make_grid(torch.stack(tiles).float() / 255, nrow=10, padding=1), folder / "grid.png")
    svg(folder / "psd.svg", curves, "power spectral density of the images", "cycles per image", "share of power")
    if filters:
        svg(folder / "filters.svg", filters, f"filter responses on the real spectrum of layer {layer}",
            "eigenvalue of FFC", "f")
    squeeze.save(folder / "report.json", {"layer": layer, "radius": radius.tolist(), "runs": rows})
    print(f"{'run':34s} {'power above S/4':>16s} {'similarity':>11s} {'seconds':>8s}")
    for name, row in rows.items():
        print(f"{name:34s} {100 * row['high_share']:14.2f} % {row['similarity'] or math.nan:11.3f} "
              f"{row['seconds'] or 0:8.0f}")
    print(f"pictures: {folder}; grid.png has two rows a run, its first and its last round")


# ---------------------------------------------------------------------------------------------------------------------
# The stage

def parse(argv):
    parser = squeeze.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="folders made by recover.py, baselines.py or relabel.py --images")
    parser.add_argument("--network", nargs="+", choices=squeeze.STUDENTS,
                        help="students (default: the teacher's network)")
    parser.add_argument("--seeds", type=number(int, 1), default=3, help="students a row, seeds 0, 1, ... (default 3)")
    parser.add_argument("--epochs", type=number(int, 1), help="default: as many as there are labels for")
    parser.add_argument("--lr", type=number(float, 0, strict=True), default=1e-3, help="of AdamW (default 1e-3)")
    parser.add_argument("--wd", type=number(float, 0), default=1e-2, help="weight decay (default 1e-2)")
    parser.add_argument("--batch", type=number(int, 2))
    parser.add_argument("--temperature", type=number(float, 0, strict=True), default=20.0,
                        help="of the soft labels (default 20)")
    parser.add_argument("--schedule", choices=["stretched", "cosine"], default="stretched",
                        help="stretched: a cosine that ends at half the rate, as the authors' code; cosine: at zero")
    parser.add_argument("--ema", type=number(float, 0), default=0.99,
                        help="averaging of the student, a step (default 0.99, less in the first steps)")
    parser.add_argument("--teacher", metavar="DIR", help="the squeeze run whose labels students learn from (default: the "
                        "one whose spectra were matched)")
    parser.add_argument("--validate", action="store_true", help="test on held-out training images, to choose settings; "
                        "for runs of a teacher of squeeze.py --validate")
    parser.add_argument("--hard", action="store_true", help="hard labels instead of the teacher's, on the same views")
    parser.add_argument("--online", action="store_true", help="ask the teacher at every epoch and store no labels")
    parser.add_argument("--data", metavar="DIR", help="where the test set lies (default: where recover.py found it)")
    parser.add_argument("--export", metavar="DIR", help="only write RUN's images to DIR as an image folder of PNGs")
    parser.add_argument("--report", action="store_true",
                        help="only compare the RUNs' images: spectra, similarity, pictures")
    parser.add_argument("--resume", action="store_true",
                        help="continue what is in result.json and unfinished students")
    args = parser.parse_args(argv)
    if args.ema >= 1:
        raise BadInput(f"--ema {args.ema} found, must be < 1")
    if args.export and len(args.runs) > 1:
        raise BadInput(f"--export takes one RUN, found {len(args.runs)}")
    if args.hard and args.teacher:
        raise BadInput("--teacher has no effect with --hard: leave one out")
    return args


def main(argv):
    args, device, jobs, sources, table = parse(argv), squeeze.pick_device(), [], {}, []
    if args.export:
        return export(args.runs[0], args.export)
    if args.report:
        return report(args.runs, device)
    stored = not (args.online or args.hard)
    for run in args.runs:                                  # all checks of all runs before any work
        config, folder, labels = relabel.load_run(run)[1], Path(run), relabel.label_folder(run, args.teacher)
        jobs += [(run, network) for network in args.network or [config["settings"]["network"]]]
        if not args.resume and ((folder / "result.json").exists() or list(folder.glob("student-*.pt"))):
            raise BadInput(f"{run}: its result.json or student-*.pt is in use: add --resume to add to it, or remove it")
        if not stored or (labels.is_dir() and squeeze.read_config(labels, "relabel", args.resume)["artefacts"]):
            sources[run] = label_source(run, config, args)
    sets = {run: test_set(run, args, device) for run in args.runs}
    for run in args.runs:
        if run not in sources:
            relabel.ensure(run, args.teacher, args.epochs, args.resume)
            sources[run] = label_source(run, relabel.load_run(run)[1], args)
    for run, network in jobs:
        table.append((run, network, evaluate(run, network, sets[run], sources[run], args, device)))
    print(f"\n{'run':44s} {'labels of':24s} {'student':13s} {'averaged':>13s} {'raw':>13s} {'images':>10s} {'labels':>10s} "
          f"{'time':>8s}")
    for run, network, row in table:
        whose = "none" if args.hard else Path(args.teacher or Path(run).resolve().parent).resolve().name
        print(f"{run:44s} {whose:24s} {network:13s} {row['averaged']:6.2f} ± {row['averaged_std']:4.2f} {row['raw']:6.2f} ± "
              f"{row['raw_std']:4.2f} {row['image_bytes'] / 1e6:7.2f} MB {row['label_bytes'] / 1e6:7.2f} MB "
              f"{row['seconds']:6.0f} s")
    print(f"top-1 {'held-out' if args.validate else 'test'} accuracy in %, last epoch, mean and deviation over {len(row['seeds'])} seeds; peak memory "
          f"{squeeze.peak_memory(device):.0f} MB\nnext: the same with recover.py --iterations 0, the honest rival")


if __name__ == "__main__":
    squeeze.script(main)
