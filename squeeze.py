"""Stage 1, squeeze: train the teacher, then take the real set's statistics (FFC, FLC) in one pass.

    python squeeze.py                                                  toy, a minute or two on a CPU
    python squeeze.py --dataset cifar10 --network convnet --epochs 16  9 to 40 minutes there

Writes runs/<dataset>-<network>/, with what is not the default in its name (...-epochs16): teacher.pt, statistics.pt,
config.json (settings, versions, hashes), log.jsonl (a line an epoch). First comes what all stages share."""
import argparse
import contextlib
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import pickle
import re
import sys
import time
import zipfile
from argparse import Namespace                             # what the later stages carry jobs in
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision import datasets, transforms as T
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, make_dataset

import spectral

# One row a data set: what it is, then each stage's settings (paper, Tables 9-12, and the authors' code for views,
# labels, students; ours: toy, CIFAR-10's batches of 10, `views`, the fewest a student sees). `ours`: defaults,
# measured on CIFAR only; `early`: its teacher's epochs / sqrt(IPC); batch: a student's, (N, up to N, beyond N).
RECOVER = dict(alpha_max=0.1, iterations=1000, lr=0.1, batch=200, gamma=0.1, init="real", emu="paper")
SMALL = dict(epochs=100, lr=0.1, wd=5e-4, batch=128, schedule="cosine", augment="crop")
LARGE = dict(epochs=90, lr=0.1, wd=1e-4, batch=256, schedule="cosine", augment="resized")
CIFAR = dict(size=32, network="resnet18", relabel=dict(epochs=1000, scale=0.08), views=100_000,
             ours=dict(init="confident", iterations=100, lr=0.02, gamma=10.0, emu="pool"))
FOLDER = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], size=224, network="resnet18", squeeze=LARGE,
              recover=RECOVER, ours=dict(emu="pool"), relabel=dict(epochs=300, scale=0.5), batch=(0, 100, 100))
PRESETS = {
    "toy": dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], size=32, network="convnet", ours=dict(emu="pool"),
                squeeze=dict(SMALL, epochs=4, lr=0.05, batch=50), recover=dict(RECOVER, iterations=100, batch=10),
                relabel=dict(epochs=60, scale=0.08), batch=(0, 25, 25)),
    "cifar10": dict(CIFAR, mean=[0.4914, 0.4822, 0.4465], std=[0.2470, 0.2435, 0.2616], batch=(100, 10, 100),
                    early=4, squeeze=dict(SMALL, epochs=200), recover=dict(RECOVER, lr=0.25, batch=10)),
    "cifar100": dict(CIFAR, mean=[0.5071, 0.4865, 0.4409], std=[0.2673, 0.2564, 0.2762], batch=(1000, 100, 200),
                     early=13, squeeze=SMALL, recover=dict(RECOVER, lr=0.25, batch=100)),
    "tiny": dict(FOLDER, mean=[0.4802, 0.4481, 0.3975], std=[0.2770, 0.2691, 0.2821], size=64,
                 squeeze=dict(LARGE, epochs=50, lr=0.2), recover=dict(RECOVER, alpha_max=1.0)),
    "imagenet": dict(FOLDER, squeeze=dict(LARGE, schedule="step"), recover=dict(RECOVER, batch=500)), "folder": FOLDER}

# ---- Errors and flags ------------------------------------------------------------------------------------------------
class BadInput(ValueError):
    """Something the user can mend. The message is one line: the flag or file, what was found, what to do."""
    def __init__(self, message):
        message = message.split("BadInput: ")[-1].strip()  # a DataLoader's worker hands on a traceback
        super().__init__("".join(c if c.isprintable() else "?" for c in message))      # strangers name files, classes

class Parser(argparse.ArgumentParser):
    """argparse with the first two paragraphs of a script's docstring as help, and one-line errors like all others."""
    def __init__(self, doc):
        super().__init__(description="\n\n".join(doc.split("\n\n")[:2]), formatter_class=argparse.RawTextHelpFormatter)
        self.add_argument("--resume", action="store_true", help="continue what a killed run left")

    def error(self, message):
        raise BadInput(f"{message} (see --help)")

