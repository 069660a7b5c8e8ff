"""What programs call the tensors of a LoRA, and how they say its scale.

All spellings below mean the same matrices, A [R, i] and B [o, R], of a public module. The scale is
alpha / R. A `.alpha` tensor, diffusers' metadata or PEFT's `adapter_config.json` says alpha; where
none does, the scale is 1, as diffusers has it.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cosmos3_jax import guard
from cosmos3_jax.checkpoint.layouts import transformer_layout
from cosmos3_jax.checkpoint.lora import families
from cosmos3_jax.checkpoint.rules import CheckpointError
from cosmos3_jax.config import TransformerConfig

PEFT_PREFIX = "base_model.model."
PEFT_CONFIG = "adapter_config.json"  # its settings, beside the tensors
# Before the module's name: PEFT; diffusers' pipelines; ComfyUI and musubi-tuner, of LoRAs and of
# checkpoints; PyTorch's wrappers for several devices and for compiling. diffusers' models write
# none.
PREFIXES = (
    PEFT_PREFIX, "transformer.", "diffusion_model.", "model.diffusion_model.", "module.",
    "_orig_mod.",
)  # fmt: skip
# Before a name whose dots are underscores, `layers_0_self_attn_to_q`: kohya; LyCORIS.
UNDERSCORE_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
ENDINGS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B",  # PEFT and diffusers
    ".lora_down.weight": "A", ".lora_up.weight": "B",  # kohya
    ".lora.down.weight": "A", ".lora.up.weight": "B",  # diffusers before PEFT
    "_lora.down.weight": "A", "_lora.up.weight": "B",  # and its attention processors
    ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B",
    ".alpha": "alpha",
}  # fmt: skip
# Parts of names of what is no B A, and what it is.
OTHERS = {
    "lora_magnitude_vector": "DoRA", "dora_scale": "DoRA",
    "lokr_": "LoKr", "hada_": "LoHa", "oft_": "OFT", "lora_mid": "a Tucker decomposition",
    "lora_embedding_": "a LoRA of an embedding", ".bias": "a bias",
}  # fmt: skip
OTHER_ENDINGS = {".diff": "a whole weight", ".diff_b": "a bias"}  # ComfyUI's
# Of diffusers' pipelines, ComfyUI and kohya.
_TEXT_ENCODER = re.compile(r"(base_model\.model\.)?(text_encoders?(_\d+)?[._]|lora_te\d*_)")
# Fields of PEFT's LoraConfig with which it is no B A, or one of other weights.
OTHER_FIELDS = {
    "use_dora": "DoRA", "use_qalora": "QALoRA", "use_bdlora": "BD-LoRA",
    "alora_invocation_tokens": "activated LoRA", "arrow_config": "Arrow", "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA", "lora_bias": "a bias", "layer_replication": "other layers",
    "modules_to_save": "a whole weight", "target_parameters": "a LoRA of parameters",
    "trainable_token_indices": "a LoRA of an embedding",
}  # fmt: skip
# Ways to begin that change the weights too.
OTHER_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
MOST_PATTERNS = 4096  # more than there are modules
WAY_OUT = (
    "only W + scale B A is read; merge the adapter into the weights with the program that trained "
    "it and load these, or train a plain LoRA"
)


_PREFIXES = re.compile(rf"^({'|'.join(map(re.escape, PREFIXES))})+")


class Name(NamedTuple):
    """What a tensor is: the public module, `A`, `B` or `alpha`, and PEFT's name of the adapter."""

    module: str
    half: str
    adapter: str


def parse(key: str, config: TransformerConfig) -> Name | None:
    """What a tensor of this name is; None if it is none of a LoRA.

    The module is a public one wherever the name has a known spelling, and as it is written where
    it has not.
    """
    key = key.replace(".processor.", ".")
    adapter = re.fullmatch(r"(.*\.lora_[AB])\.([^.]+)(\.weight)", key)
    key = adapter[1] + adapter[3] if adapter else key
    for ending, half in ENDINGS.items():
        if key.endswith(ending):
            module = _PREFIXES.sub("", key.removesuffix(ending))
            module = _underscored(config).get(module, module)
            return Name(module, half, adapter[2] if adapter else "")
    return None


