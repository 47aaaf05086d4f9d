"""Stage 3, relabel: store the teacher's soft label for a random view of every image, for every
epoch of the students (FKD, as SRe2L has it).

    python relabel.py runs/toy-convnet/cfm-ipc10                  seconds
    python relabel.py runs/toy-convnet/cfm-ipc10 --teacher DIR    another teacher's labels
    python relabel.py runs/toy-convnet --images DIR               another method's DIR/<class>/*

A view (crop box, flip, CutMix partner and patch) is a pure function of (seed, epoch, image): eval.py rebuilds exactly
the pixels that the teacher saw, whatever its batch size, order or device, so that nothing but the labels has to be
stored. Writes RUN/labels/, or RUN/labels-<teacher>/: soft_labels.npy (float16 logits [E, N, K]), config.json and
log.jsonl. Where full labels are too large (ImageNet at IPC 50: 28 GB for 0.75 GB of images), --keep-epochs stores fewer
epochs and --top-k fewer logits.
"""
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
from squeeze import BadInput, Namespace, number

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

    CutMix as its paper has it: area share of the patch uniform in [0, 1], sides cut at the image's border.
    """
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
    """The teacher's logits for one epoch's views of all images, in order: yields float32 [B, K] on the device."""
    for index in torch.arange(len(images), device=images.device).split(batch):
        with squeeze.autocast(network):
            logits = network(squeeze.normalise(render(images, views, index), teacher["mean"], teacher["std"]))
        yield logits.float()

# ---------------------------------------------------------------------------------------------------------------------
# Labels on disk, an epoch at a time, so that memory does not grow with the epochs

def compress(logits, k, temperature=20.0):
    """The k largest logits and one for all the rest, [N, k + 1], with their classes, int16 [N, k].

    The rest logit gives the remaining classes together the mass they had at `temperature`, in equal shares.
    """
    top, classes = logits.topk(k, 1)
    rest = logits.scatter(1, classes, -math.inf)
    count = max(logits.shape[1] - k, 1)
    rest = temperature * (torch.logsumexp(rest / temperature, 1, keepdim=True) - math.log(count))
    return torch.cat([top, rest.nan_to_num(neginf=-6e4)], 1), classes.short()

def expand(values, classes, K):
    """What compress left, as logits [N, K]."""
    return values[:, -1:].repeat(1, K).scatter(1, classes.long(), values[:, :-1])

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

def read_epoch(folder, settings, epoch, K):
    """The stored logits for an epoch of training, float32 [N, K]; with --keep-epochs E', epoch e is e mod E'."""
    stored = epoch % settings["keep_epochs"]
    values = torch.from_numpy(np.load(folder / "soft_labels.npy", mmap_mode="r")[stored].astype(np.float32))
    if not settings["top_k"]:
        return values
    return expand(values, torch.from_numpy(np.load(folder / "top_classes.npy", mmap_mode="r")[stored].copy()), K)

def arrays_of(settings, N, K):
    """{file: (shape, dtype)} of the labels that settings ask for."""
    E, k = settings["keep_epochs"], settings["top_k"]
    arrays = {"soft_labels.npy": ((E, N, k + 1 if k else K), np.float16)}
    return {**arrays, "top_classes.npy": ((E, N, k), np.int16)} if k else arrays

def check_labels(folder, settings, N, K):
    """Refuse stored labels that do not fit the run, whatever their config says."""
    for name, (shape, dtype) in arrays_of(settings, N, K).items():
        low, high = (-1, K) if dtype is np.int16 else (-math.inf, math.inf)
        try:
            found = np.load(folder / name, mmap_mode="r")
            fine = (found.shape, found.dtype) == (shape, dtype) and all(low < e.min() and e.max() < high for e in found)
        except (OSError, ValueError):
            fine = False
        if not fine:
            raise BadInput(f"{folder / name}: not finite labels {list(shape)} of {K} classes: remove {folder} and "
                           "relabel")

def epochs_done(paths):
    """How many epochs a killed run left whole: those whose stored bytes have the CRC that log.jsonl tells."""
    done = 0
    try:
        entries = [json.loads(line) for line in (paths[0].parent / "log.jsonl").read_text().splitlines()]
        crc = {entry["epoch"]: entry["crc"] for entry in entries}
        stored = [np.load(path, mmap_mode="r") for path in paths]
        while done < len(stored[0]) and crc.get(done + 1) == [zlib.crc32(array[done].tobytes()) for array in stored]:
            done += 1
    except (OSError, ValueError, KeyError, IndexError):    # nothing there yet, or something broken: from here on anew
        pass
    return done

def write(folder, arrays, label, args):
    """All epochs in order; a killed run goes on after the last whole one. arrays: {file: (shape, dtype)}; label(epoch):
    the teacher's logits [N, K]."""
    paths = [folder / name if (folder / name).exists() else folder / (name + ".tmp") for name in arrays]
    done, start, printed = epochs_done(paths), time.time(), time.time()
    for epoch in range(done, args.keep_epochs):
        logits, crc = label(epoch), []
        parts = compress(logits, args.top_k) if args.top_k else [logits]
        for path, (shape, dtype), part in zip(paths, arrays.values(), parts):
            data = part.cpu().numpy().astype(dtype).tobytes()
            with squeeze.writing(path, "r+b" if epoch else "wb") as file:      # mapped, a full disk would be a crash
                np.lib.format.write_array_header_1_0(
                    file, dict(descr=np.dtype(dtype).str, fortran_order=False, shape=shape))
                if not epoch:
                    file.truncate(file.tell() + args.keep_epochs * len(data))
                file.seek(epoch * len(data), 1)
                file.write(data)
            crc.append(zlib.crc32(data))
        squeeze.log(folder, epoch=epoch + 1, crc=crc, seconds=time.time() - start)
        if time.time() - printed > 10 or epoch + 1 == args.keep_epochs:
            printed, rate = time.time(), (epoch + 1 - done) / (time.time() - start)
            print(f"epoch {epoch + 1}/{args.keep_epochs}  {rate * len(logits):.0f} images/s  "
                  f"{(args.keep_epochs - epoch - 1) / rate / 60:.1f} min left", flush=True)
    for name, path in zip(arrays, paths):
        path.replace(folder / name)                        # in place already if it was killed between here and the end

