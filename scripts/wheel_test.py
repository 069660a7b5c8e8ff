"""Build the wheel, install it in an empty environment away from the repository, and make the demo
there.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from cosmos3_jax.media import probe

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", REPOSITORY)
        [wheel] = (folder / "dist").glob("*.whl")
        venv.create(folder / "empty", with_pip=True)
        python, command = (folder / "empty" / "bin" / name for name in ("python", "cosmos3-jax"))
        constraints = REPOSITORY / "constraints.txt"
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--constraint",
            constraints,
            wheel,
            cwd=folder,
        )
        run(command, "generate", "--sound", "--out", "demo.mp4", cwd=folder)
        info = probe(folder / "demo.mp4")
        print(info)
        if info.audio_codec != "aac" or abs(info.duration - info.audio_duration) > 1 / info.fps:
            sys.exit("the wheel's demo has no sound as long as its video")


def run(*command: object, cwd: Path | None = None) -> None:
    subprocess.run([str(part) for part in command], cwd=cwd, check=True)


if __name__ == "__main__":
    main()
