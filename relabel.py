"""Stage 3, relabel: store the teacher's soft label for a random view of every image, for every
epoch of the students (FKD, as SRe2L has it).

    python relabel.py runs/toy-convnet/cfm-ipc10                  seconds
    python relabel.py runs/toy-convnet/cfm-ipc10 --teacher DIR    another teacher's labels
    python relabel.py runs/toy-convnet --images DIR               another method's DIR/<class>/*

A view (crop box, flip, CutMix partner and patch) is a pure function of (seed, epoch, image): eval.py rebuilds exactly
the pixels that the teacher saw, whatever its batch size, order or device, so that nothing but the labels has to be
stored. Writes RUN/labels/, or RUN/labels-<teacher>/: soft_labels.npy (float16 logits [E, N, K]), config.json and
log.jsonl. Where full labels are too large (ImageNet at IPC 50: 28 GB for 0.75 GB of images), --keep-epochs stores fewer
epochs and --top-k fewer logits."""
import contextlib
import hashlib
import json
import math
import shutil
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import transforms as T

import squeeze
from squeeze import BadInput, number

class Views(NamedTuple):
    """One random view of each of N images."""
    boxes: torch.Tensor         # [N, 4] crop: centre x, centre y, width, height, as fractions of the image
    flips: torch.Tensor         # [N] bool
    partner: torch.Tensor       # [N] int64: whose view is pasted
    patch: torch.Tensor         # [N, 4] int64 pixels: left, top, right, bottom of what is pasted (CutMix)

    def to(self, device):
        return Views(*(field.to(device) for field in self))

def draw_views(seed, epoch, N, size, scale):
    """The views of one epoch. Image i has row i of the stream of (seed, epoch): no batch, order or device enters.
    CutMix as its paper has it: area share of the patch uniform in [0, 1], sides cut at the image's border."""
    u = np.random.default_rng([seed, epoch]).random((N, 9))
    side = np.sqrt(u[:, 5]) * size / 2
    x, y = u[:, 6] * size, u[:, 7] * size
    patch = np.stack([x - side, y - side, x + side, y + side], 1).round().clip(0, size).astype(np.int64)
    return Views(squeeze.crop_boxes(u[:, :4], (scale, 1)), torch.from_numpy(u[:, 4] < 0.5),
                 torch.from_numpy((u[:, 8] * N).astype(np.int64)), torch.from_numpy(patch))

def patch_mask(patch, size):
    """bool [B, 1, S, S]: true where the partner's view is pasted."""
    span = torch.arange(size, device=patch.device)
    left, top, right, bottom = (side.view(-1, 1) for side in patch.unbind(1))
    inside_x, inside_y = (span >= left) & (span < right), (span >= top) & (span < bottom)
    return (inside_y[:, :, None] & inside_x[:, None, :])[:, None]

def render(images, views, index):
    """The views of images[index]: float [B, 3, S, S] in levels 0..255. images: uint8 [N, 3, S, S]."""
    size, both = images.shape[-1], torch.cat([index, views.partner[index]])
    grid = squeeze.crop_grid(views.boxes[both], views.flips[both], size)
    own, pasted = squeeze.resample(images[both].float(), grid).chunk(2)
    return torch.where(patch_mask(views.patch[index], size), pasted, own)

@torch.no_grad()
def soft_labels(network, teacher, images, views, batch):
    """The teacher's logits for one epoch's views of all images, in order: float32 [N, K] on the device."""
    parts = (render(images, views, index) for index in torch.arange(len(images), device=images.device).split(batch))
    return torch.cat([squeeze.forward(network, squeeze.normalise(x, teacher["mean"], teacher["std"])) for x in parts])

# ---- Labels on disk, an epoch at a time, so that memory does not grow with the epochs --------------------------------