def other_kind(key: str) -> str | None:
    """What a tensor of this name belongs to, if that is an adapter of another kind."""
    ending = next((kind for part, kind in OTHER_ENDINGS.items() if key.endswith(part)), None)
    return ending or next((kind for part, kind in OTHERS.items() if part in key), None)


def is_text_encoders(key: str) -> bool:
    """Whether a tensor of this name adapts the text encoder that other models have."""
    return _TEXT_ENCODER.match(key) is not None


def is_unread(module: str, config: TransformerConfig) -> bool:
    """Whether a public module is one that generation never reads: sound that is not asked for, the
    text tower's last layer but its keys and values, the head of the text, actions.
    """
    return _layout(config).is_unused(f"{module}.weight")


_layout = functools.cache(transformer_layout)


@functools.cache
def _underscored(config: TransformerConfig) -> dict[str, str]:
    known = families(dataclasses.replace(config, sound_gen=True)).values()
    modules = {module for family in known for module in family.modules}
    # The text tower's last layer has modules that are not read: those of its first layer.
    last = f"layers.{config.num_hidden_layers - 1}."
    modules |= {re.sub(r"^layers\.0\.", last, module) for module in modules}
    return {
        prefix + module.replace(".", "_"): module
        for module in modules
        for prefix in UNDERSCORE_PREFIXES
    }