# ---------------------------------------------------------------------------------------------------------------------
# The stage

def load_run(run):
    """A finished recover run, checked to be of the teacher beside it: (images.pt's dict, config, teacher's folder)."""
    config = squeeze.read_config(run, "recover")
    parent = Path(run).resolve().parent
    teacher = squeeze.read_config(parent, "squeeze")
    if teacher["artefacts"]["teacher.pt"] != config["inputs"]["teacher.pt"]:
        raise BadInput(f"{run}: made with another teacher than the one in {parent}: recover again")
    content, size = squeeze.load(run, "images.pt", config), teacher["settings"]["size"]
    if not fits(content, size):
        raise BadInput(f"{run}/images.pt: not uint8 images [N, 3, {size}, {size}] with labels, class names, mean and "
                       "std, as recover.py writes them: make it again")
    return content, config, parent

def fits(content, size):
    """Whether images.pt, which may be a stranger's, holds what later stages rely on."""
    try:
        images, labels, K = content["images"], content["labels"], len(content["classes"])
        values = content["mean"] + content["std"]
        return (images.dtype == torch.uint8 and labels.dtype == torch.int64 and images.is_contiguous()
                and images.shape == (*labels.shape, 3, size, size) and 0 <= labels.min() and labels.max() < K
                and K == len({name for name in content["classes"] if isinstance(name, str) and name})
                and len(values) == 6
                and all(map(math.isfinite, values)) and min(content["std"]) > 0
                and content["precision"] in ("float32", "bfloat16"))
    except Exception:                                      # it may be anything
        return False

