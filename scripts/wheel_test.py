"""Build the wheel, make the demo with it in an empty environment, and open what came out.

The wheel brings the checkpoint `tiny` along, whole, and the demo uses nothing else.

With a path: only open that demo.
"""

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from cosmos3_jax.checkpoint.find import TINY, find_checkpoint
from cosmos3_jax.checkpoint.load import load_config
from cosmos3_jax.io.media import probe

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", REPOSITORY)
        [wheel] = (folder / "dist").glob("*.whl")
        check_data(wheel)
        venv.create(folder / "empty", with_pip=True)
        python, command = (folder / "empty" / "bin" / name for name in ("python", "cosmos3-jax"))
        constraints = REPOSITORY / "constraints.txt"
        install = ("-m", "pip", "install", "--quiet", "--constraint", constraints, wheel)
        run(python, *install, cwd=folder)
        run(command, "generate", "--sound", "--out", "demo.mp4", cwd=folder)
        run(command, "convert", "tiny", "converted", cwd=folder)
        check_demo(folder / "demo.mp4")
        if made := [path.name for path in (folder / "cache" / "cosmos3_jax").glob("random-*")]:
            sys.exit(f"the demo made {made} in the cache; it should have used {TINY}")


def check_data(wheel: Path) -> None:
    """The wheel has every file of the checkpoint `tiny`, byte for byte, and no other; and it
    installs nothing but the package.
    """
    source, inside = find_checkpoint(TINY), f"cosmos3_jax/data/{TINY}/"
    files = {path.relative_to(source).as_posix(): path for path in source.rglob("*")}
    files = {name: path.read_bytes() for name, path in files.items() if path.is_file()}
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith(inside)]
        packed = {name.removeprefix(inside): archive.read(name) for name in names}
        top = {name.split("/")[0] for name in archive.namelist()}
    if strangers := {name for name in top if not name.startswith("cosmos3_jax")}:
        sys.exit(
            f"{wheel} would install {', '.join(sorted(strangers))} into everybody's site-packages"
        )
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, {len(packed)} files of {TINY}")
    if packed != files:
        differ = {name for name in packed | files if packed.get(name) != files.get(name)}
        sys.exit(f"{wheel} and {source} differ in {', '.join(sorted(differ))}")


def check_demo(path: Path) -> None:
    """The demo, opened again, is what the embedded recipe says."""
    info = probe(path)
    print(info)
    found = (info.frames, info.height, info.width, float(info.fps))
    recipe = load_config(find_checkpoint(TINY)).recipe
    expected = (recipe.num_frames, recipe.height, recipe.width, recipe.fps)
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