def compress(logits, k, temperature=20.0):
    """The k largest logits, one for all the rest, and the k classes, [N, 2k + 1]. The rest logit gives the remaining
    classes together the mass they had at `temperature`, in equal shares."""
    top, classes = logits.topk(k, 1)
    rest = logits.scatter(1, classes, -math.inf)
    count = max(logits.shape[1] - k, 1)
    rest = temperature * (torch.logsumexp(rest / temperature, 1, keepdim=True) - math.log(count))
    return torch.cat([top, rest.nan_to_num(neginf=-6e4), classes], 1)

def expand(stored, k, K):
    """What compress left, as logits [N, K]."""
    return stored[:, k:k + 1].repeat(1, K).scatter(1, stored[:, k + 1:].long(), stored[:, :k])

def label_folder(run, teacher):
    """Where a run's labels by `teacher` lie, a folder of squeeze.py; None: the teacher whose spectra were matched."""
    own = teacher is None or Path(teacher).resolve() == Path(run).resolve().parent
    return Path(run) / ("labels" if own else f"labels-{Path(teacher).resolve().name}")

def labeller(run, config, teacher):
    """(folder, config) of the teacher that labels, checked to know the run's data set, image by image."""
    parent = Path(teacher or Path(run).resolve().parent)
    found = squeeze.read_config(parent, "squeeze")
    if found["inputs"]["data"] != config["inputs"]["data"]:
        raise BadInput(f"--teacher {parent}: other training images than those of {run}: name one of the same data")
    return parent, found

def shape_of(settings, N, K):
    """Of the stored labels, float16."""
    return settings["keep_epochs"], N, 2 * settings["top_k"] + 1 if settings["top_k"] else K

def read_epoch(folder, settings, epoch, K):
    """The stored logits for an epoch of training, float32 [N, K]; with --keep-epochs E', epoch e is e mod E'."""
    stored = np.load(folder / "soft_labels.npy", mmap_mode="r")[epoch % settings["keep_epochs"]].astype(np.float32)
    return expand(torch.from_numpy(stored), settings["top_k"], K) if settings["top_k"] else torch.from_numpy(stored)

def check_labels(folder, settings, N, K):
    """Refuse stored labels that do not fit the run, whatever their config says."""
    path, first = folder / "soft_labels.npy", settings["top_k"] + 1 if settings["top_k"] else K      # column of classes
    with contextlib.suppress(OSError, ValueError):
        found = np.load(path, mmap_mode="r")
        if (found.shape, found.dtype) == (shape_of(settings, N, K), np.float16) and all(
                np.isfinite(e).all() and ((0 <= e[:, first:]) & (e[:, first:] < K)).all() for e in found):
            return
    raise BadInput(f"{path}: not finite labels {shape_of(settings, N, K)} of {K} classes: remove {folder} and relabel")

def epochs_done(path):
    """How many epochs a killed run left whole: those whose stored bytes have the CRC that log.jsonl tells."""
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError): # nothing there yet, or something broken: anew
        entries = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
        crc, stored = {entry["epoch"]: entry["crc"] for entry in entries}, np.load(path, mmap_mode="r")
        whole = [e + 1 in crc and crc[e + 1] == zlib.crc32(epoch.tobytes()) for e, epoch in enumerate(stored)]
        return (whole + [False]).index(False)
    return 0

def write(path, shape, label, args):
    """All epochs in order; a killed run goes on after the last whole one. label(epoch): the teacher's logits [N, K]."""
    temporary = path if path.exists() else path.with_name(path.name + ".tmp")      # in place if killed at the very end
    done, start, printed = epochs_done(temporary), time.time(), time.time()
    for epoch in range(done, shape[0]):
        logits = label(epoch)
        data = (compress(logits, args.top_k) if args.top_k else logits).cpu().numpy().astype(np.float16).tobytes()
        with squeeze.writing(temporary, "r+b" if epoch else "wb") as file:     # mapped, a full disk would be a crash
            np.lib.format.write_array_header_1_0(file, dict(descr="<f2", fortran_order=False, shape=shape))
            if not epoch:
                file.truncate(file.tell() + shape[0] * len(data))
            file.seek(epoch * len(data), 1)
            file.write(data)
        squeeze.log(path.parent, epoch=epoch + 1, crc=zlib.crc32(data), seconds=time.time() - start)
        if time.time() - printed > 10 or epoch + 1 == shape[0]:
            printed, rate = time.time(), (epoch + 1 - done) / (time.time() - start)
            print(f"epoch {epoch + 1}/{shape[0]}  {rate * len(logits):.0f} images/s  "
                  f"{(shape[0] - epoch - 1) / rate / 60:.1f} min left", flush=True)
    temporary.replace(path)