def import_images(parent, source, resume):
    """Make a run folder inside the squeeze run `parent` out of an image folder source/<class>/*: returns its path.

    Classes are matched by name. Images are ordered by position in their class, then by class, as recover.py has them.
    """
    parent, source = Path(parent), Path(source)
    config = squeeze.read_config(parent, "squeeze")
    teacher = squeeze.load(parent, "teacher.pt", config)
    if not source.is_dir():
        raise BadInput(f"--images {source}: no such folder")
    present, pairs = squeeze.class_folders(source), zip(teacher["classes"], squeeze.folder_names(teacher["classes"]))
    folders = [name if name in present and folder not in present else folder for name, folder in pairs]
    strange = sorted(set(present) - set(folders))
    if strange:
        raise BadInput(f"--images {source}: class {strange[0]!r} is none of the teacher's in {parent}")
    paths, labels = squeeze.image_files(source, folders)
    counts = labels.unique_consecutive(return_counts=True)[1]                  # paths go class by class, by name
    position = torch.cat([torch.arange(n) for n in counts])                    # in its class
    order = np.lexsort((labels, position))
    files = squeeze.Files(squeeze.Split([paths[i] for i in order], labels[order]), T.PILToTensor())
    tensors, labels = [files[i][0] for i in range(len(files))], files.split.labels
    for image, path in zip(tensors, files.split.images):
        if image.shape[1:] != (teacher["size"], teacher["size"]):
            raise BadInput(f"{path}: {tuple(image.shape[1:])} pixels found, the teacher takes {teacher['size']} squared"
                           ": mend or remove it")
    images, folder = torch.stack(tensors), parent / source.resolve().name
    about = {key: config["settings"][key] for key in ("dataset", "data", "network")}
    about.update(images=str(source.resolve()), ipc=1 + int(position.max()))
    digest = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    inputs = {"data": config["inputs"]["data"], "images": digest, **config["artefacts"]}
    run = squeeze.open_run(folder, "recover", about, inputs, resume)
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
    add("--scale", type=number(float, 0, strict=True), help="smallest crop, share of the area (CIFAR, toy 0.08; 0.5)")
    add("--keep-epochs", type=number(int, 1), metavar="E", help="store E epochs, students cycle through them")
    add("--top-k", type=number(int, 1), metavar="K", help="store the K largest logits, the rest share what is left")
    add("--batch", type=number(int, 1), default=500, help="images a forward pass (default 500)")
    add("--seed", type=number(int, 0), default=0, help="of the views (default 0)")
    return parser.parse_args(argv)

def main(argv):
    args = parse(argv)
    stage = "squeeze" if args.images else "recover"
    squeeze.fill(args, squeeze.PRESETS[squeeze.read_config(args.run, stage)["settings"]["dataset"]]["relabel"])
    args.keep_epochs = args.keep_epochs or args.epochs
    squeeze.show(args)
    for flag, bad, most in (("scale", args.scale > 1, 1),
                            ("keep-epochs", args.keep_epochs > args.epochs, f"--epochs {args.epochs}")):
        if bad:
            raise BadInput(f"--{flag} {getattr(args, flag.replace('-', '_'))} found, must be at most {most}")
    run, args.images = import_images(args.run, args.images, args.resume) if args.images else args.run, None
    make(run, args)

def ensure(run, teacher, epochs, resume):
    """Make the labels of a run that has none, or the rest of unfinished ones if asked to resume."""
    flags = [str(word) for pair in (("--epochs", epochs), ("--teacher", teacher)) if pair[1] for word in pair]
    squeeze.ensure(label_folder(run, teacher), "relabel", [str(run), *flags], main, lambda a: make(run, a), resume)

def make(run, args):
    """The stage after its flags: also what eval.py calls for missing or unfinished labels."""
    device = squeeze.pick_device()
    content, run_config, _ = load_run(run)
    parent, teacher_config = labeller(run, run_config, args.teacher)
    N, K, S = len(content["images"]), len(content["classes"]), content["images"].shape[-1]
    if (args.top_k or 1) > K:
        raise BadInput(f"--top-k {args.top_k} found, must be at most the {K} classes")
    folder, arrays = label_folder(run, args.teacher), arrays_of(vars(args), N, K)
    size = sum(2 * math.prod(shape) for shape, _ in arrays.values())
    if not (folder / "log.jsonl").is_file() and size > (free := shutil.disk_usage(run).free):
        raise BadInput(f"--epochs {args.epochs}: soft labels need {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                       "use --keep-epochs or --top-k, or eval.py --online")
    network, teacher, _ = squeeze.load_teacher(parent, device)
    args.precision, images = teacher["precision"], content["images"].to(device)

    def label(epoch):
        views = draw_views(args.seed, epoch, N, S, args.scale).to(device)
        return torch.cat(list(soft_labels(network, teacher, images, views, args.batch)))
    inputs = {"images.pt": run_config["artefacts"]["images.pt"],
              "teacher.pt": teacher_config["artefacts"]["teacher.pt"]}
    config = squeeze.open_run(folder, "relabel", squeeze.settings(args, hidden=("run", "images")), inputs, args.resume)
    if not config["artefacts"]:
        print(f"{folder}: logits {list(arrays['soft_labels.npy'][0])}, {size / 1e6:.2f} MB; images are "
              f"{images.numel() / 1e6:.2f} MB")
        write(folder, arrays, label, args)
        squeeze.finish_run(folder, config, list(arrays), label_bytes=size)
    print(f"labels: {folder / 'soft_labels.npy'}, {size / 1e6:.2f} MB, peak memory "
          f"{squeeze.peak_memory(device):.0f} MB\nnext: python eval.py {run}"
          + (f" --teacher {args.teacher}" if args.teacher else ""))

if __name__ == "__main__":
    squeeze.script(main)
