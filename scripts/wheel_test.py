"""Build the wheel, make the demo with it in an empty environment, and open what came out.

With a path: only open that demo.
"""

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from cosmos3_jax.media import probe
from cosmos3_jax.tiny import RECIPE

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", REPOSITORY)
        [wheel] = (folder / "dist").glob("*.whl")
        venv.create(folder / "empty", with_pip=True)
        python, command = (folder / "empty" / "bin" / name for name in ("python", "cosmos3-jax"))
        constraints = REPOSITORY / "constraints.txt"
        install = ("-m", "pip", "install", "--quiet", "--constraint", constraints, wheel)
        run(python, *install, cwd=folder)
        run(command, "generate", "--sound", "--out", "demo.mp4", cwd=folder)
        check_demo(folder / "demo.mp4")


def check_demo(path: Path) -> None:
    """The demo, opened again, is what the embedded recipe says."""
    info = probe(path)
    print(info)
    found = (info.frames, info.height, info.width, float(info.fps))
    expected = tuple(RECIPE[name] for name in ("num_frames", "height", "width", "fps"))
    if found != expected:
        sys.exit(f"{path} has frames, height, width, fps {found}, not {expected}")
    if (info.audio_codec, info.sample_rate) != ("aac", 48000):
        sys.exit(f"{path} has no AAC sound at 48 kHz")
    if abs(info.duration - info.audio_duration) > 1 / info.fps:
        sys.exit(f"{path}: video of {info.duration} s, sound of {info.audio_duration} s")


def run(*command: object, cwd: Path | None = None) -> None:
    """Without the repository on the path, and with a cache of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if cwd is not None:
        environment["XDG_CACHE_HOME"] = str(cwd / "cache")
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check_demo(Path(sys.argv[1]))
    else:
        main()
