"""Execute a notebook from the top in a clean kernel: `make notebook`.

It runs in its own folder, with this repository first on the path. A cell that fails ends it, and
nothing is written. What differs from run to run without meaning anything, cells' clock times, is
left out.
"""

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 900  # for one cell on a slow machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, help="where to write it; in place if left out")
    arguments = parser.parse_args()
    notebook = nbformat.read(arguments.notebook, as_version=4)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(arguments.notebook.resolve().parent)}},
    )
    client.execute(env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    nbformat.write(notebook, arguments.out or arguments.notebook)


if __name__ == "__main__":
    main()
