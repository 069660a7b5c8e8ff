"""`python -m cosmos3_jax`: the command line."""

import sys

from cosmos3_jax.cli.main import main

sys.exit(main())
