"""What the tests share. They run from anywhere: the six scripts are one folder up."""
import copy
import functools
import itertools
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import squeeze  # noqa: E402

squeeze.keep_freed_memory()


@functools.lru_cache
def drawn(classes):
    """Toy images, drawn once. A fifth of the test images: most tests train students for a few steps and test two each."""
    train, test, names = squeeze.load_toy(None, classes)
    return train, squeeze.select(test, slice(None, None, 5)), names


squeeze.LOADERS["toy"] = lambda root, classes: copy.deepcopy(drawn(classes))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A folder with runs/toy-convnet: 4 classes, 20 steps, in float32 on every machine, so that digits compare."""
    here = tmp_path_factory.mktemp("pipeline")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        few = lambda *args, whole=squeeze.training_batches: itertools.islice(whole(*args), 20)     # of 80 an epoch
        patch.setattr(squeeze, "training_batches", few)
        squeeze.main(["--classes", "4", "--epochs", "1", "--precision", "float32"])
        made, = Path("runs").iterdir()
        made.rename("runs/toy-convnet")                    # where recover.py looks for toy's teacher
    return here


@pytest.fixture
def on_cpu(monkeypatch):
    """What promises the same bytes promises them on a CPU: not all of CUDA's kernels are deterministic."""
    monkeypatch.setattr(squeeze, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def here(teacher, tmp_path, monkeypatch):
    """A fresh copy of it, as the working directory."""
    shutil.copytree(teacher / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one_line(main, flags, *words):
    """main(flags) must refuse with a single line that holds all the words."""
    with pytest.raises(squeeze.BadInput) as error:
        main([str(flag) for flag in flags])
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
