"""CUDA without a GPU: every stage's inner step on fake CUDA tensors (shapes, dtypes and devices without numbers), which
fails wherever two devices meet.

Not covered: numbers and kernels; autocast, which is off where no driver is; autograd's engine, which asks the driver for
its streams, so that gradients are zeros here and the one hand-written backward is called by hand; waits for the GPU;
memory; loading and saving.
"""
import copy
import math
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import baselines
import eval as evaluation
import recover
import relabel
import spectral
import squeeze

TEACHER = dict(mean=[0.5] * 3, std=[0.25] * 3, classes=list("abcd"), size=32, network="convnet", precision="float32")


def on_cuda(network):
    """A copy whose parameters and buffers are fake CUDA tensors."""
    memo = {}
    for part in [*network.parameters(), *network.buffers()]:
        new = torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="cuda")
        memo[id(part)] = nn.Parameter(new, part.requires_grad) if isinstance(part, nn.Parameter) else new
    return copy.deepcopy(network, memo)


@pytest.fixture
def cuda(monkeypatch):
    """The device, in FakeTensorMode, with what needs numbers replaced."""
    build = squeeze.build_network

    def built(*args):
        with unset_fake_temporarily():
            network = build(*args)
        return on_cuda(network)

    def backward(loss):
        assert loss.device.type == "cuda"
        for item in reached:
            item.grad = torch.zeros_like(item)
    reached = []
    real_step = torch.optim.Optimizer.zero_grad
    monkeypatch.setattr(torch.optim.Optimizer, "zero_grad", lambda self, **kw: (
        real_step(self), reached.__setitem__(slice(None), [p for group in self.param_groups for p in group["params"]])))
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, x: [
        torch.zeros_like(part) + loss for part in (x if isinstance(x, list) else [x])])
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: True)
    monkeypatch.setattr(nn.Module, "to", lambda self, *args, **kw: self)
    monkeypatch.setattr(torch.optim.swa_utils, "deepcopy", on_cuda)
    monkeypatch.setattr(squeeze, "build_network", built)
    monkeypatch.setattr(squeeze, "save", lambda path, content: None)
    monkeypatch.setattr(squeeze, "log", lambda *args, **entry: None)
    squeeze.constant.cache_clear()
    with FakeTensorMode():
        try:
            torch.zeros(2).to("cuda")
        except RuntimeError:
            pytest.skip("this torch (2.6) asks the driver for a fake device, too")
        yield torch.device("cuda")
    squeeze.constant.cache_clear()


def data_on(device):
    split = squeeze.Split(torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=device), torch.arange(8) % 4)
    return squeeze.Data(TEACHER["classes"], 32, split, split, "")


@pytest.fixture(scope="module")
def folded():
    return squeeze.fold(squeeze.build_network("convnet", 4, 32))


def test_the_harness_sees_a_mix_of_devices(cuda):
    with pytest.raises(Exception, match="device"):
        torch.zeros(2, device=cuda) + torch.zeros(2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training(cuda):
    args = Namespace(batch=4, lr=0.1, wd=0.1, smoothing=0.1, epochs=1, schedule="cosine", seed=0, augment="crop", keep=None)
    squeeze.train(squeeze.build_network("convnet", 4, 32), data_on(cuda), TEACHER, args, Path("none"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("signal, emu, centred", [("mean", "pool", True), ("class", "paper", True),
                                                  ("class", "pool", False)])
def test_statistics_and_recover(cuda, folded, signal, emu, centred, monkeypatch):
    network = on_cuda(folded)
    found = squeeze.gather_statistics(network, data_on(cuda), TEACHER, 4)
    real = {name: spectral.Statistics(**layer).to(cuda) for name, layer in found["layers"].items()
            if name != found["head"]}
    args = Namespace(iterations=2, lr=0.1, gamma=0.1, emu=emu, centred=centred, signal=signal, filter="cfm", ipc=2,
                     alpha_max=0.1, schedule="cosine", loss="both")
    job, memory = Namespace(**recover.CFM, network=network, teacher=TEACHER, select=spectral.is_main_convolution,
                            loss=spectral.matching(real, recover.cfm_pairs(0, args), signal, centred),
                            report=lambda *found: None), {}
    for b in (1, 2):
        job.step = b if emu == "paper" else None
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=cuda)
        images, memory = recover.make_batch(job, args, images, torch.arange(4, device=cuda), memory, np.random.default_rng(0))
    assert images.device.type == "cuda" and images.dtype == torch.uint8 and len(memory) == 3
    x = squeeze.normalise(images, TEACHER["mean"], TEACHER["std"])
    monkeypatch.setattr(baselines.copy, "deepcopy", lambda network: network)   # fake tensors keep their mode only so
    assert baselines.adjusted(network, x, torch.arange(4, device=cuda))(x).device.type == "cuda"       # DWA's step


def test_the_backward_of_covariance(cuda):
    X, G, g = (torch.zeros(*shape, device=cuda) for shape in ((9, 4), (4, 4), (4,)))
    context = Namespace(saved_tensors=(X, X.mean(0)))
    assert spectral._Covariance.backward(context, G, g).device.type == "cuda"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("hard", [False, True])
def test_relabel_and_a_students_step(cuda, folded, hard, monkeypatch):
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8, device=cuda)
    views = relabel.draw_views(0, 0, 8, 32, 0.08, cuda)
    logits = relabel.soft_labels(on_cuda(folded), TEACHER, images, views, 5)
    assert logits.device.type == "cuda"
    args = Namespace(network="convnet", lr=0.1, wd=0.1, ema=0.99, batch=4, epochs=2, hard=hard, temperature=20.0,
                     schedule="stretched", online=False, teacher=None)
    job = Namespace(seed=0, images=images, content=dict(**TEACHER, labels=torch.arange(8) % 4), identity={},
                    views=dict(keep_epochs=2, seed=0, scale=0.08))
    if not hard:
        monkeypatch.setattr(evaluation, "targets", lambda *args: logits)
    student, average, _ = evaluation.train_student(job, args, Path("no checkpoint"))
    assert all(weight.device.type == "cuda" for part in (student, average) for weight in part.parameters())
    assert math.isfinite(squeeze.accuracy(student, data_on(cuda), TEACHER))
