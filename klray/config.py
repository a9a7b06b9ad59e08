"""A run's configuration: strict models, presets, and the one function that overrides them."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from klray.cli import MOST_IMAGES, MOST_IN_BATCH
from klray.errors import UserError

PRESETS = Path(__file__).parent / "presets"


class _Yaml(yaml.SafeLoader):
    """Scalars of YAML 1.2: 2e-4 is a number and off is a word, where YAML 1.1 reads a word and False.

    A key that is given twice is an error: one of its values would be dropped unseen.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {}
for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)


def read_yaml(text: str) -> Any:
    """The one document in ``text``, of plain values only; raises yaml.YAMLError."""
    loader = _Yaml(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class ConfigError(UserError):
    """A setting breaks a rule; the message is one line: the key, the rule, the value, the way out."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Data(_Section):
    name: Literal["digits", "mnist", "cifar10", "celeba", "folder", "zip"] = "digits"
    path: str | None = None  # of a folder or a ZIP; the others lie under KLRAY_DATA
    image_size: PositiveInt = 8
    channels: PositiveInt = 1
    resize: Literal["bilinear", "pad"] = "bilinear"
    flip: bool = False  # random horizontal flips, drawn on the device
    download: bool = False
    limit: PositiveInt | None = None  # keep only so many training images
    held_out: PositiveInt | None = None


class Process(_Section):
    num_terms: int = Field(default=8, ge=0, le=1024)  # M; 0 is the VP baseline
    kind: Literal["kl", "vp_ensemble", "vp_truncated"] = "kl"  # the last two: control arms of a comparison
    marginal: Literal["matched", "truncated", "paper"] = "matched"
    time_grid: Literal["continuous"] | PositiveInt = "continuous"  # or N: training times uniform on n/N
    beta_min: float = Field(default=0.1, gt=0)
    beta_max: float = Field(default=20.0, gt=0)


class Loss(_Section):
    coupling: Literal["joint", "separable"] = "joint"
    partial_terms: PositiveInt | None = None  # K <= M; null: all terms
    prediction: Literal["term", "coefficient", "share"] = "term"
    term_chunk: PositiveInt | None = None  # terms evaluated at once; null: all that the rank has


class Network(_Section):
    kind: Literal["unet", "mlp"] = "unet"
    architecture: Literal["repeated", "wide"] = "repeated"
    term_input: Literal["class_embedding", "time_offset"] = "class_embedding"
    channels: list[PositiveInt] = [16, 32]
    attention: list[bool] = [False, False]
    layers_per_block: PositiveInt = 1
    norm_groups: PositiveInt = 8
    dropout: float = Field(default=0.0, ge=0, lt=1)
    width: PositiveInt = 128  # of the mlp
    init_from: str | None = None  # a baseline's checkpoint


class Optimizer(_Section):
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_images: int = Field(default=0, ge=0)
    clip_norm: float | None = Field(default=1.0, gt=0)
    batch_size: PositiveInt = 64  # over all workers
    micro_batch: PositiveInt | None = None  # images of one forward pass on one worker; null: all it has
    max_nonfinite: PositiveInt = 20  # consecutive steps with a non-finite gradient before the run stops

    @model_validator(mode="before")
    @classmethod
    def _pair(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("betas"), list):
            return {**values, "betas": tuple(values["betas"])}
        return values


class Ema(_Section):
    decay: float = Field(default=0.999, ge=0, lt=1)
    every: PositiveInt = 1  # optimiser steps between updates
    warmup: bool = True  # decay at most (1 + n)/(10 + n) at update n


class Precision(_Section):
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # auto: bf16 on GPUs that have it, else off
    compile: bool = False
    channels_last: bool = False
    fused: Literal["auto", "on", "off"] = "auto"  # the U-Net in few kernels; auto: on GPUs, unless compile is set
    cuda_graph: Literal["auto", "off"] = "auto"  # the whole step as one launch; auto: on one GPU


class Mesh(_Section):
    data: PositiveInt | None = None  # null: the workers that the basis axis leaves
    basis: PositiveInt | Literal["auto"] = 1
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of the sums; auto: nccl where each worker has a GPU of its own


class Budget(_Section):
    unit: Literal["images", "network_evals", "seconds", "steps"] = "images"
    amount: float = Field(default=100_000, gt=0)


class Validation(_Section):
    every_images: PositiveInt = 20_000
    images: PositiveInt = 256
    time_bins: PositiveInt = 10
    batch_size: PositiveInt = 256


class Checkpoint(_Section):
    every_images: PositiveInt = 50_000
    keep: PositiveInt = 2


MOST_STEPS = 10_000  # of a solver


def _lower(name: str) -> str:
    """Names of klray's own are in lower case; an entry of the user's, module:attribute, or a file is not."""
    return name if ":" in name or "/" in name or "." in name else name.lower()


class Sampling(_Section):
    solver: Annotated[str, AfterValidator(_lower)] = "ddim"
    num_steps: int = Field(default=20, gt=0, le=MOST_STEPS)
    nfe: int | None = Field(
        default=None, gt=0, le=MOST_STEPS
    )  # instead of num_steps: score evaluations an image, spent as the solver does
    timesteps: Annotated[str, AfterValidator(_lower)] = "logsnr"
    options: dict[str, bool | str] = {}  # of the solver: variant, third_order, lower_order_final, convert_with
    final: Literal["denoise", "keep"] = "denoise"  # of the noise that is left at the end of the grid
    clip_x0: bool = True
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # of the network; auto: bf16 on GPUs that have it, else off
    channels_last: bool = False
    term_chunk: PositiveInt | None = None  # terms evaluated at once; null: as many as make 512 rows of the network
    every_images: PositiveInt = 50_000
    images: int = Field(default=64, gt=0, le=10_000)
    batch_size: int = Field(default=64, gt=0, le=MOST_IN_BATCH)


class Evaluation(_Section):
    """Scores during training, by sampling.*, in another process of low priority: training does not wait for them."""

    every_images: int = Field(default=0, ge=0)  # 0: none
    num_samples: int = Field(default=1000, ge=2, le=MOST_IMAGES)
    metrics: list[str] = ["kid"]
    features: str | None = None  # null: inception if its weights can be had, else efficientnet_lite0
    inception_weights: str | None = None
    reference: Literal["train", "held_out"] = "train"
    batch_size: int = Field(default=64, gt=0, le=MOST_IN_BATCH)
    device: Literal["auto", "cpu"] = "auto"
    workers: PositiveInt = 1  # more than one: on Ray, beside those that train


class Tracking(_Section):
    uri: str | None = None  # null: sqlite:///mlflow.db in the working folder; "off": no MLflow
    experiment: str = "klray"
    every_steps: PositiveInt = 50


class Config(_Section):
    """Everything that defines a run. ``preset`` is the name that the run is called after."""

    preset: str = "custom"
    seed: int = Field(default=0, ge=0)
    data: Data = Data()
    process: Process = Process()
    loss: Loss = Loss()
    network: Network = Network()
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    precision: Precision = Precision()
    mesh: Mesh = Mesh()
    budget: Budget = Budget()
    validation: Validation = Validation()
    checkpoint: Checkpoint = Checkpoint()
    sampling: Sampling = Sampling()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()

    @property
    def terms_per_step(self) -> int:
        """K, the terms that a training step evaluates; 1 for the baseline."""
        one = self.process.num_terms == 0 or self.process.kind == "vp_truncated"
        return 1 if one else self.loss.partial_terms or self.process.num_terms

    @property
    def evals_per_image(self) -> int:
        """Network evaluations per training image: 1 for ``wide`` and the baseline, else K."""
        return 1 if self.network.architecture == "wide" else self.terms_per_step

    @model_validator(mode="after")
    def _rules(self) -> Config:
        process, loss, network = self.process, self.loss, self.network
        terms, partial = process.num_terms, loss.partial_terms
        if partial is not None and terms > 0 and partial > terms:
            raise ConfigError(f"loss.partial_terms must be <= process.num_terms = {terms}, got {partial}; try {terms}")
        if partial is not None and terms == 0:
            raise ConfigError(f"loss.partial_terms needs process.num_terms > 0, got {partial} for the VP baseline")
        if process.kind != "kl" and terms == 0:
            raise ConfigError(f"process.kind {process.kind} needs process.num_terms >= 1, got 0")
        if process.kind == "vp_ensemble" and (loss.coupling, partial or terms) != ("joint", terms):
            raise ConfigError("process.kind vp_ensemble is the VP loss of all terms' sum: loss.coupling must be joint")
        if process.beta_max < process.beta_min:
            raise ConfigError(f"process.beta_max must be >= beta_min = {process.beta_min}, got {process.beta_max}")
        if network.architecture == "wide":
            if self.mesh.basis not in (1, "auto"):
                raise ConfigError(
                    f"mesh.basis must be 1 for network.architecture wide, got {self.mesh.basis}; one call gives all"
                )
            if loss.term_chunk is not None:
                raise ConfigError(
                    "loss.term_chunk must be null for network.architecture wide: one call gives all terms"
                )
            if network.term_input == "time_offset":
                raise ConfigError("network.term_input time_offset is for architecture repeated; wide has no term input")
        if network.term_input == "time_offset" and process.time_grid == "continuous":
            raise ConfigError("network.term_input time_offset needs process.time_grid to be a number N, got continuous")
        if self.precision.fused == "on":
            if network.kind != "unet":
                raise ConfigError(f"precision.fused on is for network.kind unet, got {network.kind}; set it to auto")
            if self.precision.compile:
                raise ConfigError("precision.fused on and precision.compile exclude each other; leave one of them out")
        if len(network.channels) != len(network.attention):
            raise ConfigError(
                f"network.attention needs one value for each of the {len(network.channels)} network.channels, "
                f"got {len(network.attention)}"
            )
        if network.kind == "unet":
            if any(width % network.norm_groups for width in network.channels):
                raise ConfigError(
                    f"network.channels must be multiples of norm_groups = {network.norm_groups}, got {network.channels}"
                )
            halvings = 2 ** (len(network.channels) - 1)
            if self.data.image_size % halvings:
                raise ConfigError(
                    f"data.image_size must be a multiple of {halvings} for {len(network.channels)} network.channels, "
                    f"got {self.data.image_size}"
                )
        if self.data.name in ("folder", "zip") and self.data.path is None:
            raise ConfigError(f"data.path must name the {self.data.name}; set data.path=...")
        return self

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: all but the budget's size, the mesh, what only makes it faster, and where
        and how often to report."""
        full = self.model_dump(mode="json")
        for section in ("mesh", "tracking", "checkpoint", "evaluation"):
            del full[section]
        for speed in ("fused", "cuda_graph"):
            del full["precision"][speed]
        del full["budget"]["amount"]
        return full

    def default_name(self) -> str:
        """preset + hash of what makes the run."""
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return f"{self.preset}-{digest[:8]}"

    def flat(self) -> dict[str, Any]:
        """Dotted keys to values, as on the command line and in MLflow's params."""
        return flatten(self.model_dump(mode="json"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def preset_names() -> list[str]:
    """The presets that ship with klray."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def load_config(name_or_path: str, overrides: Iterable[str] = ()) -> Config:
    """A preset's name or a YAML file, with overrides ``a.b=value`` (values are YAML).

    Raises:
        ConfigError: for an unknown preset or key, a wrong type, or settings that break a rule together.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{name_or_path}.yaml"
        if not path.is_file():
            raise ConfigError(f"unknown preset {name_or_path!r}{nearest(name_or_path, preset_names())}")
    try:
        tree = read_yaml(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {getattr(error, 'strerror', error)}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold sections (data, process, ...), got {type(tree).__name__}")
    return override({"preset": path.stem, **tree}, [parse_override(text) for text in overrides])


def override(tree: Mapping[str, Any], changes: Iterable[tuple[str, Any]]) -> Config:
    """The configuration that ``tree`` with dotted changes describes; the command line, studies and tests call this.

    Raises:
        ConfigError: as ``load_config``.
    """
    merged = json.loads(json.dumps(tree))
    for key, value in changes:
        *sections, leaf = key.split(".")
        node = merged
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ConfigError(f"unknown key {key}: {section} is not a section{nearest(key, _known_keys())}")
        node[leaf] = value
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


def parse_override(text: str) -> tuple[str, Any]:
    """``a.b=value`` as a dotted key and its YAML value; raises ConfigError."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes key=value, got {text!r}; for example optimizer.lr=2e-4")
    try:
        return key.strip(), read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of --set {key.strip()} is not valid YAML: {value!r}") from error


def _known_keys() -> list[str]:
    return list(Config().flat())


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of a complaint about an unknown word: the choice that looks like it, or all of them."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    known = "" if len(choices) > 20 else f"; known: {', '.join(choices)}"
    return f"{'; did you mean ' + close[0] + '?' if close else ''}{known}"


def explain(error: ValidationError) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(key, _known_keys() if '.' in key else Config.model_fields)}"
    # A union reports every branch; the rule is what all of them allow.
    same = [e for e in error.errors() if e["loc"][:2] == first["loc"][:2]]
    key = ".".join(str(part) for part in first["loc"][:2])
    rules = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in same))
    return f"{key} must be {rules}, got {first['input']!r}"
