"""The executable oracle: diffusers' modules at small sizes, with every parameter away from 0 and 1."""

import jax.numpy as jnp
import numpy as np
import torch

from cosmos3_jax.checkpoint import rules


def tree_from_state_dict(layout: rules.Layout, state_dict, shapes) -> dict:
    """A PyTorch state dict in our tree (nested dict of float32 arrays), through the layout's rules.

    `shapes` is the tree of `jax.ShapeDtypeStruct`s; the rules are checked against the state dict first.
    """
    tensors = {rules.canonical_key(key): value.detach().float().numpy() for key, value in state_dict.items()}
    leaves = rules.leaf_shapes(shapes)
    rules.check(layout, {key: value.shape for key, value in tensors.items()}, leaves)
    filled = {path: np.full(shape, np.nan, np.float32) for path, shape in leaves.items()}
    for rule in layout.rules:
        filled[rule.leaf][rule.index] = rule.to_leaf(*(tensors[key] for key in rule.keys))
    tree = {}
    for path, value in filled.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(value)
    return tree


def perturb(module: torch.nn.Module, seed: int, scale: float = 0.1) -> torch.nn.Module:
    """Add noise to every parameter, so that no bias is 0 and no norm scale is 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def relative_l2(ours, reference) -> float:
    """|ours - reference| / |reference| over all values, in float64."""
    ours, reference = (np.asarray(x, np.float64) for x in (ours, reference))
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))