# ---- The stage -------------------------------------------------------------------------------------------------------

def load_run(run):
    """A finished recover run, checked to be of the teacher beside it: (images.pt's dict, config, teacher's folder)."""
    config, parent = squeeze.read_config(run, "recover"), Path(run).resolve().parent
    teacher = squeeze.read_config(parent, "squeeze")
    if teacher["artefacts"]["teacher.pt"] != config["inputs"]["teacher.pt"]:
        raise BadInput(f"{run}: made with another teacher than the one in {parent}: recover again")
    content, size = squeeze.load_state(squeeze.checked(run, "images.pt", config)), teacher["settings"]["size"]
    if not fits(content, size):
        raise BadInput(f"{run}/images.pt: not uint8 images [N, 3, {size}, {size}] with labels, class names, mean and "
                       "std, as recover.py writes them: make it again")
    return content, config, parent

def fits(content, size):
    """Whether images.pt, which may be a stranger's and anything, holds what later stages rely on."""
    with contextlib.suppress(Exception):
        images, labels, K = content["images"], content["labels"], len(content["classes"])
        values = content["mean"] + content["std"]
        return (images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
                and images.shape == (*labels.shape, 3, size, size) and 0 <= labels.min() and labels.max() < K
                and K == len({name for name in content["classes"] if isinstance(name, str) and name})
                and len(values) == 6 and all(map(math.isfinite, values)) and min(content["std"]) > 0
                and content["precision"] in ("float32", "bfloat16"))
    return False

def import_images(parent, source, resume):
    """Make a run folder inside the squeeze run `parent` out of an image folder source/<class>/*: returns its path.
    Classes are matched by name. Images are ordered by position in their class, then by class, as recover.py's."""
    parent, source = Path(parent), Path(source)
    config = squeeze.read_config(parent, "squeeze")
    teacher = squeeze.load_state(squeeze.checked(parent, "teacher.pt", config))
    present, pairs = squeeze.class_folders(source), zip(teacher["classes"], squeeze.folder_names(teacher["classes"]))
    folders = [name if name in present and folder not in present else folder for name, folder in pairs]
    if strange := sorted(set(present) - set(folders)):
        raise BadInput(f"--images {source}: class {strange[0]!r} is none of the teacher's in {parent}")
    paths, labels = squeeze.image_files(source, folders)
    position = torch.cat([torch.arange(n) for n in labels.unique_consecutive(return_counts=True)[1]])  # in its class
    order = np.lexsort((labels, position))
    paths, labels, size = [paths[i] for i in order], labels[order], teacher["size"]
    tensors = [image.clone() for image, _ in squeeze.stream(squeeze.Split(paths, labels), T.PILToTensor(), 1)]
    for image, path in zip(tensors, paths):
        if image.shape[2:] != (size, size):
            raise BadInput(f"{path}: {tuple(image.shape[2:])} pixels found, the teacher takes {size} squared: mend it")
    images, folder = torch.cat(tensors), parent / source.resolve().name
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    inputs = {"data": config["inputs"]["data"], "images": digest, **config["artefacts"]}
    about = {key: config["settings"][key] for key in ("dataset", "data", "network")}
    run = squeeze.open_run(folder, "recover", {**about, "ipc": 1 + int(position.max())}, inputs, resume)
    if not run["artefacts"]:
        content = {key: teacher[key] for key in ("classes", "mean", "std", "precision")}
        squeeze.save(folder / "images.pt", dict(images=images, labels=labels, **content, inputs=inputs,
                                                settings={"images": source.name}))
        squeeze.finish_run(folder, run, ["images.pt"], image_bytes=images.numel())
    print(f"images: {len(images)} from {source}, in {folder}")
    return str(folder)