def number(kind, low, high=2**63 - 1, strict=False):
    """An argparse type: an int or float that is >= low (> low if strict) and <= high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or (strict and value == low):                     # NaN is neither
            raise argparse.ArgumentTypeError(f"{text} found, must be {'>' if strict else '>='} {low} and <= {high}")
        return value
    parse.__name__ = kind.__name__                         # argparse names it for what is no number
    return parse

def script(main):
    """Run a stage's main(): what the user can mend becomes one line on stderr and exit code 1."""
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False                # by default convolutions in float32 keep 10 bits of it
    try:
        return main(sys.argv[1:])
    except (BadInput, OSError) as error:
        reason = str(error) if isinstance(error, BadInput) else f"{error}: mend that, then go on with --resume"
    except (MemoryError, RuntimeError) as error:           # on a CPU torch raises a plain one
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        reason = "out of memory: lower --batch (a run of its own, but of relabel.py)"
    except KeyboardInterrupt:
        reason = "interrupted; the same command with --resume goes on"
    sys.exit(f"{Path(sys.argv[0]).name}: {BadInput(reason)}")              # of one line, an OSError's too

def keep_freed_memory():
    """Ask glibc to keep freed blocks: faulting large activations in again, page by page, is 40 % of a step on a CPU."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0), libc.mallopt(-1, 2**31 - 1)   # M_MMAP_MAX: none comes from mmap; M_TRIM_THRESHOLD: no trim

def pick_device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---- Data sets, and batches of them ----------------------------------------------------------------------------------
class Split(NamedTuple):
    images: object          # uint8 [n, 3, S, S] in memory, or a list of n file names that are read when needed
    labels: torch.Tensor    # int64 [n]

class Data(NamedTuple):
    classes: list           # K class names; a label is an index into this list, in every stage
    size: int               # S, pixels
    train: Split
    test: Split
    sha256: str             # of training labels and images (of files names and sizes: reading takes an hour)
    tested: str = ""        # the same of the test set: eval.py's rows depend on it, no teacher does

def toy(per_class, classes, seed, size=32):
    """Toy images uint8 [n, 3, S, S], labels [n]. Class k is a pair: colour layout k // 2 (low frequency) and stripe
    direction k % 2 (high); an image bends its layout, shifts phase and strength of its stripes, and adds noise."""
    layouts = np.random.default_rng([1234, classes]).random(((classes + 1) // 2, 3, 3, 3), dtype=np.float32)
    rng, grid, images = np.random.default_rng([seed, classes]), torch.arange(size, dtype=torch.float32), []
    normal = lambda *shape: torch.from_numpy(rng.standard_normal((per_class, 3, *shape), dtype=np.float32))
    for k in range(classes):
        coarse = torch.from_numpy(0.2 + 0.6 * layouts[k // 2]) + 0.3 * normal(3, 3)
        coarse = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
        phase, strength = torch.from_numpy(rng.random((2, per_class, 1), dtype=np.float32))
        wave = (0.03 + 0.1 * strength) * torch.sin(2 * math.pi * (grid / 4 + phase))
        wave = wave[:, None, None, :] if k % 2 else wave[:, None, :, None]
        images.append(((coarse + wave + 0.12 * normal(size, size)).clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(images), torch.arange(classes).repeat_interleave(per_class)

def load_toy(root, classes):
    train, test = toy(max(60, 4000 // classes), classes, 0), toy(max(10, 1000 // classes), classes, 1)
    return Split(*train), Split(*test), [f"layout{k // 2}-{('rows', 'columns')[k % 2]}" for k in range(classes)]

def download(url, md5, root, inside=""):
    """Fetch and unpack a data set's archive, into "data" or a folder that is there: a typo makes none."""
    if root != "data" and not Path(root).is_dir():
        raise BadInput(f"--data {root}: no such folder: name the data set's, or an empty one to load it to")
    print(f"--data {root}: incomplete, so downloading {url}")
    try:
        datasets.utils.download_and_extract_archive(url, root, Path(root) / inside, md5=md5)
    except Exception as error:                             # urllib's and tarfile's have no common ancestor
        raise BadInput(f"--data {root}: {url} cannot be downloaded, {type(error).__name__}: unpack it there") from error

class Plain(pickle.Unpickler):
    """Reads CIFAR's pickles, anybody's copy, by names that are ours alone: no code of it runs, none claims memory."""
    def find_class(self, module, name):
        return {"_reconstruct": lambda *claims: np.empty(0, np.uint8), "ndarray": None,
                "dtype": lambda code, *rest: np.dtype({code: code for code in ("u1", "i4", "i8")}[code]),
                "scalar": lambda dtype, raw: np.frombuffer(raw, dtype)[0], "encode": lambda s, _: s.encode("latin1"),
                "_frombuffer": lambda raw, dtype, shape, how: np.frombuffer(raw, dtype).reshape(shape, order=how)}[name]

