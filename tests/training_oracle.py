"""The flow-matching loss written in PyTorch on the oracle's modules: one example after the other.

Nothing here is ours but the layout: noise, noise levels and timesteps come in from outside.
"""

import numpy as np
import torch
from oracle import pack


def example_errors(model, ids, video, sound, noise, sound_noise, sigma, timestep, **options):
    """Mean squared error of the velocity of one example: video on its noisy frames, and sound.

    `video` and `noise` are [t, h, w, C], `sound` and `sound_noise` [s, C] or None.
    """
    given = options.get("given", ())
    mixed = (1 - sigma) * video + sigma * noise
    mixed[list(given)] = video[list(given)]
    mixed_sound = None if sound is None else (1 - sigma) * sound + sigma * sound_noise
    out = model(**pack(model, ids, mixed, mixed_sound, timestep=timestep, **options))

    def error(found: torch.Tensor, clean: np.ndarray, noise: np.ndarray, frames) -> torch.Tensor:
        target = torch.from_numpy(noise - clean)
        return (found.movedim(0, -1)[frames] - target[frames]).square().mean()

    free = [t for t in range(len(video)) if t not in given]
    errors = {"video": error(out.sample[0][0], video, noise, free)}
    if sound is not None:
        errors["sound"] = error(out.sound[0], sound, sound_noise, slice(None))
    return errors


def oracle_loss(model, examples: list[dict], weights: dict[str, float], counts=None):
    """The loss over examples (arguments of `example_errors`, and `weight`); and its gradients.

    Returns the loss, the error of each modality, and {public name: gradient} of every parameter
    that has one.
    """
    total = sum(example["weight"] for example in examples)
    means: dict[str, torch.Tensor] = {}
    for example in examples:
        arguments = {name: value for name, value in example.items() if name != "weight"}
        for name, error in example_errors(model, **arguments).items():
            means[name] = means.get(name, 0) + example["weight"] / total * error
    loss = sum(weights[name] * mean for name, mean in means.items())
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    found = {n: g.numpy() for n, g in zip(names, gradients, strict=True) if g is not None}
    return loss.item(), {name: mean.item() for name, mean in means.items()}, found
