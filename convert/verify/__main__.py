"""python -m convert.verify CHECKPOINT: see `cli`."""

import os
import sys

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch may share the GPU

from convert.verify.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
