"""The record of a generation: all that is needed to make it again, beside and inside its file."""

import argparse
import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import av
import jax
import jaxlib
import numpy as np
import PIL

import cosmos3_jax
from cosmos3_jax import guard
from cosmos3_jax.checkpoint import digests
from cosmos3_jax.checkpoint.find import BUILT_IN, is_on_hub
from cosmos3_jax.cli.record_check import parse_record
from cosmos3_jax.io.encode import IMAGE_SUFFIXES, VIDEO_SUFFIXES, read_comment
from cosmos3_jax.io.prepare import Prepared
from cosmos3_jax.parallel import device
from cosmos3_jax.runtime.job import Job
from cosmos3_jax.sampling import unipc
from cosmos3_jax.sampling.denoise import all_steps

Record = dict[str, Any]
# Of one run and how it was asked for, not of what it makes. A file leaves them out: the same again
# is the same bytes.
RUN = ("seconds", "peak_memory_bytes", "offload", "sources")
# Options that are in a record under their own names.
SAME_NAMES = (
    "checkpoint", "prompt", "negative_prompt", "system_prompt", "prompt_style", "prompt_metadata",
    "num_frames", "height", "width", "fps", "num_inference_steps", "guidance_scale", "flow_shift",
    "schedule", "seed", "keep", "dtype", "steps_per_program", "speed",
)  # fmt: skip

# What was chosen for a video and does not hold for an image, and the other way round.
OF_A_KIND = (
    "image", "video", "condition_frames", "keep", "num_frames", "sound_frames", "noise",
    "num_inference_steps", "guidance_scale", "flow_shift", "schedule", "sigmas", "negative_prompt",
    "steps_per_program", "evaluations",
)  # fmt: skip


def make_record(
    options: argparse.Namespace,
    files: Record,
    prepared: Prepared,
    job: Job,
    block_steps: int,
    prompt: str,
    negative_prompt: str | None,
    seed: int,
) -> Record:
    """What was asked for, what it was resolved to, and with what it is made.

    Args:
        options: of the command line.
        files: the checkpoint's, see `digests.of_folder`.
        prepared: the request, and where its settings come from.
        job: as it was placed on the devices.
        block_steps: denoising steps of one call to the device.
        prompt: as it was given.
        negative_prompt: as it was given, or None.
        seed: of this file.
    """
    request, settings, [texts] = prepared.request, prepared.settings, prepared.texts
    negative_mask = request.neg_text_mask
    return {
        "checkpoint": _checkpoint(options.checkpoint),
        "checkpoint_files": files,
        "lora": [
            {"factor": factor, **(_file(path) or {"path": str(path.absolute())})}
            for path, factor in map(parse_lora, options.lora or [])
        ],
        "mode": prepared.mode,
        "sources": prepared.sources,
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "system_prompt": options.system_prompt,
        "prompt_metadata": options.prompt_metadata,
        "resolved_prompt": texts.prompt,
        "resolved_negative_prompt": texts.negative_prompt if job.guidance else None,
        "resolved_system_prompt": texts.system_prompt,
        "prompt_style": options.prompt_style,
        "prompt_tokens": int(request.text_mask.sum()),
        "negative_prompt_tokens": None if negative_mask is None else int(negative_mask.sum()),
        "image": _file(options.image),
        "video": _file(options.video),
        "num_frames": settings.num_frames,
        "height": settings.height,
        "width": settings.width,
        "fps": float(settings.fps),
        "sound_frames": request.sound_frames,
        "seed": seed,
        "noise": str(Path(options.noise).absolute()) if options.noise else None,
        "noise_sha256": digests.of_file(options.noise) if options.noise else None,
        "condition_frames": np.flatnonzero(request.frame_mask[0]).tolist()
        if request.frame_mask is not None
        else [],
        "keep": (options.keep or "first") if options.video else None,
        "num_inference_steps": settings.num_inference_steps
        if settings.speed == "fast"
        else request.num_inference_steps,
        "speed": settings.speed,
        "evaluations": request.num_inference_steps,
        "guidance_scale": float(request.guidance_scale),
        "flow_shift": settings.flow_shift,
        "schedule": settings.schedule,
        "sigmas": prepared.sigmas.tolist(),
        "steps_per_program": block_steps,
        "timesteps": [*map(int, all_steps(request).solver.timestep)],
        "dtype": job.dtype,
        "offload": job.offload,
        "device": device.default_device().device_kind,
        "platform_version": jax.devices()[0].client.platform_version,
        "cpu": _cpu(),
        "mesh": dict(job.mesh),
        "processes": jax.process_count(),
        "versions": {
            "cosmos3_jax": cosmos3_jax.__version__,
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "av": av.__version__,
            **{name: ".".join(map(str, of)) for name, of in av.library_versions.items()},
            "python": platform.python_version(),
        },
    }


