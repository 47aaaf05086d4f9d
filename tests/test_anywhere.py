"""spectral.py alone, in an empty folder, on networks that it was not written for: python tests/test_anywhere.py prints the table
of architectures, and pytest holds each row of it."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
import squeeze
# Run in a process that sees spectral.py, torch and torchvision. A case: network, its input, select, further arguments.
PROGRAM = '''
import torch, torchvision.models as zoo
from torch import nn
import spectral as sp

torch.manual_seed(0)
linear = lambda name, module: isinstance(module, nn.Linear)
kind = lambda *kinds: lambda name, module: isinstance(module, kinds)
depthwise = lambda name, module: isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
narrow = lambda name, module: sp.is_main_convolution(name, module) and module.in_channels <= 256
convnext = lambda: zoo.ConvNeXt([zoo.convnext.CNBlockConfig(8 << i, 16 << i if i < 3 else None, 1) for i in range(4)],
                                num_classes=3)
block = lambda name, module: type(module).__name__ == "SwinTransformerBlock"
images = lambda size: torch.randn(3, 3, size, size)
convnet = lambda conv, pool: nn.Sequential(conv(2, 6, 3), nn.ReLU(), conv(6, 4, 3), pool(1), nn.Flatten(), nn.Linear(4, 3))
encoder = lambda first: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=first), 2, enable_nested_tensor=False)
swin = lambda: zoo.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=3)
CASES = {
    "ResNet-50": (lambda: zoo.resnet50(num_classes=3), images(32), narrow, {}),
    "MobileNetV3": (lambda: zoo.mobilenet_v3_small(num_classes=3), images(32), sp.is_main_convolution, {}),
    "MobileNetV3, depthwise": (lambda: zoo.mobilenet_v3_small(num_classes=3), images(32), depthwise, {}),
    "ConvNeXt-Tiny": (convnext, images(32), kind(nn.Conv2d, nn.Linear), {}),
    "ViT-B/16": (lambda: zoo.VisionTransformer(16, 16, 2, 2, 8, 16, num_classes=3), images(16), linear, {}),
    "Swin-T": (swin, images(16), linear, {}),
    "Swin-T, blocks": (swin, images(16), block, {}),
    "Swin-T, blocks, told": (swin, images(16), block, dict(layout="tokens")),
    "MLP": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(3, 5), linear, {}),
    "1-D ConvNet": (lambda: convnet(nn.Conv1d, nn.AdaptiveAvgPool1d), torch.randn(3, 2, 9), kind(nn.Conv1d, nn.Linear), {}),
    "3-D ConvNet": (lambda: convnet(nn.Conv3d, nn.AdaptiveAvgPool3d), torch.randn(3, 2, 6, 6, 6), kind(nn.Conv3d), {}),
    "TransformerEncoder": (lambda: encoder(True), torch.randn(3, 5, 8), linear, {}),
    "TransformerEncoder, time first": (lambda: encoder(False), torch.randn(5, 3, 8), linear, {}),
    "TransformerEncoder, layers": (lambda: encoder(True), torch.randn(3, 5, 8), kind(nn.TransformerEncoderLayer), {}),
    "GRU, outputs": (lambda: nn.Sequential(nn.GRU(5, 4, batch_first=True)), torch.randn(3, 7, 5), kind(nn.GRU),
                     dict(outputs=True)),
    "GRU, time first": (lambda: nn.Sequential(nn.GRU(5, 4)), torch.randn(7, 3, 5), kind(nn.GRU), dict(outputs=True)),
}
for name, (build, x, select, more) in CASES.items():
    try:
        network = build().eval().requires_grad_(False)
        Y, batches = torch.eye(3), [(x + 0.1 * torch.randn_like(x), torch.arange(3)) for _ in range(2)]
        real = sp.real_statistics(network, batches, 3, select, **more)
        leaf = x.clone().requires_grad_()
        cfm = sp.matching(real, sp.cfm_pairs(0.1))
        dc = sp.matching(real, [("I", sp.low_pass), ("x", sp.identity)], "class", centred=False)
        with sp.collect_inputs(network, select, sp.moments, Y, **more) as layers:
            network(leaf)
            (cfm(layers) + dc(layers)).backward()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())
        assert leaf.grad.isfinite().all() and leaf.grad.norm() > 0 and not hooks, (leaf.grad.norm(), hooks)
        widths = sorted({len(layer.mean) for layer in real.values()})
        print(f"{name:32s}works: {len(real)} layers, C = {widths[0]} to {widths[-1]}")
    except ValueError as error:
        print(f"{name:32s}refused: {error}")

import distil
network, (x, y) = convnet(nn.Conv2d, nn.AdaptiveAvgPool2d), torch.load("toy.pt")
network = nn.Sequential(nn.Conv2d(3, 2, 1), network).eval()
real, found = sp.real_statistics(network, [(x, y)], 3), []
made = distil.from_real(network, x, y, ipc=2, iterations=40, lr=0.05, gamma=10.0)
start = torch.stack([x[y == c][:2] for c in range(3)], 1)
for images in (start, made):
    with sp.collect_inputs(network, transform=sp.moments) as layers, torch.no_grad():
        network(images.flatten(0, 1))
    found.append(sp.matching(real, sp.cfm_pairs(0.1))(layers).item())
print(f"{'distil.py':32s}{tuple(made.shape)}, loss {found[0]:.4g} -> {found[1]:.4g}")
'''
REFUSED = {"Swin-T, blocks": "layout: that of module 'features.1.0', SwinTransformerBlock",
           "TransformerEncoder, layers": "layout: that of module 'layers.0', TransformerEncoderLayer",
           "TransformerEncoder, time first": "labels must be [B, K], B = 5",
           "GRU, time first": "layout: that of module '0', GRU"}


def table(folder):
    for file in (ROOT / "spectral.py", ROOT / "tests/distil.py"):
        shutil.copy(file, folder)
    images, labels = squeeze.toy(20, 3, 0, size=16)
    torch.save((images / 128 - 1, labels), folder / "toy.pt")
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.')\n{PROGRAM}"], cwd=folder,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    lines = table(tmp_path_factory.mktemp("empty")).splitlines()
    return {line[:32].strip(): line[32:] for line in lines}


def test_architectures(found):
    assert len(found) == 17
    shape, losses = found.pop("distil.py").split(", loss ")    # two images of each class, nearer to the real spectra
    before, after = map(float, losses.split(" -> "))
    assert shape == "(2, 3, 3, 16, 16)" and after < 0.9 * before
    for name, outcome in found.items():
        assert outcome.startswith(f"refused: {REFUSED[name]}" if name in REFUSED else "works:"), (name, outcome)


if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        print(table(Path(folder)), end="")
