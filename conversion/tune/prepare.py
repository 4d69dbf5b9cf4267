# SPDX-License-Identifier: Apache-2.0
"""What a recovery needs, found and checked before any training.

Shape suffixes: W windows, L tokens of one window.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path

import accelerate
import torch
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cmoe_hf import CMoEConfig

from ..carve.settings import MAX_SHARD_SIZE, absolute, shard_bytes
from ..device import DTYPES, find_device, versions
from ..embedded import MODEL
from ..errors import CMoEError, RequestError, check_at_least, check_known
from ..folder.auxiliary_files import AuxiliaryFiles, read_auxiliary_files
from ..folder.fingerprint import conversion_record
from ..folder.paths import resolved
from ..folder.unfinished import sha256_of
from ..measure.evaluate import check_same_vocabulary
from ..options import LoadOptions
from ..source.calibration import consecutive_windows, random_windows, read_tokens
from ..source.hub import fetch_model, load_tokenizer
from ..source.loading import load_config, load_model, model_folder, window_length
from ..source.stored import read_headers, read_json, read_tensors
from ..source.texts import OWN, Portion, absolute_text, open_text, text_file
from .distil import TrainingPlan, plan_training
from .settings import WINDOW, Tuning
from .tuning import check_sharding

LEAST_TEXT = 0.25
"""Of the tokens that the windows take, what the text must have: they may overlap."""


@dataclass(frozen=True)
class RecoverOptions(LoadOptions):
    """The options of `recover`; all of them are frozen until the recovery ends."""

    model: str | Path
    """Folder or Hub id of a carved model."""
    output: str | Path
    """Folder to create."""
    _: KW_ONLY
    training: list[str] | str | Path | None = None
    """Text to learn from: file, wikitext2, c4 or a Hub data set (their training parts), or own:
    what the teacher writes. Repeatable; TEXT:500k is so many tokens of it. Default own
    (next-token: wikitext2)."""
    text: list[str] | str | Path | None = None
    """Text to measure on (its test part), repeatable; never a training text. Default wikitext2."""
    windows: int | None = None
    """Measure on the first windows of each text only."""
    teacher: str | Path | None = None
    """The dense model to learn from; default the one that was carved, if it is found."""
    dtype: str | None = None
    """float32 or bfloat16; default the checkpoint's precision, bfloat16 for float16."""
    max_shard_size: str | int = MAX_SHARD_SIZE
    """Maximum size of a weights file, for example 500MB or 2GiB."""
    tuning: Tuning | None = None
    """How to tune; default distillation."""
    overwrite: bool = False
    """Replace an existing model or unfinished recovery at `output`."""

    def __post_init__(self) -> None:
        """Make paths absolute: a recovery can be resumed from anywhere."""
        object.__setattr__(self, "output", str(resolved(self.output)))
        for name in ("model", "teacher"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, absolute(value))
        tuning = self.tuning or Tuning()
        usual = [OWN] if tuning.distils else ["wikitext2"]
        training = [Portion.of(it).absolute for it in listed(self.training) or usual]
        text = [absolute_text(it) for it in listed(self.text) or ["wikitext2"]]
        for name, value in (("tuning", tuning), ("training", training), ("text", text)):
            object.__setattr__(self, name, value)