def load_cifar(kind, root, _):
    """(train, test, classes), every file checked. kind: torchvision's class, which knows names and checksums."""
    folder, key, parts = Path(root) / kind.base_folder, kind.meta["key"], []
    names = [kind.meta["filename"], *(name for name, _ in kind.train_list + kind.test_list)]
    if not all((folder / name).is_file() for name in names):
        download(kind.url, kind.tgz_md5, root)
    for name in names:
        try:
            content = Plain(io.BytesIO((folder / name).read_bytes()), encoding="latin1").load()
            if name == names[0]:
                classes = [str(word) for word in content[key]]
                continue
            labels = torch.tensor(content[key.replace("label_names", "labels")]).long().view(-1)
            images = torch.from_numpy(content["data"].astype(np.uint8, casting="no").reshape(len(labels), 3, 32, 32))
            F.one_hot(labels.view(50000 if name == "train" else 10000), len(classes))      # raises: count, classes
            parts.append(Split(images, labels))
        except Exception as error:                         # what pickle raises has no common ancestor
            raise BadInput(f"--data {folder / name}: truncated, damaged or hostile ({error}): remove it") from error
    return Split(*map(torch.cat, zip(*parts[:-1]))), parts[-1], classes

class_folders = lambda root: sorted(entry.name for entry in Path(root).glob("*") if entry.is_dir())

def image_files(root, names, classes=None):
    """The images root/<name>/**.{jpg, png, ...} of the class names; labels are positions in classes (or in names)."""
    try:
        found = make_dataset(str(root), {name: (classes or names).index(name) for name in names}, IMG_EXTENSIONS)
    except FileNotFoundError as error:                     # it names the classes without one
        raise BadInput(f"{root}: {str(error)[:200]}: expected <class>/<image>, some of every class") from error
    return Split([path for path, _ in found], torch.tensor([label for _, label in found]))

def load_folder(root, _):
    """Any train/ + val/ of class folders: ImageNet as torchvision has it, or the user's own images."""
    train, val = (class_folders(Path(root) / part) for part in ("train", "val"))
    if (odd := sorted(set(val) - set(train))[:3]) or not val:
        raise BadInput(f"--data {root}: expected train/<class>/<image>, the like in val/, found {odd or 'none'} there")
    return image_files(Path(root) / "train", train), image_files(Path(root) / "val", val, train), train

def load_tiny(root, _):
    """Tiny-ImageNet-200 as in the original zip, or a copy of it with fewer classes."""
    folder = Path(root) / "tiny-imagenet-200"
    if not folder.is_dir():
        url, md5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
        download(url, md5, root, "unpacking")              # what is half unpacked would pass for a smaller data set
        os.replace(Path(root) / "unpacking" / folder.name, folder)
    names, annotations = class_folders(folder / "train"), folder / "val" / "val_annotations.txt"
    text = annotations.read_text(errors="replace") if annotations.is_file() else ""
    rows = [row for row in re.findall(r"^(.+?)\t([^\t\r\n]+)", text, re.MULTILINE) if row[1] in names]
    if not rows:
        raise BadInput(f"{annotations}: names no image of the classes in train/: unpack it again")
    test = Split([str(folder / "val" / "images" / Path(file).name) for file, _ in rows],
                 torch.tensor([names.index(wnid) for _, wnid in rows]))
    return image_files(folder / "train", names), test, names

# f(--data, number of toy's classes) -> (train, test, class names). A new data set: a function here, a row in PRESETS.
LOADERS = {"toy": load_toy, "cifar10": functools.partial(load_cifar, datasets.CIFAR10), "tiny": load_tiny,
           "cifar100": functools.partial(load_cifar, datasets.CIFAR100), "imagenet": load_folder, "folder": load_folder}

def select(split, index):
    """The images of a split at positions index [n]."""
    images = split.images[index] if torch.is_tensor(split.images) else [split.images[i] for i in index]
    return Split(images, split.labels[index])

