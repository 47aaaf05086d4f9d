"""Stage 3, relabel: store the teacher's soft labels for random views of all images, epoch by epoch.

    python relabel.py runs/toy-convnet/cfm-ipc10                  seconds
    python relabel.py runs/toy-convnet/cfm-ipc10 --teacher DIR    another teacher's labels
    python relabel.py runs/toy-convnet --images DIR               another method's DIR/<class>/*

A view (crop box, flip, CutMix partner, patch) follows from seed, epoch, image, N, S, scale: eval.py rebuilds exactly
the pixels that the teacher saw, and only the labels have to be stored. Writes RUN/labels/, or RUN/labels-<teacher>/:
soft_labels.npy, float16 logits [E, N, K]: ImageNet's at IPC 50 30 GB, less by --keep-epochs, --top-k ([E, N, 2k+1])."""
import contextlib
import hashlib
import math
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from torchvision import transforms as T

import recover
import squeeze
from squeeze import BadInput, number

class Views(NamedTuple):
    """One random view of each of N images. Of E epochs E N views, an epoch after the other (N below: E N)."""
    boxes: torch.Tensor         # [N, 4] crop, mirrored or not (recover.crop_boxes)
    partner: torch.Tensor       # [N] int64: whose view is pasted
    patch: torch.Tensor         # [N, 4] int64 pixels: left, top, right, bottom of what is pasted (CutMix)

