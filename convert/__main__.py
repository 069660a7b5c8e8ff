"""python -m convert SRC DST [--dtype bfloat16] [--no-sound]: the command `cosmos3-jax convert`."""

import sys

from cosmos3_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
