"""The README's research example runs as it stands, and does what its comments say."""

import re
from pathlib import Path

import jax.numpy as jnp

README = Path(__file__).parent.parent / "README.md"


def test_the_pure_function_example():
    [code] = (
        block
        for block in re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
        if "jax.grad" in block
    )
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert float(jnp.abs(names["stronger"] - names["latents"]).max()) > 0
    assert jnp.isfinite(names["gradient"]).all() and jnp.abs(names["gradient"]).max() > 0
