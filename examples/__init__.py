"""Worked examples on top of cosmos3_jax. They are not part of the installed package."""
