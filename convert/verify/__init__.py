"""Compare this implementation with diffusers on one checkpoint: `python -m convert.verify`.

It reads in the order of the work: `compare` (numbers and bars), `names` and `weights` (every public
tensor against our parameter tree), `reference` (diffusers' modules); `transformer`, `autoencoders`,
`sampler` and `pipeline` (the computation of one component each); `report` and `cli`.
"""
