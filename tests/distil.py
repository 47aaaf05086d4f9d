"""A whole distillation with spectral.py alone: any network in eval mode, any normalised images in a tensor, a plain loop.

tests/test_anywhere.py runs it; from_real(...) returns IPC images of each class for relabel.py --images or any student."""
import math

import torch
import torch.nn.functional as F
from spectral import alpha_schedule, cfm_pairs, collect_inputs, matching, merge, moments, real_statistics


def views(images):
    """Random crops (8 to 100 % of the area, enlarged) and flips: an affine grid each."""
    side = (0.08 + 0.92 * torch.rand(len(images), 2)).sqrt()
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = side[:, 0] * (2 * torch.randint(2, (len(images),)) - 1)
    theta[:, 1, 1], theta[:, :, 2] = side[:, 1], (1 - side) * (2 * torch.rand(len(images), 2) - 1)
    return F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), "bilinear", "reflection", False)


def from_real(network, images, labels, ipc, iterations=100, lr=0.1, alpha_max=0.1, gamma=0.1):
    """[ipc, K, 3, H, W]: CFM from the first ipc images of each class."""
    network.requires_grad_(False)
    K, made, memory = int(labels.max()) + 1, [], {}
    real = real_statistics(network, zip(images.split(100), labels.split(100)), K)
    low, high = images.amin((0, 2, 3), keepdim=True), images.amax((0, 2, 3), keepdim=True)
    for k in range(ipc):
        x = torch.stack([images[labels == c][k] for c in range(K)]).requires_grad_()
        loss, adam = matching(real, cfm_pairs(alpha_schedule(k, ipc, alpha_max))), torch.optim.Adam([x], lr, (0.5, 0.9))
        with collect_inputs(network, transform=moments) as layers:
            for t in range(iterations):
                adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * t / iterations)) / 2
                entropy = F.cross_entropy(network(views(x)), torch.arange(K))
                x.grad, = torch.autograd.grad(entropy + gamma * loss(layers, memory), x)
                adam.step()
                x.data.clamp_(low, high)
            with torch.no_grad():
                network(views(x))
            memory = merge(memory, layers)
        made.append(x.detach())
    return torch.stack(made)