def draw_views(seed, epoch, N, size, scale, device="cpu", together=1):
    """The views of an epoch, or of several in a row. Image i has row i of the stream of (seed, epoch): no batch, no
    order, no device. CutMix as its paper has it: area share of the patch uniform in [0, 1], sides cut at the border."""
    u = np.concatenate([np.random.default_rng([seed, e]).random((N, 9)) for e in range(epoch, epoch + together)])
    centre, half = u[:, 6:8] * size, np.sqrt(u[:, 5:6]) * size / 2
    patch = np.concatenate([centre - half, centre + half], 1).round().clip(0, size).astype(np.int64)
    others = (torch.from_numpy(v) for v in ((u[:, 8] * N).astype(np.int64) + np.arange(len(u)) // N * N, patch))
    return Views(*(v.to(device) for v in (recover.crop_boxes(u[:, :4], (scale, 1), flip=u[:, 4]), *others)))

def patch_mask(patch, size):
    """bool [B, 1, S, S]: true where the partner's view is pasted."""
    left, top, right, bottom = patch.view(-1, 4, 1, 1, 1).unbind(1)
    at = torch.arange(size, device=patch.device)
    return (left <= at) & (at < right) & (top <= at[:, None]) & (at[:, None] < bottom)

def render(images, views, index):
    """The views at index [B], of images[index % N]: float [B, 3, S, S] in levels 0..255. images: uint8 [N, 3, S, S]."""
    size, both = images.shape[-1], torch.cat([index, views.partner[index]])
    grid = recover.crop_grid(views.boxes[both], size)
    own, pasted = recover.resample(images[both % len(images)].float(), grid).chunk(2)
    return torch.where(patch_mask(views.patch[index], size), pasted, own)

@torch.no_grad()
def soft_labels(network, teacher, images, views, batch):
    """The teacher's logits for views of all images, in order: float32 [N, K] (or of several epochs) on the device."""
    parts = (render(images, views, i) for i in torch.arange(len(views.boxes), device=images.device).split(batch))
    return torch.cat([squeeze.forward(network, squeeze.normalise(x, teacher["mean"], teacher["std"])) for x in parts])

# ---- Labels on disk, few epochs at a time, so that memory does not grow with the epochs ------------------------------
def labeller(run, config, teacher):
    """(Folder of the squeeze run that labels a run, folder of its labels, hashes of what they are made from). teacher:
    that squeeze run; None: the one whose spectra were matched. BadInput if its images or their size are others."""
    own = Path(run).resolve().parent
    parent = Path(teacher or own)
    found, size = squeeze.read_config(parent, "squeeze"), squeeze.read_config(own, "squeeze")["settings"]["size"]
    if (found["inputs"]["data"], found["settings"]["size"]) != (config["inputs"]["data"], size):
        raise BadInput(f"--teacher {parent}: of other images than {run}, or of another size: name one of the same")
    inputs = {"images.pt": config["artefacts"]["images.pt"], "teacher.pt": found["artefacts"]["teacher.pt"]}
    return parent, Path(run) / ("labels" if parent.resolve() == own else f"labels-{parent.resolve().name}"), inputs

def compress(logits, k, T=20.0):
    """--top-k: logits [N, K] as [N, 2k + 1]: the k largest, one for all others that keeps the mass they have together
    at temperature T, and the classes of the k (float16 counts to 2048)."""
    top, classes = logits.topk(k, 1)
    rest = T * (logits.scatter(1, classes, -math.inf) / T).logsumexp(1, keepdim=True)
    return torch.cat([top, rest - T * math.log(logits.shape[1] - k), classes], 1)

def expand(stored, K):
    """Logits [N, K] of stored ones: as they are, or of what compress left."""
    top, rest, classes = stored.tensor_split([stored.shape[1] // 2, stored.shape[1] // 2 + 1], 1)
    return stored if stored.shape[1] == K else rest.repeat(1, K).scatter(1, classes.long().clamp(0, K - 1), top)

def check_labels(path, shape):
    """Refuse stored labels that are not [E, N, K], or of --top-k [E, N, 2k + 1], whatever their hash says."""
    with contextlib.suppress(Exception):                   # they may be a stranger's and anything
        found = np.load(path, mmap_mode="r")
        if found.dtype == np.float16 and found.shape == shape and all(np.isfinite(epoch).all() for epoch in found):
            return
    raise BadInput(f"{path}: not finite float16 labels {shape}: remove {path.parent} and relabel")

def write(path, shape, label, together):
    """All epochs in order, `together` at a time; label(epoch, n): the labels of n from epoch on, [n N, width]. They are
    appended, flushed to the disk, log.jsonl tells their hashes: a killed run goes on after the last such group."""
    part, log, size, done = path.with_suffix(".npy.tmp"), path.with_name("log.jsonl"), 2 * math.prod(shape[1:]), 0
    sums = dict(re.findall(rb'"epoch": (\d+), "sha256": "(\w+)"', log.read_bytes() if log.is_file() else b""))
    with squeeze.writing(part, "r+b" if part.exists() else "w+b") as file:     # mapped, a full disk would be a crash
        np.lib.format.write_array_header_1_0(file, dict(descr="<f2", fortran_order=False, shape=shape))
        header = file.tell()
        while sums.get(b"%d" % (done + 1)) == hashlib.sha256(file.read(size)).hexdigest().encode():
            done += 1
        done -= done % together                            # a batch of other views has other last digits
        file.truncate(header + done * size)
    start = printed = time.time() - 1e-3                   # Windows counts in steps of 15 ms
    for epoch in range(done, shape[0], together):
        end = min(epoch + together, shape[0])
        data = label(epoch, end - epoch).half().cpu().numpy().tobytes()
        with squeeze.writing(part, "ab") as file:
            file.write(data)
        hashes = [hashlib.sha256(data[at:at + size]).hexdigest() for at in range(0, len(data), size)]
        squeeze.log(path.parent, *(dict(epoch=e, sha256=sha256) for e, sha256 in enumerate(hashes, epoch + 1)))
        if time.time() - printed > 10 or end == shape[0]:
            printed, rate, left = time.time(), (end - done) / (time.time() - start), (shape[0] - end) / 60
            print(f"epoch {end}/{shape[0]}  {rate * shape[1]:.0f} images/s  {left / rate:.1f} min left", flush=True)
    part.replace(path)

# ---- The stage -------------------------------------------------------------------------------------------------------
def recipe(dataset, N):
    """{"epochs", "batch", "scale"} of students of N images where no flag says otherwise; tests/RESULTS.md says why."""
    preset = squeeze.PRESETS[dataset]
    few, small, large = preset["batch"]
    epochs = max(preset["relabel"]["epochs"], -(-preset.get("views", 0) // N))
    return {**preset["relabel"], "epochs": epochs, "batch": min(N, small if N <= few else large)}

def load_run(run):
    """A finished recover run, checked to be of the teacher beside it: (images.pt's dict, config, teacher's folder)."""
    config, parent = squeeze.read_config(run, "recover"), Path(run).resolve().parent
    teacher = squeeze.read_config(parent, "squeeze")
    if teacher["artefacts"]["teacher.pt"] != config["inputs"]["teacher.pt"]:
        raise BadInput(f"{run}: made with another teacher than the one in {parent}: recover again")
    content, size = squeeze.load_state(squeeze.checked(run, "images.pt", config)), teacher["settings"]["size"]
    with contextlib.suppress(Exception):                   # it may be a stranger's and anything
        images, labels, K = content["images"], content["labels"], len(content["classes"])
        values = content["mean"] + content["std"]
        if (images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
                and images.shape == (*labels.shape, 3, size, size) and 0 <= labels.min() and labels.max() < K
                and K == len({name for name in content["classes"] if isinstance(name, str) and name})
                and len(values) == 6 and all(map(math.isfinite, values)) and min(content["std"]) > 0
                and content["precision"] in ("float32", "bfloat16")):
            return content, config, parent
    raise BadInput(f"{run}/images.pt: not uint8 images [N, 3, {size}, {size}], labels, classes, mean, std: mend it")

def folder_names(classes):
    """What eval.py --export calls the folders of classes: their names, quoted as in a URL, or %XX for every byte where
    one could lead out of the export, is reserved by Windows, or differs from another in upper case only."""
    plain = re.compile(r"(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))[\w%-]([\w .%-]*[\w%-])?", re.ASCII | re.IGNORECASE)
    names, lower = [name.encode("utf8", "surrogatepass") for name in classes], [name.lower() for name in classes]
    return [quote(name, safe=" ") if plain.fullmatch(quote(name, safe=" ")) and lower.count(key) == 1 else
            "".join(f"%{byte:02X}" for byte in name) for name, key in zip(names, lower)]

def import_images(parent, source):
    """Make a run folder inside the squeeze run `parent` out of an image folder source/<class>/*: returns its path.
    Classes are matched by name. Images are ordered by position in their class, then by class, as recover.py's."""
    (_, teacher, config), present = recover.load_teacher(parent, "cpu"), squeeze.class_folders(source)
    size, pairs = teacher["size"], zip(teacher["classes"], folder_names(teacher["classes"]))
    folders = [name if name in present and folder not in present else folder for name, folder in pairs]
    if (strange := sorted(set(present) - set(folders))[:1]) or not present:
        raise BadInput(f"--images {source}: expected DIR/<class>/*, classes of {parent}, found {strange or 'none'}")
    files = squeeze.image_files(source, folders)
    position = torch.cat([torch.arange(n) for n in files.labels.unique_consecutive(return_counts=True)[1]])  # in class
    files = squeeze.select(files, np.lexsort((files.labels, position)))
    images, folder = torch.empty(len(position), 3, size, size, dtype=torch.uint8), parent / source.resolve().name
    for i, (image, _) in enumerate(squeeze.stream(files, T.PILToTensor(), 1)):
        if image.shape[2:] != (size, size):
            raise BadInput(f"{files.images[i]}: {tuple(image.shape[2:])} pixels found, not {size} squared: mend it")
        images[i] = image[0]
    digest = hashlib.sha256(images.numpy().tobytes() + files.labels.numpy().tobytes()).hexdigest()
    inputs = {"data": config["inputs"]["data"], "images": digest, **config["artefacts"]}
    about = {key: config["settings"][key] for key in ("dataset", "data", "network")}
    run = squeeze.open_run(folder, "recover", {**about, "ipc": 1 + int(position.max())}, inputs, resume=True)
    if not run["artefacts"]:
        recover.write_images(folder, run, teacher, images, files.labels)
    print(f"images: {len(images)} from {source}, in {folder}")
    return folder

def parse(argv):
    parser = squeeze.Parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("run", metavar="RUN", help="a folder made by recover.py (with --images: by squeeze.py)")
    add("--images", metavar="DIR", help="take these images, DIR/<class>/*, instead of a run's")
    add("--teacher", metavar="DIR", help="the squeeze run that labels (default: the one whose spectra were matched)")
    add = parser.add_argument_group("how").add_argument
    add("--epochs", type=number(int, 1), help="of students (CIFAR 1000, or 100,000 views; toy 60; else 300)")
    add("--scale", type=number(float, 0, 1, strict=True), help="smallest crop, of the area (CIFAR, toy 0.08; else 0.5)")
    add("--keep-epochs", type=number(int, 1), metavar="E", help="store E epochs, students cycle through them")
    add("--top-k", type=number(int, 1), metavar="k", help="store the k largest logits (temperature 20; costs accuracy)")
    add("--batch", type=number(int, 1), default=500, help="images a forward pass (default 500)")
    add("--seed", type=number(int, 0), default=0, help="of the views (default 0)")
    return parser.parse_args(argv)

def main(argv):
    args, device = parse(argv), squeeze.pick_device()
    run = import_images(Path(args.run), Path(args.images)) if args.images else args.run
    content, config, _ = load_run(run)
    squeeze.fill(args, recipe(config["settings"]["dataset"], len(content["images"])))
    args.keep_epochs = args.keep_epochs or args.epochs
    if args.keep_epochs > args.epochs:
        raise BadInput(f"--keep-epochs {args.keep_epochs} found, must be at most --epochs {args.epochs}")
    squeeze.show(args)
    parent, folder, inputs = labeller(run, config, args.teacher)
    K = len(content["classes"])
    if args.top_k and not 2 * args.top_k + 1 < K <= 2048:
        raise BadInput(f"--top-k {args.top_k} of {K} classes: must be below {(K - 1) / 2:g}, with 2048 classes at most")
    shape = args.keep_epochs, len(content["images"]), 2 * args.top_k + 1 if args.top_k else K
    size, path = 2 * math.prod(shape), folder / "soft_labels.npy"
    if not (folder / "log.jsonl").is_file() and size > (free := shutil.disk_usage(run).free):
        raise BadInput(f"--epochs {args.epochs}: soft labels need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                       "use --keep-epochs or eval.py --online")
    network, teacher, teacher_config = recover.load_teacher(parent, device)
    images, args.precision = content["images"].to(device), teacher["precision"]
    def label(epoch, n):
        views = draw_views(args.seed, epoch, len(images), images.shape[-1], args.scale, device, n)
        logits = soft_labels(network, teacher, images, views, args.batch)
        return compress(logits, args.top_k) if args.top_k else logits
    settings = squeeze.settings(args, ("run", "images", "teacher", "batch"))     # it hardly matters
    config = squeeze.open_run(folder, "relabel", settings, inputs, args.resume)
    if not config["artefacts"]:
        print(f"{path}: logits {list(shape)}, {size / 1e6:.2f} MB; images are {images.numel() / 1e6:.2f} MB")
        if not path.exists():                              # it does if a run was killed at the very end
            write(path, shape, label, max(1, args.batch // len(images)))
        squeeze.finish_run(folder, config, [path.name], label_bytes=size)
    print(f"labels: {path}, {size / 1e6:.2f} MB, peak memory {recover.peak_memory(device):.0f} MB\n"
          f"next: python eval.py {run}" + (f" --teacher {args.teacher}" if args.teacher else "")
          + " --validate" * teacher_config["settings"]["validate"])

if __name__ == "__main__":
    squeeze.script(main)
