"""Fixtures of the models' tests."""

import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import Cosmos3OmniTransformer
from oracle import perturb, tree_from_state_dict
from transformer_cases import MODELS, Model, build
from video_vae_cases import CONFIG, build_oracle

from cosmos3_jax.checkpoint.layouts import transformer_layout, video_vae_layout
from cosmos3_jax.models import video_vae


@pytest.fixture(scope="module", params=MODELS)
def half(request, tmp_path_factory) -> tuple[Model, Model]:
    """A model and its bfloat16 copy: the oracle's by its loader, ours by the layout's rule."""
    model, folder = build(request.param), tmp_path_factory.mktemp("half")
    model.oracle.save_pretrained(folder)
    oracle = Cosmos3OmniTransformer.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    kinds = {name: tensor.dtype for name, tensor in oracle.state_dict().items()}
    # what makes the comparison fair: the oracle's timestep embedding and frequencies stay sharp
    assert kinds.pop("time_embedder.linear_1.weight") == torch.float32
    assert kinds["proj_in.weight"] == torch.bfloat16
    assert oracle.rotary_emb.inv_freq.dtype == torch.float32
    kept = transformer_layout(model.config).float32

    def cast(path, leaf):
        name = "/".join(key.key for key in path)
        return leaf if name.startswith(kept) else leaf.astype(jnp.bfloat16)

    params = jax.tree_util.tree_map_with_path(cast, model.params)
    return model, Model(oracle, model.config, params)


@pytest.fixture(scope="module")
def video_oracle():
    torch.manual_seed(0)
    vae = perturb(build_oracle(CONFIG), seed=1)
    with torch.no_grad():
        # pixels within [-1, 1]: the clamp must not hide an error
        vae.decoder.conv_out.weight.mul_(0.3)
    return vae


@pytest.fixture(scope="module")
def video_params(video_oracle):
    return tree_from_state_dict(
        video_vae_layout(CONFIG), video_oracle.state_dict(), video_vae.param_shapes(CONFIG)
    )