def parse(argv):
    parser = squeeze.Parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("run", metavar="RUN", help="a folder made by recover.py (with --images: by squeeze.py)")
    add("--images", metavar="DIR", help="take these images, DIR/<class>/*, instead of a run's")
    add("--teacher", metavar="DIR", help="the squeeze run that labels (default: the one whose spectra were matched)")
    add = parser.add_argument_group("how").add_argument
    add("--epochs", type=number(int, 1), help="epochs of students to make labels for (CIFAR 1000, toy 60, else 300)")
    add("--scale", type=number(float, 0, 1, strict=True), help="smallest crop, share of area (CIFAR, toy 0.08; 0.5)")
    add("--keep-epochs", type=number(int, 1), metavar="E", help="store E epochs, students cycle through them")
    add("--top-k", type=number(int, 1), metavar="K", help="store the K largest logits, the rest share what is left")
    add("--batch", type=number(int, 1), default=500, help="images a forward pass (default 500)")
    add("--seed", type=number(int, 0), default=0, help="of the views (default 0)")
    return parser.parse_args(argv)

def resolve(args):
    """Flags left out take the run's preset. Returns args."""
    config = squeeze.read_config(args.run, "squeeze" if args.images else "recover")
    squeeze.fill(args, squeeze.PRESETS[config["settings"]["dataset"]]["relabel"])
    squeeze.fill(args, {"keep_epochs": args.epochs})
    if args.keep_epochs > args.epochs:
        raise BadInput(f"--keep-epochs {args.keep_epochs} found, must be at most --epochs {args.epochs}")
    return args

def main(argv):
    args, device = resolve(parse(argv)), squeeze.pick_device()
    squeeze.show(args)
    run = import_images(args.run, args.images, args.resume) if args.images else args.run
    content, config, _ = load_run(run)
    parent, labelling = labeller(run, config, args.teacher)
    N, K, S = len(content["images"]), len(content["classes"]), content["images"].shape[-1]
    if args.top_k and not args.top_k <= K <= 2048:         # float16 holds whole numbers so far
        raise BadInput(f"--top-k {args.top_k} found, must be at most the {K} classes, and they 2048: use --keep-epochs")
    path, shape = label_folder(run, args.teacher) / "soft_labels.npy", shape_of(vars(args), N, K)
    size = 2 * math.prod(shape)
    if not (path.parent / "log.jsonl").is_file() and size > (free := shutil.disk_usage(run).free):
        raise BadInput(f"--epochs {args.epochs}: soft labels need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                       "use --keep-epochs or --top-k, or eval.py --online")
    network, teacher, _ = squeeze.load_teacher(parent, device)
    images = content["images"].to(device)
    def label(epoch):
        views = draw_views(args.seed, epoch, N, S, args.scale).to(device)
        return soft_labels(network, teacher, images, views, args.batch)
    settings = {**squeeze.settings(args, ("run", "images", "teacher")), "precision": teacher["precision"]}
    inputs = {name: made["artefacts"][name] for name, made in (("images.pt", config), ("teacher.pt", labelling))}
    config = squeeze.open_run(path.parent, "relabel", settings, inputs, args.resume)
    if not config["artefacts"]:
        print(f"{path}: logits {list(shape)}, {size / 1e6:.2f} MB; images are {images.numel() / 1e6:.2f} MB")
        write(path, shape, label, args)
        squeeze.finish_run(path.parent, config, [path.name], label_bytes=size)
    print(f"labels: {path}, {size / 1e6:.2f} MB, peak memory {squeeze.peak_memory(device):.0f} MB\n"
          f"next: python eval.py {run}" + (f" --teacher {args.teacher}" if args.teacher else ""))

if __name__ == "__main__":
    squeeze.script(main)