@dataclasses.dataclass(frozen=True)
class Settings:
    """What PEFT's LoraConfig says of the scale.

    Attributes:
        where: where they stand, for messages.
        rank, alpha: of every module but those that a pattern names.
        rank_pattern, alpha_pattern: regular expressions of modules, and theirs.
        rslora: the scale is alpha / sqrt(R).
    """

    where: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool

    @classmethod
    def parse(cls, where: str, text: str | bytes) -> "Settings | None":
        """JSON -> settings, or None where it says nothing: `{}`, or fields of other models.

        Raises CheckpointError naming the field, if it is no adapter that can be read.
        """
        with guard.parsing(where, "valid JSON", CheckpointError):
            fields = json.loads(text)
        if not isinstance(fields, dict):
            raise CheckpointError(f"{where} is {_short(fields)}, not a JSON object of settings")
        if all("." in name for name in fields):  # a pipeline's, `transformer.r`
            ours = "transformer."
            fields = {k.removeprefix(ours): x for k, x in fields.items() if k.startswith(ours)}
        if not fields:
            return None
        _check_kind(where, fields)
        for name in ("lora_alpha", "r"):
            if name not in fields:
                raise CheckpointError(f"{where} has no {name}, by which the adapter is scaled")
        rslora = fields.get("use_rslora")
        if not isinstance(rslora, bool | None):
            raise CheckpointError(f"{where}: use_rslora is {_short(rslora)}, not true or false")
        return cls(
            where,
            _rank(f"{where}: r", fields["r"]),
            _alpha(f"{where}: lora_alpha", fields["lora_alpha"]),
            _pattern(f"{where}: rank_pattern", fields.get("rank_pattern"), _rank),
            _pattern(f"{where}: alpha_pattern", fields.get("alpha_pattern"), _alpha),
            bool(rslora),
        )

    def rank_of(self, module: str) -> int:
        return _look_up(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        return _look_up(self.alpha_pattern, module, self.alpha)


def scale(module: str, rank: int, alpha: float | None, said: Sequence[Settings]) -> float:
    """alpha / R of one module, or alpha / sqrt(R).

    Args:
        module: its public name.
        rank: R of its matrices.
        alpha: of its `.alpha` tensor, if there is one.
        said: the settings that there are.

    Raises:
        CheckpointError: two of them contradict each other.
    """
    for settings in said:
        if settings.rank_of(module) != rank:
            raise CheckpointError(
                f"{module}: {settings.where} says rank {settings.rank_of(module)}, "
                f"and its matrices have rank {rank}"
            )
    alphas = {settings.where: settings.alpha_of(module) for settings in said}
    if alpha is not None:
        alphas[f"{module}.alpha"] = alpha
    if len(set(alphas.values())) > 1:
        words = " and ".join(f"{where} says alpha {value}" for where, value in alphas.items())
        raise CheckpointError(f"{module}: {words}; keep the one that it was trained with")
    if len({settings.rslora for settings in said}) > 1:
        words = " and ".join(f"{x.where} says {x.rslora}" for x in said)
        raise CheckpointError(f"use_rslora: {words}; keep the one that it was trained with")
    if not alphas:
        return 1.0
    [value] = set(alphas.values())
    rslora = any(settings.rslora for settings in said)
    return value / (math.sqrt(rank) if rslora else rank)


def _check_kind(where: str, fields: dict[str, Any]) -> None:
    kind = fields.get("peft_type") or "LORA"
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {_short(kind)}; {WAY_OUT}")
    odd = {name: what for name, what in OTHER_FIELDS.items() if fields.get(name)}
    if fields.get("bias") not in (None, "none"):
        odd["bias"] = "a bias"
    if str(fields.get("init_lora_weights")).startswith(OTHER_STARTS):
        odd["init_lora_weights"] = "a change of the weights before training"
    for name, what in odd.items():
        raise CheckpointError(f"{where}: {name} is {_short(fields[name])} ({what}); {WAY_OUT}")


def _rank(where: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where} is {_short(value)}, not a whole number of at least 1")
    return value


def _alpha(where: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{where} is {_short(value)}, not a number")
    return finite(where, value)


def finite(where: str, value: float) -> float:
    """The value as a float. Raises CheckpointError if it is not finite, or 0."""
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise CheckpointError(f"{where} is {found}, which is not finite")
    if found == 0:
        raise CheckpointError(f"{where} is 0, with which the adapter changes nothing")
    return found


def _pattern(where: str, value: Any, check) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is {_short(value)}, not an object of patterns")
    if len(value) > MOST_PATTERNS:
        raise CheckpointError(
            f"{where} has {len(value)} patterns, and {MOST_PATTERNS} is the limit"
        )
    for pattern in value:
        if not _is_quick(pattern):
            raise CheckpointError(
                f"{where}: {_short(pattern)} could be searched for without end: give names of "
                "modules, with at most 3 of * + ? { and 16 of |, and none of * + { behind )"
            )
        with guard.parsing(f"{where}: {_short(pattern)}", "a regular expression", CheckpointError):
            _compiled(pattern)
    return {pattern: check(f"{where}: {guard.line(pattern)}", x) for pattern, x in value.items()}


def _is_quick(pattern: str) -> bool:
    """Whether a search in a module's name ends soon. Repeats of groups and many repeats of letters
    can take exponentially long.
    """
    repeats = len(re.findall(r"[*+?{]", pattern.replace("(?", "(")))
    of_groups = re.search(r"\)[*+{]", pattern)
    return len(pattern) <= 1000 and repeats <= 3 and pattern.count("|") <= 16 and not of_groups


@functools.lru_cache(maxsize=2 * MOST_PATTERNS)
def _compiled(pattern: str) -> re.Pattern:
    return re.compile(rf"(.*\.)?({pattern})$")  # as PEFT looks it up


def _look_up(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((x for pattern, x in patterns.items() if _compiled(pattern).match(module)), default)


def _short(value: Any) -> str:
    try:
        text = guard.line(json.dumps(value))
    except RecursionError:
        text = f"a deep {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