def to_text(record: Record) -> str:
    """For the file beside what was made."""
    return json.dumps(record, indent=2) + "\n"


def to_comment(record: Record) -> str:
    """For the inside of what was made: files by their names, without the folders of this machine,
    and without what belongs to one run.
    """
    record = {name: value for name, value in record.items() if name not in RUN}
    for name in ("image", "video"):
        record[name] = _without_folder(record[name])
    record["lora"] = [_without_folder(lora) for lora in record["lora"]]
    if record["noise"]:
        record["noise"] = Path(record["noise"]).name
    if not (is_on_hub(record["checkpoint"]) or record["checkpoint"] in BUILT_IN):
        record["checkpoint"] = Path(record["checkpoint"]).expanduser().resolve().name
    return json.dumps(record)


def read_record(path: Path) -> Record:
    """The record in a JSON file, or inside of a video or an image.

    Raises:
        ValueError: there is none, or it is no record of this package.
        OSError: the file cannot be read.
    """
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"--from-record {path}: there is no such file")
    if path.suffix.lower() in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
        text, where = read_comment(path) or "", "inside of it"
    else:
        text, where = guard.read(path).decode("utf-8", errors="replace"), "in it"
    return parse_record(text, f"--from-record {path}", where)


def recorded_options(path: Path, named: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of the options of a command line.

    Args:
        path: see `read_record`.
        named: the options that are given beside it; what they say instead is left out. Where they
            turn a video into an image, so is what was for the video.

    Raises:
        ValueError: there is no record, or a file that it names is not here.
        OSError: the record cannot be read.
    """
    record = _with_folders(read_record(path), path)
    if _turns(record, named):
        record = {name: value for name, value in record.items() if name not in OF_A_KIND}
    found = {name: record[name] for name in SAME_NAMES if record.get(name) is not None}
    found["sound"] = bool(record.get("sound_frames"))
    if record.get("speed") == "fast" and {"num_inference_steps", "evaluations"} <= record.keys():
        if record["evaluations"] != unipc.fast_evaluations(record["num_inference_steps"]):
            found["evaluations"] = record["evaluations"]  # a finer choice, which is kept
    found["recorded_mesh"] = record.get("mesh")
    files = record.get("checkpoint_files", {}).get("files", {}).values()
    found["full_digest"] = any({"sha256", "sampled"} <= file.keys() for file in files)
    levels = {"num_inference_steps", "flow_shift", "schedule", "speed", "evaluations"}
    instead = {
        "height": {"size", "aspect"}, "width": {"size", "aspect"},
        "prompt": {"text", "prompt_file"}, "negative_prompt": {"negative_prompt_file"},
        "steps_per_program": {*levels, "sigmas"}, "evaluations": {"speed", "sigmas"},
        "speed": {"evaluations", "sigmas"}, "seed": {"seeds"}, "keep": {"image"},
    }  # fmt: skip
    found = {name: found[name] for name in found if not instead.get(name, set()) & named.keys()}
    if "sigmas" in record and not levels & named.keys():
        found["sigmas"] = ",".join(map(repr, record["sigmas"]))
    if "image" not in named and "video" not in named:
        for name in ("image", "video"):
            if record.get(name):
                given = record[name]
                place = _look_for(given["path"], given.get("sha256"), path, f"--{name}")
                found[name] = str(place)
        if record.get("condition_frames") and record.get("video"):
            found["condition_frames"] = ",".join(map(str, record["condition_frames"]))
    if record.get("noise") and "noise" not in named and not {"seed", "seeds"} & named.keys():
        found["noise"] = _look_for(record["noise"], record.get("noise_sha256"), path, "--noise")
    if "lora" not in named:
        found["lora"] = [
            f"{_look_for(lora['path'], lora.get('sha256'), path, '--lora')}:{lora['factor']!r}"
            for lora in record.get("lora", [])
        ] or None
    checkpoint = record.get("checkpoint", "")
    if "checkpoint" in named:
        found.pop("checkpoint", None)
    elif is_on_hub(checkpoint) and (of := record.get("checkpoint_files", {}).get("revision")):
        found["revision"] = of  # a folder that is not here is not looked for on the Hub
    elif checkpoint not in BUILT_IN:
        found["checkpoint"] = str(_look_for(checkpoint, None, path, "--checkpoint").absolute())
    return found


def _with_folders(record: Record, path: Path) -> Record:
    """The record from inside of a file, or the same one beside it, which names folders too."""
    if path.suffix.lower() not in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
        return record
    for beside in (path.with_suffix(".json"), path.with_name(f"{path.name}.json")):
        try:
            whole = read_record(beside)
            if json.loads(to_comment(whole)) == record:
                return whole
        except (ValueError, OSError, KeyError, TypeError):  # another file of that name
            continue
    return record


def _turns(record: Record, named: Mapping[str, Any]) -> bool:
    """Whether the options ask for an image and the record is a video's, or the other way round."""
    frames, out = named.get("num_frames"), named.get("out")
    recorded = record.get("num_frames")
    if frames is None and out is not None and recorded is not None:
        suffix = out.suffix.lower()
        if recorded == 1 and suffix not in IMAGE_SUFFIXES:
            return suffix in VIDEO_SUFFIXES
        return recorded != 1 and suffix in IMAGE_SUFFIXES and suffix not in VIDEO_SUFFIXES
    return None not in (frames, recorded) and (frames == 1) != (recorded == 1)


def sampled_only(recorded: Record, found: Record) -> list[str]:
    """The weight files that `differences` compares by samples of their contents."""
    old, new = (record.get("checkpoint_files", {}).get("files", {}) for record in (recorded, found))
    return [
        name
        for name in sorted(old.keys() & new.keys())
        if "sampled" in old[name] and not {"sha256"} <= old[name].keys() & new[name].keys()
    ]


def differences(recorded: Record, found: Record) -> list[str]:
    """In words, what may make another file than the recorded one."""
    words = []
    for package, version in recorded.get("versions", {}).items():
        now = found["versions"].get(package)
        if now != version:
            words.append(f"{package} is {now}, was {version}")
    for name in (
        "device",
        "platform_version",
        "cpu",
        "mesh",
        "processes",
        "dtype",
        "steps_per_program",
        "noise_sha256",
    ):
        if name in recorded and recorded[name] != found[name]:
            words.append(f"{name} is {found[name]}, was {recorded[name]}")
    for name in ("image", "video"):
        old, new = recorded.get(name) or {}, found[name] or {}
        if old.get("sha256") != new.get("sha256"):
            words.append(f"the {name} holds something else")
    loras = [
        [lora.get("sha256") for lora in record.get("lora", [])] for record in (recorded, found)
    ]
    if loras[0] != loras[1]:
        words.append("the LoRA files hold something else")
    if "checkpoint_files" in recorded:
        words += digests.differences(recorded["checkpoint_files"], found["checkpoint_files"])
    for name in ("resolved_prompt", "resolved_negative_prompt", "resolved_system_prompt"):
        if recorded.get(name) != found[name]:
            words.append(f"{name} is another text")
    return words


def parse_lora(text: str) -> tuple[Path, float]:
    """FILE or FILE:FACTOR -> the file and its factor."""
    name, _, factor = text.rpartition(":")
    try:
        return Path(name or text), float(factor) if name else 1.0
    except ValueError:  # a colon that belongs to the name
        return Path(text), 1.0


def _checkpoint(name: str | Path) -> str:
    """A folder by its whole path; a Hub id, or the name of one that is built in, as it is."""
    name = str(name)
    if is_on_hub(name) or name in BUILT_IN:
        return name
    return str(Path(name).expanduser().absolute())


def _cpu() -> str:
    """The model of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor()


def _file(path: Path | str | None) -> dict[str, str] | None:
    """A file or folder that is read, and what is in it."""
    if path is None or not (path := Path(path)).exists():
        return None
    return {"path": str(path.absolute()), "sha256": digests.of_lora(path)}


def _without_folder(file: dict[str, Any] | None) -> dict[str, Any] | None:
    return file and file | {"path": Path(file["path"]).name}


def _look_for(name: str, digest: str | None, record: Path, option: str) -> Path:
    """A file of a record: where it says, beside the record, or here. Of several, the same one."""
    places = (record.parent / Path(name).name, Path(name), Path(Path(name).name))
    found = [place for place in places if _is_such(place, option)]
    if not found:
        raise ValueError(
            f"--from-record {record}: {name} is neither there nor beside the record; name it with "
            f"{option}"
        )
    if digest is None or len(found) == 1:
        return found[0]
    return next((place for place in found if digests.of_lora(place) == digest), found[0])


def _is_such(place: Path, option: str) -> bool:
    """Whether there is what an option takes: a checkpoint's folder, a LoRA, else a file."""
    if option == "--checkpoint":
        return (place / "model_index.json").is_file() or (place / "transformer").is_dir()
    return place.is_file() or (option == "--lora" and (place / "adapter_config.json").is_file())
