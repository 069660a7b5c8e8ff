"""The tiny world's checkpoint from its parts, at a miniature size of every part.

The autoencoders are random, the towers are trained for a few steps, and the picture has 32 pixels a
side; all else is as in a real run.
"""

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer
from oracle import VIDEO_VAE, perturb
from tiny_cases import COUNT, RECIPE, SIZES

from cosmos3_jax import Cosmos3
from cosmos3_jax.checkpoint.find import open_folder
from cosmos3_jax.training.params import load_towers
from examples.tiny import assemble, data


@pytest.fixture(scope="module")
def programs_made_in_a_hurry():
    """Training runs for milliseconds here, and compiles for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def parts(tmp_path_factory, programs_made_in_a_hurry):
    """Folders of two random autoencoders."""
    folder, video = tmp_path_factory.mktemp("parts"), VIDEO_VAE | {"num_res_blocks": 1}
    torch.manual_seed(0)
    vae = AutoencoderKLWan(**video | dict(base_dim=4, decoder_base_dim=4, dim_mult=[1, 1, 1, 1]))
    sound = Cosmos3AVAEAudioTokenizer(
        dec_dim=2, enc_dim=4, vocoder_input_dim=5, enc_latent_dim=10, dec_c_mults=[1, 1, 1, 1, 1],
        normalize_volume=False,
    )  # fmt: skip
    perturb(vae, 1, 0.02).to(torch.bfloat16).save_pretrained(folder / "vae")
    perturb(sound, 2, 0.02).to(torch.bfloat16).save_pretrained(folder / "sound_tokenizer")
    return folder


@pytest.fixture(scope="module")
def base(parts):
    vaes = parts / "vae", parts / "sound_tokenizer"
    return assemble.write_base(parts / "base", *vaes, sizes=SIZES, recipe=RECIPE)


@pytest.fixture(scope="module")
def frontend(base):
    return open_folder(base)


@pytest.fixture(scope="module")
def vaes(base):
    return data.load_vaes(base, "float32")


@pytest.fixture(scope="module")
def bank(base, vaes):
    return data.get_bank(base, base.parent / "bank", vaes, COUNT, chunk=4, dtype="float32")


@pytest.fixture(scope="module")
def perturbed(base):
    """A checkpoint none of whose towers' weights is 0 or 1: at first they predict nothing."""
    params, _ = load_towers(base, "float32")
    random = np.random.RandomState(0)
    noisy = jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape), params)
    return assemble.write_trained(base.parent / "trained", noisy, base, "Not at all.")


@pytest.fixture(scope="module")
def ours(perturbed):
    return Cosmos3.from_pretrained(perturbed, "float32")