def shares(portions: Sequence[Portion], samples: int, length: int) -> list[int]:
    """Return the windows of each text: as many as it says, or an equal share of `samples`."""
    unsaid = sum(portion.tokens is None for portion in portions)
    each = -(-samples // unsaid) if unsaid else 0
    return [each if it.tokens is None else max(1, it.tokens // length) for it in portions]


def listed(sources: list[str] | str | Path | None) -> list[str | Path]:
    """Return one or several sources as a list."""
    if isinstance(sources, list | tuple):
        return [*sources]
    return [] if sources is None else [sources]


@dataclass(frozen=True)
class Prepared:
    """What a recovery needs, found and checked."""

    options: RecoverOptions
    tuning: Tuning
    folder: Path
    """Of the carved model."""
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    auxiliary: AuxiliaryFiles
    """What the recovered model takes over from the carved one as it is."""
    text_tokens: int
    """Of the whole training text; the windows may take some of them several times."""
    training_WL: torch.Tensor
    """Of all texts but the teacher's own."""
    tests: list[torch.Tensor]
    """Windows (W, L) of each text to measure on."""
    own_windows: int
    """How many the teacher writes."""
    plan: TrainingPlan

    @property
    def read(self) -> dict[str, str | Path | None]:
        """Return what is read from this machine, by what to call it."""
        found: dict[str, str | Path | None] = {"the carved model": self.folder}
        for name, sources in (
            ("the training text", [Portion.of(it).text for it in listed(self.options.training)]),
            ("the text to measure on", listed(self.options.text)),
        ):
            for number, source in enumerate(sources):
                found[name + f" {number + 1}" * bool(number)] = text_file(source)
        return found | {"the teacher": self.options.teacher}

    def load(self, model: str | Path) -> PreTrainedModel:
        """Return a model as this recovery runs it."""
        trusted, dtype = self.options.trust_remote_code, self.options.dtype
        return load_model(model, dtype, self.device, trusted)[0]

    @property
    def windows(self) -> int:
        """Return the number of training windows."""
        return len(self.training_WL) + self.own_windows


Texts = tuple[int, torch.Tensor, list[torch.Tensor]]
"""Tokens of the training texts, the windows to train on, and those of each text to measure on."""


def prepare(options: RecoverOptions, kept: Texts | None = None) -> Prepared:
    """Check all but the weights, and read the texts unless `kept`. Raises `RequestError`."""
    check_sharding()
    check_known("dtype", options.dtype, DTYPES)
    shard_bytes(options.max_shard_size)
    if options.dtype == "float16":
        raise RequestError("float16 overflows in training: choose bfloat16 or float32.")
    tuning = options.tuning or Tuning()
    if not tuning.distils and options.teacher is not None:
        raise RequestError("--objective next-token has no teacher: leave out --teacher.")
    check_at_least(1, windows=options.windows)
    state = accelerate.PartialState(cpu=options.device == "cpu" or on_cpus())
    tuning.split(state.num_processes)
    device = state.device if state.num_processes > 1 else find_device(options.device)
    portions = [Portion.of(it) for it in listed(options.training)]
    texts = listed(options.text)
    if {text_file(it.text) for it in portions} & {text_file(it) for it in texts} - {None}:
        raise RequestError(
            "the text to measure on is the text to train on: its perplexity would say nothing. "
            "Give another --text."
        )
    if not tuning.distils and any(portion.text == OWN for portion in portions):
        raise RequestError("--training own is written by a teacher: --objective next-token has no.")
    folder, trusted = model_folder(options.model)[0], options.trust_remote_code
    config = load_config(folder, trusted)
    if not isinstance(config, CMoEConfig):
        raise RequestError(
            f"{folder.name} is a {config.model_type} model, not a carved one: `cmoe convert` it "
            "first."
        )
    if options.dtype is None and config.dtype == torch.float16:
        options = replace(options, dtype="bfloat16")
    tokenizer = load_tokenizer(folder, trust_remote_code=trusted)
    if tuning.distils:
        options = replace(options, teacher=options.teacher or find_teacher(folder))
    configs: list[PreTrainedConfig] = [config]
    if options.teacher is not None:
        configs.append(load_config(options.teacher, trusted))
        theirs = load_tokenizer(model_folder(options.teacher)[0], trust_remote_code=trusted)
        check_same_vocabulary(options.teacher, theirs, tokenizer)
    usual = WINDOW[tuning.objective]
    length = window_length(config, tuning.sequence_length, *configs[1:], usual=usual)
    counts = shares(portions, tuning.samples, length)
    if kept is None:
        vocabulary = min(it.vocab_size for it in configs)
        total, drawn = 0, [torch.empty(0, length, dtype=torch.int64)]
        for portion, count in zip(portions, counts, strict=True):
            if portion.text != OWN:
                ids = read_tokens(open_text(portion.text), tokenizer, vocabulary).ids
                draw = partial(random_windows, length=length, seed=tuning.seed, least=LEAST_TEXT)
                drawn.append(draw(ids, samples=count))
                total += len(ids)
        tests = []
        for text in texts:
            ids = read_tokens(open_text(text, part="test"), tokenizer, vocabulary).ids
            tests.append(consecutive_windows(ids, length=length)[: options.windows])
        kept = (total, torch.cat(drawn), tests)
    teacher = configs[1] if len(configs) > 1 else None
    planned = plan_training(config, teacher, tuning, options.dtype, device, length)
    size = size_of_experts(folder) if tuning.learning_rate is None else 0.0
    tuning = planned.tuning.with_rates(size)
    return Prepared(
        options=replace(options, tuning=tuning),
        tuning=tuning,
        folder=folder,
        device=device,
        tokenizer=tokenizer,
        auxiliary=read_auxiliary_files(folder),
        text_tokens=kept[0],
        training_WL=kept[1],
        tests=kept[2],
        own_windows=sum(n for it, n in zip(portions, counts, strict=True) if it.text == OWN),
        plan=planned,
    )


def size_of_experts(folder: Path) -> float:
    """Return the smallest root mean square of a tensor of the experts' weights that is not zero."""
    names = re.compile(r".*experts?\b.*(?<!bias)")
    stored = {name: it for name, it in read_headers(folder).items() if names.fullmatch(name)}
    weights = (it.float() for _, it in read_tensors(stored) if it.dim() > 1 and it.any())
    return min(float(weight.square().mean().sqrt()) for weight in weights)


def find_teacher(folder: Path) -> str:
    """Return the dense model that a folder was carved from, beside it, here or on the Hub.

    Raises `RequestError` if it cannot be found.
    """
    source = conversion_record(folder).get("source") or {}
    name, revision = source.get("name"), source.get("revision")
    for place in (folder.absolute().parent, Path.cwd(), MODEL.parent):
        config = place / str(name) / "config.json"
        if name and config.is_file() and "cmoe_" not in str(read_json(config).get("model_type")):
            return str(config.parent)
    reason = "its conversion.json does not say where it is" if name else "nothing names it"
    if name and revision is not None:
        try:
            return str(fetch_model(name, revision))
        except CMoEError as error:
            reason = str(error).rstrip(".")
    raise RequestError(
        f"the dense model {name or ''} that {folder.name} was carved from cannot be found "
        f"({reason}): name it with --teacher."
    )


def on_cpus() -> bool:
    """Return whether processes compute on CPUs: accelerate would take each for the only one."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def determinants(prepared: Prepared) -> dict[str, str]:
    """Return what besides the options determines the result, under names that people understand."""
    weights = "".join(sha256_of(path) for path in sorted(prepared.folder.glob("*.safetensors")))
    windows = b"".join(it.numpy().tobytes() for it in (prepared.training_WL, *prepared.tests))
    return {
        **{f"version_of_{name}": version for name, version in versions().items()},
        "device": prepared.device.type,
        "model": hashlib.sha256(weights.encode()).hexdigest(),
        "texts": hashlib.sha256(windows).hexdigest(),
    }
