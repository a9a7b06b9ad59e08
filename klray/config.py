"""A run's configuration: strict models, presets, and the one function that overrides them."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PositiveInt,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)

from klray import registry
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


def _lower(name: str) -> str:
    """Names of klray's own are in lower case; an entry of the user's, module:attribute, or a file is not."""
    return name if ":" in name or "/" in name or "." in name else name.lower()


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _tuples(cls, values: Any) -> Any:
        """YAML and JSON know lists alone."""
        if not isinstance(values, dict):
            return values
        pairs = {key for key, field in cls.model_fields.items() if get_origin(field.annotation) is tuple}
        return {
            key: tuple(value) if key in pairs and isinstance(value, list) else value for key, value in values.items()
        }


class OpenSection(_Section):
    """A section some of whose keys name entries of a registry; the settings of those entries are keys beside them."""

    SECTION: ClassVar[str]
    SETS: ClassVar[dict[str, str]]  # key -> the set that its entry is of
    entries: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _with_its_entries(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if cls.entries or not isinstance(values, dict):
            return handler(values)
        defaults = {key: cls.model_fields[key].default for key in cls.SETS}
        chosen = tuple(_lower(str({**defaults, **values}[key])) for key in cls.SETS)
        model = _of_entries(cls, chosen)
        for key in values.keys() - model.model_fields.keys():
            known = [f"{cls.SECTION}.{field}" for field in model.model_fields]
            raise ConfigError(f"unknown key {cls.SECTION}.{key}{nearest(f'{cls.SECTION}.{key}', known)}")
        return model.model_validate({**values, **dict(zip(cls.SETS, chosen, strict=True))})  # type: ignore[return-value]

    def settings(self, key: str) -> dict[str, Any]:
        """Those of the entry that ``key`` names: keyword arguments for it."""
        fields = registry.settings_of(self.SETS[key], getattr(self, key)).model_fields
        return {name: getattr(self, name) for name in fields}

    def __reduce__(self) -> tuple[Any, ...]:
        section: Any = type(self).mro()[1]
        return section.model_validate, (self.model_dump(),)


@functools.cache
def _of_entries(section: type[OpenSection], chosen: tuple[str, ...]) -> type[OpenSection]:
    """The section with the settings of these entries."""
    fields: dict[str, Any] = {}
    for (key, kind), name in zip(section.SETS.items(), chosen, strict=True):
        try:
            registry.entry(kind, name, f"{section.SECTION}.{key}")
            own = registry.settings_of(kind, name).model_fields
        except registry.RegistryError as error:
            raise ConfigError(str(error)) from error
        for field, info in own.items():
            if field in fields or field in section.model_fields:
                raise ConfigError(f"{section.SECTION}.{key} {name}: its setting {field} is a key already; rename it")
            fields[field] = (info.annotation, info)
    model = create_model(section.__name__, __base__=section, **fields)
    model.entries = chosen
    return model


class Data(OpenSection):
    SECTION = "data"
    SETS = {"name": "data source", "encoder": "encoder"}

    name: str = "digits"  # digits, mnist, cifar10, celeba, folder, zip
    encoder: str = "pixels"  # between the images and what is diffused
    image_size: PositiveInt = 8  # height and width in pixels that images are brought to
    channels: PositiveInt = 1  # 1 for grey, 3 for RGB
    resize: Literal["bilinear", "pad"] = "bilinear"  # scale the central square, or put zeros round smaller images
    flip: bool = False  # random horizontal flips, drawn on the device
    limit: PositiveInt | None = None  # keep only so many training images
    held_out: PositiveInt | None = None  # images never trained on; null: the set's own split, else 5 %, at most 5000


class Process(OpenSection):
    SECTION = "process"
    SETS = {"kind": "process", "schedule": "schedule", "basis": "basis"}

    num_terms: int = Field(default=8, ge=0, le=1024)  # M; 0 is the baseline: the schedule's own noise
    kind: str = "kl"  # or vp_ensemble, vp_truncated: control arms of a comparison
    schedule: str = "vp_linear"  # or vp_cosine, edm
    basis: str = "sine"  # or cosine, haar, kl_lam
    marginal: Literal["matched", "truncated", "paper"] = "matched"  # what is done about the noise that M terms lack
    time_grid: Literal["continuous"] | PositiveInt = "continuous"  # or N: training times uniform on n/N


class Loss(OpenSection):
    SECTION = "loss"
    SETS = {"prediction": "parametrisation"}

    coupling: Literal["joint", "separable"] = "joint"  # the square of the summed errors, or the sum of their squares
    partial_terms: PositiveInt | None = None  # K <= M; null: all terms
    prediction: str = "term"  # or coefficient, share, v, x0, edm: what the network's output is
    term_chunk: PositiveInt | None = None  # terms evaluated at once; null: all that the rank has


class Network(OpenSection):
    SECTION = "network"
    SETS = {"kind": "backbone"}

    kind: str = "unet"  # or mlp
    architecture: Literal["repeated", "wide"] = "repeated"  # one evaluation for each term, or one for all
    term_input: Literal["class_embedding", "time_offset"] = "class_embedding"  # how it is told the term; for repeated
    init_from: str | None = None  # a baseline's checkpoint


class Optimizer(OpenSection):
    SECTION = "optimizer"
    SETS = {"kind": "optimizer", "rate": "rate schedule"}

    kind: str = "adamw"  # or muon
    rate: str = "constant"  # after the warm-up; or cosine, wsd
    lr: float = Field(default=1e-3, gt=0)  # the learning rate after the warm-up
    warmup_images: int = Field(default=0, ge=0)  # images over which the rate rises linearly from 0
    clip_norm: float | None = Field(default=1.0, gt=0)  # the gradient's largest norm; null: no clipping
    batch_size: PositiveInt = 64  # over all workers
    micro_batch: PositiveInt | None = None  # images of one forward pass on one worker; null: all it has
    max_nonfinite: PositiveInt = 20  # consecutive steps with a non-finite gradient before the run stops


OPEN_SECTIONS: tuple[type[OpenSection], ...] = (Data, Process, Loss, Network, Optimizer)


class Ema(_Section):
    decay: float = Field(default=0.999, ge=0, lt=1)  # of the average of the weights that sampling and validation use
    every: PositiveInt = 1  # optimiser steps between updates
    warmup: bool = True  # decay at most (1 + n)/(10 + n) at update n


class Precision(_Section):
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # auto: bf16 on GPUs that have it, else off
    compile: bool = False  # torch.compile, instead of the fused kernels
    channels_last: bool = False  # the memory layout of the network
    fused: Literal["auto", "on", "off"] = "auto"  # the U-Net in few kernels; auto: on GPUs, unless compile is set
    cuda_graph: Literal["auto", "off"] = "auto"  # the whole step as one launch; auto: on one GPU


class Mesh(_Section):
    data: PositiveInt | None = None  # null: the workers that the basis axis leaves
    basis: PositiveInt | Literal["auto"] = 1  # workers that share an image's terms; auto: as many as the terms fill
    backend: Literal["auto", "nccl", "gloo"] = "auto"  # of the sums; auto: nccl where each worker has a GPU of its own


class Budget(_Section):
    unit: Literal["images", "network_evals", "seconds", "steps"] = "images"  # what training is counted in
    amount: float = Field(default=100_000, gt=0)  # how many; a larger one continues the run


class Validation(_Section):
    every_images: PositiveInt = 20_000  # training images between two validations
    images: PositiveInt = 256  # of the held-out ones, the first so many
    time_bins: PositiveInt = 10  # of val/loss over t; 1: val/loss alone
    batch_size: PositiveInt = 256  # images that go through the network at once


class Checkpoint(_Section):
    every_images: PositiveInt = 50_000  # training images between two checkpoints
    keep: PositiveInt = 2  # the newest so many; older ones are removed


MOST_STEPS = 10_000  # of a solver


class Sampling(_Section):
    solver: Annotated[str, AfterValidator(_lower)] = "ddim"  # a solver
    num_steps: int = Field(default=20, gt=0, le=MOST_STEPS)  # N, intervals of the time grid
    nfe: int | None = Field(
        default=None, gt=0, le=MOST_STEPS
    )  # instead of num_steps: score evaluations an image, spent as the solver does
    timesteps: Annotated[str, AfterValidator(_lower)] = "logsnr"  # a time grid
    options: dict[
        str, bool | int | float | str
    ] = {}  # of the solver: variant, third_order, lower_order_final, eta, ...
    final: Literal["denoise", "keep"] = "denoise"  # of the noise that is left at the end of the grid
    clip_x0: bool = True  # clamp the estimated image to [-1, 1]
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto"  # of the network; auto: bf16 on GPUs that have it, else off
    channels_last: bool = False  # the memory layout of the network
    term_chunk: PositiveInt | None = None  # terms evaluated at once; null: as many as make 512 rows of the network
    every_images: PositiveInt = 50_000  # training images between two previews
    images: int = Field(default=64, gt=0, le=10_000)  # of a preview
    batch_size: int = Field(default=64, gt=0, le=MOST_IN_BATCH)  # images of a preview that are drawn at once


class Evaluation(_Section):
    """Scores during training, by sampling.*, in another process of low priority: training does not wait for them."""

    every_images: int = Field(default=0, ge=0)  # 0: none
    num_samples: int = Field(default=1000, ge=2, le=MOST_IMAGES)  # images drawn for a score
    metrics: list[str] = ["kid"]  # of fid, kid, is, pr
    features: str | None = None  # null: inception if its weights can be had, else efficientnet_lite0
    inception_weights: str | None = None  # torch-fidelity's weights file; null: downloaded
    reference: Literal["train", "held_out"] = "train"  # the real images that are compared with
    batch_size: int = Field(default=64, gt=0, le=MOST_IN_BATCH)  # images drawn at once
    device: Literal["auto", "cpu"] = "auto"  # auto: the GPU that trains, where there is one
    workers: PositiveInt = 1  # more than one: on Ray, beside those that train


class Tracking(_Section):
    uri: str | None = None  # null: sqlite:///mlflow.db in the working folder; "off": no MLflow
    experiment: str = "klray"  # MLflow experiment
    every_steps: PositiveInt = 50  # steps between two reports; several workers agree on a checkpoint at one of them


class Config(_Section):
    """Everything that defines a run. ``preset`` is the name that the run is called after."""

    preset: str = "custom"  # what the run is named after; a preset or file sets it
    seed: int = Field(default=0, ge=0)  # of the weights, images, noises and times
    data: SerializeAsAny[Data] = Field(default_factory=lambda: Data.model_validate({}))
    process: SerializeAsAny[Process] = Field(default_factory=lambda: Process.model_validate({}))
    loss: SerializeAsAny[Loss] = Field(default_factory=lambda: Loss.model_validate({}))
    network: SerializeAsAny[Network] = Field(default_factory=lambda: Network.model_validate({}))
    optimizer: SerializeAsAny[Optimizer] = Field(default_factory=lambda: Optimizer.model_validate({}))
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
        one = self.process.num_terms == 0 or getattr(registry.entry("process", self.process.kind), "one_term", False)
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
        if terms > 0 and not hasattr(registry.entry("schedule", process.schedule), "beta"):
            raise ConfigError(
                f"process.schedule {process.schedule} is not variance preserving, so it has no KL terms: "
                f"process.num_terms must be 0, got {terms}"
            )
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
        if self.optimizer.rate != "constant" and self.budget.unit == "seconds":
            raise ConfigError(
                f"optimizer.rate {self.optimizer.rate} needs a budget that is the same each time, got budget.unit "
                "seconds; use images, network_evals or steps"
            )
        rest = {"num_terms": terms, "partial_terms": partial, "coupling": loss.coupling}
        rest |= {"image_size": self.data.image_size}
        for section in (self.data, process, loss, network, self.optimizer):
            for key, kind in section.SETS.items():
                try:
                    registry.check(kind, getattr(section, key), **rest, **section.settings(key))
                except ValueError as error:
                    raise ConfigError(str(error)) from error
        return self

    def defining(self) -> dict[str, Any]:
        """What makes two runs the same run: all but the budget's size, the mesh, what only makes it faster, and where
        and how often to report."""
        full = self.model_dump(mode="json")
        for section in ("mesh", "tracking", "checkpoint", "evaluation"):
            del full[section]
        for speed in ("fused", "cuda_graph"):
            del full["precision"][speed]
        if self.optimizer.rate == "constant":  # another rate schedule is laid out over the whole budget
            del full["budget"]["amount"]
        return full

    def default_name(self) -> str:
        """preset + hash of what makes the run."""
        digest = hashlib.sha256(json.dumps(self.defining(), sort_keys=True).encode()).hexdigest()
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
    changes = list(changes)
    leave_entries(merged, dict(changes))
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


def leave_entries(tree: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Where ``changes`` choose another entry, the settings of the one before are left behind."""
    for section in OPEN_SECTIONS:
        values = tree.get(section.SECTION)
        for key, kind in section.SETS.items():
            chosen = changes.get(f"{section.SECTION}.{key}")
            if not isinstance(values, dict) or not isinstance(chosen, str):
                continue
            before = values.get(key, section.model_fields[key].default)
            if chosen != before and before in registry.names(kind):
                for setting in registry.settings_of(kind, before).model_fields:
                    values.pop(setting, None)


def saved_config(tree: Mapping[str, Any]) -> Config:
    """The configuration of a run that was kept, by this version or an older one; raises ConfigError.

    Version 0.1 kept the settings of the U-Net and of the MLP, and of every data source, whichever was used.
    """
    kept = json.loads(json.dumps(tree))
    for section in (Data, Network):
        values = kept.get(section.SECTION)
        if not isinstance(values, dict):
            continue
        for key, kind in section.SETS.items():
            chosen = values.get(key, section.model_fields[key].default)
            own = registry.settings_of(kind, chosen).model_fields
            for other in registry.names(kind):
                for setting in registry.settings_of(kind, other).model_fields.keys() - own:
                    values.pop(setting, None)
    return override(kept, [])


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
    if first["type"] == "missing":
        return f"{key} must be given; set {key}=..."
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}{nearest(key, _known_keys() if '.' in key else Config.model_fields)}"
    # A union reports every branch; the rule is what all of them allow.
    same = [e for e in error.errors() if e["loc"][:2] == first["loc"][:2]]
    key = ".".join(str(part) for part in first["loc"][:2])
    rules = " or ".join(dict.fromkeys(e["msg"].removeprefix("Input should be ") for e in same))
    return f"{key} must be {rules}, got {first['input']!r}"
