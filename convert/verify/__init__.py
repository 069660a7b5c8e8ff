"""Compare this implementation with diffusers on one checkpoint: `python -m convert.verify`.

It reads in the order of the work: `compare` (numbers and bars), `reference` (diffusers' modules, a
layer at a time), `witness` (both sides operation by operation, on the same inputs), `transformer`,
`autoencoders`, `sampler`, `pipeline` (one component each), `report` and `cli`.
"""
