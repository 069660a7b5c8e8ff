"""Modules under the names that they had before the package was divided, for one version.

`import cosmos3_jax.unipc` still works, and warns. Nothing in this package relies on it.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from types import ModuleType
from typing import Any

MOVED = {
    "mesh": "parallel.mesh", "sharding": "parallel.sharding",
    "distributed": "parallel.distributed", "device": "parallel.device",
    "startup": "parallel.device", "layers": "models.layers", "rope": "models.rope",
    "attention": "models.attention", "flash_attention": "models.flash_attention",
    "transformer": "models.transformer", "video_vae": "models.video_vae",
    "video_vae_modules": "models.video_vae_modules", "sound_vae": "models.sound_vae",
    "unipc": "sampling.unipc", "request": "sampling.request",
    "lora": "checkpoint.lora", "lora_files": "checkpoint.lora_files",
    "frontend": "checkpoint.find", "random_checkpoint": "checkpoint.random_checkpoint",
    "names": "checkpoint.names", "tiny_tokenizer": "checkpoint.tiny_tokenizer",
    "prompt": "io.prompt", "prepare": "io.prepare", "conditioning": "io.conditioning",
    "media_read": "io.media_read", "media": "io.media", "programs": "runtime.programs",
    "memory": "runtime.memory", "memory_limits": "runtime.memory",
    "weights": "runtime.weights", "cli_generate": "cli.generate", "bench": "cli.bench",
    "bench_measure": "runtime.measure", "bench_inputs": "runtime.random_inputs",
    "training.export": "checkpoint.export",
    "checkpoint.transformer_layout": "checkpoint.layouts",
    "checkpoint.video_vae_layout": "checkpoint.layouts",
    "checkpoint.sound_vae_layout": "checkpoint.layouts",
}  # fmt: skip


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its new name, and gives it to who asks for the old one."""

    def find_spec(self, name: str, path: object, target: object = None):
        package, _, old = name.partition(".")
        if package != __package__ or old not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = f"{__package__}.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(
            f"{spec.name} is {new} now; the old name goes with the next version",
            DeprecationWarning,
            stacklevel=2,  # the frames of the import system are left out
        )
        module = importlib.import_module(new)
        # What the import system sets on the module that it made is that of the new name.
        self.kept = {name: getattr(module, name) for name in ("__spec__", "__loader__")}
        return module

    def exec_module(self, module: ModuleType) -> None:
        for name, value in self.kept.items():
            setattr(module, name, value)


class _Generate(ModuleType):
    """Stands for the module that the function `generate` hides, until something of it is used."""

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module(f"{__package__}.sampling.generate")
        sys.modules[self.__name__] = module
        return getattr(module, name)


def install() -> None:
    """Let the old names be found, after all that exists.

    The package's name `generate` is a function, and was a module beside it. It is there without a
    warning, or importing it would put the module in the function's place.
    """
    sys.modules.setdefault(f"{__package__}.generate", _Generate(f"{__package__}.generate"))
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