def load_data(name, root, size=None, classes=None, validate=None):
    """A data set by name, or BadInput. root: --data. validate: test on the last tenth of each class of train."""
    train, test, names = LOADERS[name](root, classes or 10)
    if validate:
        by_class = [(train.labels == c).nonzero()[:, 0] for c in train.labels.unique()]
        parts = zip(*(own.tensor_split([len(own) * 9 // 10]) for own in by_class))
        train, test = (select(train, torch.cat(part).sort().values) for part in parts)
        if len(train.labels.unique()) < len(names):
            raise BadInput(f"--validate: a class of {root} has one image, none is left to train on: leave it out")
    return Data(names, size or PRESETS[name]["size"], train, test, digest(train, root), digest(test, root))

def digest(split, root):
    """The hash of a split in memory; of files below root, of their names and sizes."""
    content = split.images.numpy().tobytes() if torch.is_tensor(split.images) else os.fsencode("".join(
        f"{os.path.relpath(path, root)} {os.path.getsize(path)}\n" for path in split.images))
    return hashlib.sha256(split.labels.numpy().tobytes() + content).hexdigest()

def read(split, transform, seed, index):
    """Images by position, files decoded to RGB. A random transform is drawn from seed + position, in any worker."""
    images = []
    for i in index:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + i)
                image = split.images[i]
                images.append(transform(image if torch.is_tensor(image) else default_loader(image)))
        except Exception:                                  # PIL has many
            raise BadInput(f"{split.images[i]}: not a readable image: mend or remove it") from None
    return torch.stack(images), split.labels[index]

def stream(split, transform, batch, order=None, seed=0):
    """Batches of a split under a transform, in order: uint8 [B, 3, S, S], int64 [B]."""
    order, collate = order or range(len(split.labels)), functools.partial(read, split, transform, seed)
    workers = min(8, os.cpu_count()) if len(order) > 1000 else 0
    return torch.utils.data.DataLoader(order, batch, collate_fn=collate, num_workers=workers)

def normalise(images, mean, std):
    """uint8 [B, 3, S, S] -> float32, zero mean and unit deviation, channels last (several times faster on CPUs)."""
    mean, std = (constant(tuple(v), images.device) for v in (mean, std))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

@functools.lru_cache
def constant(values, device):
    """A number a channel, [1, 3, 1, 1]; cached, since copying it to a GPU would wait for all work before it."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)

def batches(data, split, batch):
    """Every image of a split once, in order, under the evaluation transform: yields uint8 [B, 3, S, S], int64 [B]."""
    if torch.is_tensor(split.images):
        return zip(split.images.split(batch), split.labels.split(batch))
    side = data.size if data.size <= 64 else round(data.size * 8 / 7)      # of 224: 256
    return stream(split, T.Compose([T.Resize(side), T.CenterCrop(data.size), T.PILToTensor()]), batch)

def in_memory(data, split, device):
    """The split as one uint8 tensor on the device, if it is small pictures; larger ones stay files, to be cropped."""
    small = torch.is_tensor(split.images) or data.size <= 64
    return Split(torch.cat([x for x, _ in batches(data, split, 500)]).to(device), split.labels) if small else split

def training_batches(data, batch, augment, rng):
    """One epoch of the training set, shuffled and augmented: yields uint8 [B, 3, S, S], int64 [B]. augment: "crop", S
    pixels out of S + 8 (of images in memory), or "resized", torchvision's RandomResizedCrop; both with flips."""
    images, labels = data.train
    order, files = torch.from_numpy(rng.permutation(len(labels))), not torch.is_tensor(images)
    if augment == "resized" or files:
        view = [T.RandomResizedCrop(data.size), T.RandomHorizontalFlip(), *[T.PILToTensor()] * files]
        return (yield from stream(data.train, T.Compose(view), batch, order.tolist(), int(rng.integers(2**31))))
    windows = F.pad(images, (4, 4, 4, 4)).unfold(2, data.size, 1).unfold(3, data.size, 1)  # a view [n, 3, 9, 9, S, S]
    for index in order.split(batch):
        top, left, flip = (torch.from_numpy(rng.integers(0, high, len(index))) for high in (9, 9, 2))
        crops, flip = windows[index, :, top, left], flip.bool().to(images.device)
        yield torch.where(flip[:, None, None, None], crops.flip(3), crops), labels[index]

# ---- Networks --------------------------------------------------------------------------------------------------------
def convnet(classes, size, width=128):
    """ConvNet-128 of the distillation literature with BatchNorm: 3 blocks at 32 px, 4 at 64, 6 at 224."""
    depth = max(1, round(math.log2(size)) - 2)
    blocks = [nn.Sequential(nn.Conv2d(width if i else 3, width, 3, padding=1), nn.BatchNorm2d(width),
                            nn.ReLU(inplace=True), nn.AvgPool2d(2)) for i in range(depth)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width * (size >> depth) ** 2, classes))

TEACHERS = ["convnet", "resnet18", "resnet50", "resnet101"]
STUDENTS = TEACHERS + ["mobilenet_v2", "densenet121", "regnet_y_8gf", "convnext_tiny"]

def build_network(name, classes, size, precision="float32"):
    """A network with random weights, channels last. classes: K. precision: what `forward` runs it in."""
    if name not in STUDENTS or precision not in ("float32", "bfloat16"):
        raise ValueError(f"a {precision} {name}")
    network = convnet(classes, size) if name == "convnet" else getattr(torchvision.models, name)(num_classes=classes)
    if name != "convnet" and size <= 64:                   # a stem that keeps every pixel
        modules = list(network.named_modules())
        stem, conv = next(pair for pair in modules if isinstance(pair[1], nn.Conv2d))
        network.set_submodule(stem, nn.Conv2d(3, conv.out_channels, 3, padding=1, bias=conv.bias is not None))
        for pool in [path for path, module in modules if isinstance(module, nn.MaxPool2d)][:1]:    # the stem's
            network.set_submodule(pool, nn.Identity())
    network.precision = precision
    return network.to(memory_format=torch.channels_last)

def native_precision(device):
    """bfloat16 on CUDA and on CPUs that say they multiply in it; elsewhere it is emulated, slowly, so float32."""
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else \
        getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return "bfloat16" if native else "float32"

def forward(network, x):
    """network(x) in the network's precision, float32 or better out. Statistics and losses are never in bfloat16."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=network.precision == "bfloat16"):
        return spectral.single(network(x))

@torch.no_grad()
def accuracy(network, data, teacher):
    """Top-1 accuracy in % on the test split, under the evaluation transform. teacher: whose mean and deviation."""
    device, right = next(network.eval().parameters()).device, 0
    for images, labels in batches(data, data.test, 500 if data.size <= 64 else 64):
        guess = forward(network, normalise(images.to(device), teacher["mean"], teacher["std"])).argmax(1)
        right += (guess == labels.to(device)).sum()
    return 100 * right.item() / len(data.test.labels)

# ---- Run folders. A file that is there is whole, even after a power cut: written aside, flushed, renamed -------------
def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

@contextlib.contextmanager
def writing(path, mode):
    """open(path, mode), flushed to the disk at the end; BadInput if the disk is full or read-only."""
    try:
        with open(path, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:               # torch.save makes a RuntimeError of a full disk
        why = getattr(error.__context__ or error, "strerror", error)
        raise BadInput(f"{path}: cannot be written ({why}): mend that, then go on with --resume") from error

def save(path, content):
    """torch.save for a .pt, JSON with its own hash for a .json; atomic."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(temporary, "wb") as file:
        if path.suffix == ".json":
            content = {**content, "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
            file.write(json.dumps(content, indent=1).encode() + b"\n")
        else:
            torch.save(content, file)
    os.replace(temporary, path)
    if os.name == "posix":                                       # the renaming, too, is to survive a power cut
        handle = os.open(path.parent, os.O_RDONLY)
        os.fsync(handle), os.close(handle)

def read_json(path):
    """The content of a JSON file of a run folder, {} if there is none, checked against the hash it carries."""
    with contextlib.suppress(ValueError, TypeError, AttributeError, OSError, RecursionError):
        content = json.loads(path.read_text()) if path.exists() else {}
        if content.pop("sha256", None) in (None, hashlib.sha256(json.dumps(content).encode()).hexdigest()):
            return content
    raise BadInput(f"{path}: damaged: remove {path.parent if path.stem == 'config' else 'it'} and make it again")

def load_state(path, remedy="remove it and make it again"):
    """The tensors and plain containers of a .pt, on the CPU. BadInput if it holds anything else, a byte is not as
    written (torch does not check the CRCs), or it would unpack to more than its own size."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:     # a broken pickle raises anything
        if sum(part.file_size for part in archive.infolist()) <= path.stat().st_size and not archive.testzip():
            return torch.load(path, weights_only=True, map_location="cpu")
    raise BadInput(f"{path}: missing, damaged, or more than tensors: {remedy}")

def log(folder, *entries, **entry):
    with writing(folder / "log.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in entries or [entry])

def read_config(folder, stage, unfinished=False):
    """config.json of a run of `stage`; of a finished one, unless `unfinished` ones will do."""
    config = read_json(Path(folder) / "config.json")
    whole = all(isinstance(config.get(part), dict) for part in ("settings", "inputs", "artefacts", "results"))
    if config.get("stage") != stage or not whole:
        found = "no config.json" if not config else f"a {'' if whole else 'broken '}run of {config.get('stage')}.py"
        raise BadInput(f"{folder}: {found} found, expected a run of {stage}.py: check the path")
    if not config["artefacts"] and not unfinished:
        raise BadInput(f"{folder}: unfinished: run {stage}.py again with --resume")
    return config

def checked(folder, name, config):
    """The path of an artefact of a run folder, after checking it against the hash in its config."""
    path, recorded = Path(folder) / name, str(config["artefacts"].get(name))
    found = sha256(path) if path.is_file() else "missing"
    if found != recorded:
        raise BadInput(f"{path}: corrupted ({found[:12]} for sha256 {recorded[:12]}): remove {folder}, make it again")
    return path

LOCKS = {}                                                 # inode: the handle, and so the lock, while the process lasts
def lock(folder):
    """Refuse a folder that another process writes to. Windows and some network disks have no such locks: nothing."""
    with contextlib.suppress(OSError, ImportError):
        import fcntl
        inode = os.stat(folder)[1:3]                       # and its device
        LOCKS[inode] = LOCKS.get(inode) or os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(LOCKS[inode], fcntl.LOCK_EX | fcntl.LOCK_NB)       # nothing new where this process has it
        except BlockingIOError:
            raise BadInput(f"{folder}: another process is at work here: wait for it, or stop it") from None

def open_run(folder, stage, settings, inputs, resume):
    """Start a run folder, or go on with one under --resume: returns its config. settings: every resolved flag; inputs:
    {what: sha256}. Refused: a non-empty folder without --resume, other settings or inputs, a second process."""
    folder.mkdir(parents=True, exist_ok=True)
    lock(folder)
    if all(entry.suffix == ".tmp" for entry in folder.iterdir()):          # new, or killed at this very point
        versions = {"python": sys.version.split()[0], **{m.__name__: m.__version__ for m in (torch, torchvision, np)}}
        config = dict(stage=stage, settings=settings, inputs=inputs, artefacts={}, results={}, versions=versions)
        save(folder / "config.json", config)
    elif not resume:
        raise BadInput(f"{folder}: in use: add --resume to continue what is there, or remove the folder")
    config = read_config(folder, stage, True)
    now, then = {**settings, **inputs}, {**config["settings"], **config["inputs"]}         # hashes stand for paths
    for k in [key for key in {**then, **now} if (now.get(key) or None) != (then.get(key) or None)]:    # a new flag's 0
        raise BadInput(f"{folder}: {k} is {now.get(k)!r} now and was {then.get(k)!r}: use that, or remove the folder")
    return config

def finish_run(folder, config, artefacts, **results):
    """Record the hashes of the artefacts and the results: from now on the run counts as finished."""
    config.update(artefacts={name: sha256(folder / name) for name in artefacts}, results=results)
    save(folder / "config.json", config)

def fill(args, preset):
    """Flags left out take the preset's values; a flag given always wins. Returns args."""
    vars(args).update({key: value for key, value in preset.items() if vars(args).get(key) is None})
    return args

def settings(args, hidden=()):
    """What config.json records of a run: all flags, resolved."""
    return {key: value for key, value in vars(args).items() if key not in ("resume", *hidden)}

def show(args):
    print("settings: " + " ".join(f"{key}={value}" for key, value in settings(args).items()))

def changed(settings, defaults, hidden=()):
    """["epochs16", "emupaper", ...]: what is not the default. Folders and rows are named so."""
    return [key.replace("_", "-") + ("" if value is True else Path(str(value)).name) for key, value in settings.items()
            if key not in hidden and value != defaults[key]]

# ---- The stage -------------------------------------------------------------------------------------------------------
def train(network, data, teacher, args, folder):
    """SGD with momentum, the rate by step; checkpoint.pt after each epoch, so a kill costs at most one."""
    device, steps = next(network.parameters()).device, math.ceil(len(data.train.labels) / args.batch)
    optimizer = torch.optim.SGD(network.parameters(), args.lr, momentum=0.9, weight_decay=args.wd)
    decay = {"cosine": lambda step: (1 + math.cos(math.pi * step / (args.epochs * steps))) / 2,
             "step": lambda step: 0.1 ** (step // (30 * steps))}[args.schedule]
    parts, checkpoint = dict(network=network, optimizer=optimizer), folder / "checkpoint.pt"
    state = load_state(checkpoint) if checkpoint.is_file() else {}
    for name in state.keys() & parts.keys():
        parts[name].load_state_dict(state[name])
    for epoch in range(state.get("epoch", 0), args.epochs):
        rng, start, total = np.random.default_rng([args.seed, epoch]), time.time(), torch.zeros((), device=device)
        network.train()
        for step, (images, labels) in enumerate(training_batches(data, args.batch, args.augment, rng), epoch * steps):
            optimizer.param_groups[0]["lr"] = args.lr * decay(step)
            logits = forward(network, normalise(images.to(device), teacher["mean"], teacher["std"]))
            loss = F.cross_entropy(logits, labels.to(device), label_smoothing=args.smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        if not math.isfinite(total.item()):
            raise BadInput(f"--lr {args.lr}: training diverged in epoch {epoch + 1}: remove {folder}, lower --lr")
        score, seconds = accuracy(network, data, teacher), time.time() - start
        if epoch + 1 in (args.keep or ()):
            save(folder / f"epoch{epoch + 1}of{args.epochs}.pt", dict(**teacher, state_dict=network.state_dict()))
        save(checkpoint, dict(epoch=epoch + 1, **{name: part.state_dict() for name, part in parts.items()}))
        log(folder, epoch=epoch + 1, loss=total.item() / steps, test=score, seconds=seconds)
        print(f"epoch {epoch + 1}/{args.epochs}  loss {total.item() / steps:.3f}  acc. {score:.2f} %  {seconds:.0f} s  "
              f"{seconds * (args.epochs - epoch - 1) / 60:.1f} min left", flush=True)

def gather_statistics(network, data, teacher, batch):
    """One pass over the training set: {"layers": {name: Statistics of the inputs of convolutions (no shortcuts) and
    the last linear layer}, "head": that layer's name, "confidence" [n]: log-probability of each image's own class}."""
    head = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)][-1]     # its input: H
    wanted = lambda name, module: name == head or spectral.is_main_convolution(name, module)
    start, confidence, device = time.time(), [], next(network.parameters()).device
    def ask(images, labels):
        logits = forward(network, normalise(images, teacher["mean"], teacher["std"])).double()  # float32 has ties
        confidence.append(-F.cross_entropy(logits, labels, reduction="none").cpu())
    loader = ((images.to(device), labels.to(device)) for images, labels in batches(data, data.train, batch))
    layers = spectral.real_statistics(network, loader, len(data.classes), wanted, forward=ask)
    print(f"statistics of {len(layers)} layers: {time.time() - start:.1f} s", flush=True)
    return dict(layers={name: layer.to("cpu", torch.float32)._asdict() for name, layer in layers.items()}, head=head,
                confidence=torch.cat(confidence))

def fold(network):
    """The network in eval mode with every BatchNorm folded into the convolution before it (defined right before it, in
    the same block), and no weight gradients. The convolutions' inputs, and so all statistics, stay what they are."""
    modules = list(network.eval().named_modules())
    for (a, conv), (b, norm) in zip(modules, modules[1:]):
        if (type(conv), type(norm)) == (nn.Conv2d, nn.BatchNorm2d) and a.rpartition(".")[0] == b.rpartition(".")[0]:
            network.set_submodule(a, nn.utils.fusion.fuse_conv_bn_eval(conv, norm))
            network.set_submodule(b, nn.Identity())
    return network.requires_grad_(False).to(memory_format=torch.channels_last)

def given_weights(network, args, teacher):
    """Load --teacher FILE or torchvision's weights; mean and std, if the file has them, replace those in `teacher`."""
    flag, remedy = (f"--teacher {args.teacher}", "not a readable state dict") if args.teacher else (
        "--pretrained", f"cannot be fetched: put the file into {torch.hub.get_dir()}/checkpoints")
    try:
        state = (torch.load(args.teacher, weights_only=True, map_location="cpu") if args.teacher else
                 torchvision.models.get_model_weights(args.network).IMAGENET1K_V1.get_state_dict(check_hash=True))
        about = {key: list(state.get(key, teacher[key])) for key in ("mean", "std", "classes")}
        remedy = f"mean must be three numbers of [0, 1], std of (0, 1], classes the data set's; found {str(about)[:99]}"
        normalise(torch.zeros(1, 3, 1, 1), about["mean"], about["std"])        # raises unless they are three numbers
        if (about["classes"] != teacher["classes"]
                or not all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(about["mean"], about["std"]))):
            raise ValueError
        remedy = "it has seen what --validate holds out: give one trained with --validate"
        if args.validate and state.get("data", teacher["data"]) != teacher["data"]:
            raise ValueError
        remedy = f"no {args.network} for this data set: another architecture, input size or class count"
        network.load_state_dict(state.get("state_dict", state))
    except Exception as error:                             # urllib's, a broken file's, or torch's long complaint
        raise BadInput(f"{flag}: {type(error).__name__}: {remedy}") from error
    teacher.update(about)
    print(f"{flag}: images are normalised with mean {about['mean']}, std {about['std']}")

def parse(argv):
    parser = Parser(__doc__)
    add = parser.add_argument_group("what").add_argument
    add("--dataset", default="toy", choices=list(PRESETS), help="default: toy")
    add("--data", default="data", metavar="DIR", help="where it lies or is downloaded to (default: data)")
    add("--size", type=number(int, 16), help="folder only: pixels (default 224)")
    add("--classes", type=number(int, 2), help="toy only: number of classes (default 10)")
    add = parser.add_argument_group("how").add_argument
    add("--network", choices=TEACHERS, help="the teacher (default: convnet for toy, else resnet18)")
    add("--epochs", type=number(int, 1), help="toy 4, CIFAR-10 200, CIFAR-100 100, tiny 50, else 90")
    add("--lr", type=number(float, 0, strict=True), help="rate of SGD with momentum 0.9 (toy 0.05, tiny 0.2, else 0.1)")
    add("--wd", type=number(float, 0), help="weight decay (toy, CIFAR 5e-4, else 1e-4)")
    add("--smoothing", type=number(float, 0, 1), default=0.0, help="share of a label for all classes alike (default 0)")
    add("--batch", type=number(int, 2), help="images a step (toy 50, CIFAR 128, else 256)")
    add("--precision", choices=["float32", "bfloat16"], help="default: bfloat16 where the device multiplies in it")
    add("--keep", type=number(int, 1), nargs="+", metavar="E", help="keep the weights of these epochs, for --teacher")
    add("--seed", type=number(int, 0), default=0, help="default 0")
    add("--validate", action="store_true", help="hold out the last tenth of each class, to choose settings on")
    add = parser.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    add("--pretrained", action="store_true", help="imagenet only: torchvision's weights")
    add("--teacher", metavar="FILE", help="a state dict of --network, or a dict of it, mean, std, classes")
    args = parser.parse_args(argv)
    for flag, only in (("size", "folder"), ("pretrained", "imagenet"), ("classes", "toy")):
        if getattr(args, flag) and args.dataset != only:
            raise BadInput(f"--{flag} is for --dataset {only}, found {args.dataset}: leave it out")
    for flag in ("epochs", "lr", "wd", "smoothing", "keep", "seed"):
        if (args.teacher or args.pretrained) and getattr(args, flag) != parser.get_default(flag):
            raise BadInput(f"--{flag} has no effect with --teacher or --pretrained: leave one out")
    if args.pretrained and (args.validate or args.network == "convnet"):
        raise BadInput("--pretrained: torchvision's are of resnets that saw all images: leave out --validate, convnet")
    preset = PRESETS[args.dataset]
    if max(args.keep or [0]) > (args.epochs or preset["squeeze"]["epochs"]):
        raise BadInput(f"--keep {max(args.keep)} found, must be at most --epochs")
    return fill(args, {**preset["squeeze"], "network": preset["network"], "size": preset["size"],
                       "classes": 10 if args.dataset == "toy" else None, "precision": native_precision(pick_device())})

def teacher_folder(args):
    """runs/<dataset>-<network>, then every setting that is not the data set's default; of one's own folder its name."""
    own = [Path(args.data).resolve().name] if args.dataset == "folder" else []
    extra = changed(vars(args), vars(parse(["--dataset", args.dataset])), ("data", "network", "keep", "resume"))
    return Path("runs") / "-".join([args.dataset, *own, args.network, *extra])

def main(argv):
    folder = teacher_folder(args := parse(argv))
    show(args)
    data, device = load_data(args.dataset, args.data, args.size, args.classes, args.validate), pick_device()
    teacher = dict(network=args.network, dataset=args.dataset, data=data.sha256, classes=data.classes, size=args.size,
                   mean=PRESETS[args.dataset]["mean"], std=PRESETS[args.dataset]["std"], precision=args.precision)
    torch.manual_seed(args.seed)
    network = build_network(args.network, len(data.classes), args.size, args.precision)
    if given := args.teacher or args.pretrained:           # refused before a folder is made
        given_weights(network, args, teacher)
    inputs = {"data": data.sha256, **({"teacher": sha256(args.teacher)} if args.teacher else {})}
    config = open_run(folder, "squeeze", {**settings(args), "data": os.path.realpath(args.data)}, inputs, args.resume)
    if not config["artefacts"]:
        where = device if args.augment == "crop" else torch.device("cpu")      # where torchvision's workers can crop
        data = data._replace(train=in_memory(data, data.train, where), test=in_memory(data, data.test, device))
        network.to(device)
        if not given:
            train(network, data, teacher, args, folder)
        score = accuracy(network, data, teacher)
        save(folder / "teacher.pt", dict(**teacher, state_dict=network.state_dict()))
        found = gather_statistics(fold(network), data, teacher, args.batch)
        if not all(layer["ffc"].isfinite().all() for layer in found["layers"].values()):
            raise BadInput(f"{folder}: the teacher's features are not finite: remove it, lower --lr or mend --teacher")
        save(folder / "statistics.pt", found)              # config.json says whose it is
        finish_run(folder, config, ["teacher.pt", "statistics.pt"], test=score)
    (folder / "checkpoint.pt").unlink(missing_ok=True)     # not before: a kill in the statistics costs no training
    print(f"teacher: {config['results']['test']:.2f} % {'held-out' if args.validate else 'test'} accuracy, in "
          f"{folder}\nnext: python recover.py --teacher {folder}")

if __name__ == "__main__":
    script(main)
