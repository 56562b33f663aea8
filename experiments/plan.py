"""What an experiment is: the settings of its YAML, and the training runs that follow from them."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import vmoe_command  # noqa: F401  before vmoe, which then waits with importing PyTorch
from vmoe.cli.inspect_routing import InspectConfig
from vmoe.evaluation.config import EvaluationConfig
from vmoe.training.config import CHANGEABLE, STEPS, Config, flat_settings, flatten, with_one_length
from vmoe.utils.config import ConfigError, find_config, read_config
from vmoe.utils.safe_yaml import parse_yaml

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "runs" / "experiments"
RESULTS = ROOT / "experiments" / "results"

# Settings that a result does not depend on: of a continued run, and where the data lie.
RESULTS_DEPEND = ("train.steps", "train.epochs", "train.keep_best", "train.patience", "data.val", "evaluate")
FREE = (*(key for key in CHANGEABLE if key not in RESULTS_DEPEND), "seed", "evaluate.examples")
# Settings that the launcher gives itself.
OURS = {"train": ("seed", "output_dir"), "evaluate": ("checkpoint", "output", "output_dir"), "nested": ()}
PATHS = ("path", "image_root", "class_names", "labels_file")
NOT_OF = ("base", "settings", "runs", "grid", "seeds", "evaluate", "draft")  # what an experiment with `of` lacks
MINUS = " - "  # in a metric that is the difference of two
WEIGHTS = ("model.pretrained", "train.distill.teacher")
DEFAULTS = flat_settings(Config(output_dir="", task="classification"))


# "command" (eval or inspect), its "arguments" without the checkpoint, the "digest" of what they say, and the run "with"
# which it is made, if any
Evaluation = dict[str, Any]


@dataclass
class PlotConfig:
    """The figure of an experiment.

    Attributes:
        x: A metric; if y has a "*", the name of what that stands for.
        y: A metric, or several; null: the first of `metrics`. With one "*", as in "capacity/top1_bpr_*" or
            "adv/top1_pgd_*/255", a line through all such metrics of a run, whose x is the number that "*" stands for.
        log: Whether x is logarithmic.
    """

    x: str = "gflops_per_image"
    y: list[str] | str | None = None
    log: bool = False


@dataclass
class Experiment:
    """An experiment, which compares training runs.

    Attributes:
        question: What it asks.
        base: Config of train.py, by its path in the checkout or its name; what all runs share.
        of: Instead of a base: another experiment, whose runs answer this question too, by its name. Everything but
            question, source, metrics, plot and baseline is there, also the evaluations and the records.
        only: With `of`: the runs to show, by their names, which may have * and ?.
        source: Papers that the question is from.
        settings: Settings of train.py for all runs, over those of base: `optim.lr: 1e-3`.
        runs: {name: settings of train.py for this run}, over the common ones. `{run: NAME}` as a value (or in a
            list) is the folder of a run above it, with the same seed, and if it has the same grid, the same point of
            it; `{run: NAME, file: FILE}` is a file in that. A run's own `grid` replaces the common one. `reseed: N` is
            added to its seeds: a second run of the same settings.
        grid: {setting: values}: each run is made with all combinations, and has them in its name.
        seeds: Each run is made with each of them.
        baseline: The run that others are compared with; of one with a grid, that at the same point of it.
        evaluate: {name: config of eval.py, or {config: NAME, runs: [NAMES], setting: value}}, for every finished run,
            or some (`runs` may have * and ?). Its metrics are called name/metric. Accuracy on data.val is always there.
            `with: {RUN: OTHER}` evaluates a run together with one above it, of the same seed, as one ensemble.
            {config: inspect} is vmoe-inspect: the mean over the layers of what statistics.json has of each.
        metrics: Metrics of the table, the first one for the verdict. Higher is better, except for losses and errors.
            "A - B" is the difference of two; as the first one, the verdict is whether it differs from 0.
        plot: The figure.
        draft: The records stay with the runs, and the report leaves the experiment out.
    """

    question: str
    base: str = ""
    of: str = ""
    only: list[str] = field(default_factory=lambda: ["*"])
    source: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    baseline: str | None = None
    evaluate: dict[str, Any] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=lambda: ["top1"])
    plot: PlotConfig = field(default_factory=PlotConfig)
    draft: bool = False

    def __post_init__(self) -> None:
        if not self.base and not self.of:
            raise ConfigError("base: name a config of train.py, or with `of` another experiment")

    @property
    def plotted(self) -> list[str]:
        """What the figure shows."""
        y = self.plot.y or self.metrics[0]
        return [y] if isinstance(y, str) else y


@dataclass(eq=False)
class Cell:
    """One training run of an experiment."""

    experiment: str
    run: str
    seed: int
    base: str
    overrides: dict[str, Any]  # settings of train.py over the base; {"run": NAME}, or a list of them, for runs' folders
    evaluations: dict[str, Evaluation]
    settings: dict[str, Any] = field(default_factory=dict)  # what its result depends on, except the seed
    needs: list[Cell] = field(default_factory=list)  # runs that are made before
    reseed: int = 0  # added to the seed

    @property
    def name(self) -> str:
        return f"{re.sub(r'[^a-zA-Z0-9.=+-]+', '_', self.run)}-seed{self.seed}"

    @property
    def references(self) -> dict[str, list[dict[str, str]]]:
        """{setting: the runs whose folders it is, or whose files}."""
        return {key: found for key, value in self.overrides.items() if (found := _referred(value))}

    def folder(self, output: Path) -> Path:
        return output / self.experiment / self.name

    def arguments(self, output: Path) -> list[str]:
        """The command line of train.py."""
        words = ["--config", self.base]
        folders = {one.run: one.folder(output) for one in self.needs}
        paths = {
            key: [str(Path(folders[one["run"]], one.get("file", ""))) for one in each]
            for key, each in self.references.items()
        }
        paths = {key: each if isinstance(self.overrides[key], list) else each[0] for key, each in paths.items()}
        for key, value in {**self.overrides, **paths, "seed": self.seed + self.reseed}.items():
            words += [f"--{key}", as_text(value)]
        return [*words, "--output_dir", str(self.folder(output))]

    def evaluations_in(self, output: Path) -> dict[str, Evaluation]:
        """The evaluations, with the folders of the runs that they are made with."""
        folders = {one.run: str(one.folder(output)) for one in self.needs}
        return {
            name: {**one, "with": folders[one["with"]]} if "with" in one else one
            for name, one in self.evaluations.items()
        }

    def command(self) -> str:
        """The command line as a user types it in the checkout."""
        return shlex.join(["python", "train.py", *self.arguments(OUTPUT.relative_to(ROOT))])


def as_text(value: Any) -> str:
    """A setting on the command line, which reads back as the same value."""
    return value if isinstance(value, str) and parse_yaml(value) == value else json.dumps(value)


def matches(pattern: str, *names: str) -> bool:
    """Whether a pattern with * and ? fits one of the names."""
    return any(fnmatchcase(name, pattern) for name in names)


def load(file: Path, has_runs: bool = False) -> tuple[Experiment, list[Cell]]:
    """An experiment and its runs, each after those that it needs; a ConfigError names the file and the mistake.

    With `has_runs` it must not have the runs of another one.
    """
    if not file.is_file():
        raise ConfigError(f"{file}: no such experiment; experiments/*.yaml are there to choose from")
    experiment = read_config(Experiment, ["--config", str(file)])
    try:
        if has_runs and experiment.of:
            raise ConfigError(f"it has the runs of {experiment.of}; write of: {experiment.of}")
        return _part(experiment, file) if experiment.of else (experiment, _plan(experiment, file.stem))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _part(experiment: Experiment, file: Path) -> tuple[Experiment, list[Cell]]:
    """Another question to the runs of an experiment."""
    _check_shown(experiment)
    plain = Experiment(experiment.question, of=experiment.of)
    if given := [key for key in NOT_OF if getattr(experiment, key) != getattr(plain, key)]:
        raise ConfigError(f"{given[0]}: it belongs in {experiment.of}.yaml, whose runs these are; leave it out here")
    whole, cells = load(file.with_name(f"{experiment.of}.yaml"), has_runs=True)
    runs = list(dict.fromkeys(cell.run for cell in cells))
    if unknown := [pattern for pattern in experiment.only if not any(matches(pattern, run) for run in runs)]:
        raise ConfigError(f"only: {unknown[0]!r} is none of the runs of {experiment.of}: {', '.join(runs)}")
    cells = [cell for cell in cells if any(matches(pattern, cell.run) for pattern in experiment.only)]
    _check_baseline(experiment, list(dict.fromkeys(cell.run for cell in cells)))
    return dataclasses.replace(experiment, draft=whole.draft), cells


def _check_baseline(experiment: Experiment, runs: Collection[str]) -> None:
    if experiment.baseline is not None and not any(baseline_of(run, experiment.baseline, runs) for run in runs):
        raise ConfigError(f"baseline {experiment.baseline!r} is none of the runs: {', '.join(runs)}")


def baseline_of(run: str, baseline: str | None, runs: Iterable[str]) -> str | None:
    """The run that another is compared with: the baseline, or that at the same point of the baseline's grid."""
    points = [name for name in runs if name.startswith(f"{baseline}, ") and run.endswith(name[len(f"{baseline}") :])]
    return baseline if baseline in runs else points[0] if points else None


def _check_shown(experiment: Experiment) -> None:
    """ConfigError: the table or the figure cannot be made so."""
    if not experiment.metrics:
        raise ConfigError("metrics must name at least one metric")
    if wrong := [metric for metric in experiment.metrics if ":" in metric]:
        raise ConfigError(
            f"metrics: {wrong[0]!r} is no metric; lower is better for losses and errors alone, leave ':' out"
        )
    if experiment.baseline is not None and MINUS in experiment.metrics[0]:
        raise ConfigError(f"baseline: {experiment.metrics[0]!r} is compared with 0; leave the baseline out")
    if {y.count("*") for y in experiment.plotted} not in ({0}, {1}):
        raise ConfigError(f"plot.y: all or none of {', '.join(experiment.plotted)} must have one '*'")


def _plan(experiment: Experiment, name: str) -> list[Cell]:
    _check_shown(experiment)
    if not experiment.seeds or len(set(experiment.seeds)) < len(experiment.seeds):
        raise ConfigError(f"seeds must be numbers, none twice, got {experiment.seeds}")
    try:
        base = str(_relative(find_config(experiment.base)))
    except ConfigError as error:
        raise ConfigError(str(error).replace("--config", "base", 1)) from None
    runs = _runs(experiment)
    evaluations = _evaluations(experiment, runs)
    _check_baseline(experiment, runs)
    cells = []
    for seed in experiment.seeds:
        made: dict[str, Cell] = {}
        for run, overrides in runs.items():
            own = dict(overrides)
            if type(reseed := own.pop("reseed", 0)) is not int:
                raise ConfigError(f"runs.{run}: reseed must be a whole number, got {reseed!r}")
            cell = Cell(name, run, seed, base, own, evaluations[run], reseed=reseed)
            others = [(key, one["run"]) for key, each in cell.references.items() for one in each]
            others += [(f"evaluate.{key}.with", one["with"]) for key, one in cell.evaluations.items() if "with" in one]
            for key, other in others:
                if other not in made:
                    raise ConfigError(f"runs.{run}: {key} is of run {other!r}, which is none of those above it")
                if made[other] not in cell.needs:
                    cell.needs.append(made[other])
            made[run] = cell
            cell.settings = _settings_of(cell)
        cells += made.values()
    folders = {cell.name: cell for cell in cells}
    if len(folders) < len(cells):
        [first, *_] = [cell for cell in cells if folders[cell.name] is not cell]
        raise ConfigError(f"runs {first.run!r} and {folders[first.name].run!r} would share a folder; rename one")
    return cells


def _relative(file: Path) -> Path:
    """A file's path in the checkout; elsewhere the whole path."""
    file = file.resolve()
    return file.relative_to(ROOT) if file.is_relative_to(ROOT) else file


def _evaluations(experiment: Experiment, runs: Iterable[str]) -> dict[str, dict[str, Evaluation]]:
    """{run: {name: evaluation}}; a ConfigError says which setting is wrong."""
    of_run: dict[str, dict[str, Evaluation]] = {run: {} for run in runs}
    for name, given in experiment.evaluate.items():
        given = {"config": given} if isinstance(given, str) else given
        try:
            if name == "val" or "/" in name:
                raise ConfigError("choose another name, without '/'; 'val' is the evaluation on data.val")
            if not isinstance(given, dict) or not isinstance(given.get("config"), str):
                raise ConfigError(f"write a config of eval.py, or {{config: NAME, setting: value}}, got {given!r}")
            patterns = given.get("runs", ["*"])
            listed = patterns if isinstance(patterns, list) else []
            chosen = [run for run in of_run if any(matches(str(pattern), run) for pattern in listed)]
            if not chosen:
                known = ", ".join(of_run)
                raise ConfigError(f"runs must be a list of names, with * and ?, among {known}; got {patterns}")
            partners = given.get("with", {})
            if not isinstance(partners, dict) or not partners.keys() <= set(chosen):
                raise ConfigError(f"with must be {{RUN: OTHER}} of runs that are evaluated, got {partners}")
            settings = _flat({key: value for key, value in given.items() if key not in ("runs", "with")}, "evaluate")
            of_run |= {run: of_run[run] | {name: _evaluation(settings, partners.get(run))} for run in chosen}
        except ConfigError as error:
            raise ConfigError(f"evaluate.{name}: {error}") from None
    return of_run


def _evaluation(given: dict[str, Any], partner: str | None = None) -> Evaluation:
    """An evaluation from its settings, together with another run if there is one; ConfigError: one of them is wrong."""
    if partner is not None:
        given = {**given, "ensemble": True}
    command, kind, plain = "eval", EvaluationConfig, EvaluationConfig(checkpoint="", task="classification")
    if given["config"] == "inspect":
        command, kind, plain = "inspect", InspectConfig, InspectConfig(checkpoint="")
        given = {key: value for key, value in given.items() if key != "config"}
    words = [word for key, value in given.items() for word in (f"--{key}", as_text(value))]
    checkpoint = "RUN" if partner is None else "[RUN, OTHER]"
    settings = flatten(dataclasses.asdict(read_config(kind, [*words, "--checkpoint", checkpoint], "eval")))
    defaults = flatten(dataclasses.asdict(plain))  # a setting that a later version adds changes nothing
    free = ("checkpoint", "output", "output_dir", "device", "loader.num_workers", "data.path", "train_data.path")
    free += ("ood_data.path",)
    matters = {key: value for key, value in settings.items() if defaults.get(key) != value and key not in free}
    together = {} if partner is None else {"with": partner}
    return {"command": command, "arguments": words, "digest": digest(matters | together), **together}


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _runs(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """{name: settings} of each run, with the grid in its name."""
    runs, suffixes = {}, {}
    for run, own in (experiment.runs or {"": {}}).items():
        own = {} if own is None else own
        if not isinstance(own, dict):
            raise ConfigError(f"runs.{run} must be settings of train.py, as in {{model.name: NAME}}, got {own!r}")
        grid = own.get("grid", experiment.grid)
        for key, values in grid.items() if isinstance(grid, dict) else [("", grid)]:
            if not isinstance(values, list) or not values:
                raise ConfigError(f"grid must be {{setting: [values]}}, got {values!r} for {key or run!r}")
        for point in itertools.product(*grid.values()):
            settings = dict(zip(grid, point))
            suffix = ", ".join(f"{key.rpartition('.')[2]}={as_text(value)}" for key, value in settings.items())
            name = ", ".join(filter(None, (run, suffix))) or "base"
            if name in runs:
                raise ConfigError(f"two runs are called {name!r}; rename one")
            runs[name] = _merged(experiment.settings, {key: own[key] for key in own if key != "grid"}, settings)
            suffixes[name] = suffix
    for name, settings in runs.items():
        for key, value in settings.items():
            if found := _referred(value):
                same = [{**one, "run": _at_point(one["run"], suffixes[name], runs)} for one in found]
                settings[key] = same if isinstance(value, list) else same[0]
    return runs


def _at_point(run: str, suffix: str, runs: Collection[str]) -> str:
    """The run's name at a point of the grid, if it has none without."""
    return run if run in runs or f"{run}, {suffix}" not in runs else f"{run}, {suffix}"


def _is_reference(value: Any) -> bool:
    """Whether a value is {"run": NAME}, or {"run": NAME, "file": FILE}."""
    return isinstance(value, dict) and value.keys() in ({"run"}, {"run", "file"})


def _referred(value: Any) -> list[dict[str, str]]:
    """The value in a list, or the list, if it is made of {"run": NAME} and {"run": NAME, "file": FILE}."""
    values = value if isinstance(value, list) else [value]
    return values if all(map(_is_reference, values)) else []


def _merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """One mapping of dotted names, in which a mapping of a later part leaves what it does not name."""
    merged: dict[str, Any] = {}
    for key, value in (pair for part in parts for pair in _flat(part).items()):
        merged.pop(key, None)  # on the command line the later word counts
        merged[key] = value
    return merged


def _flat(settings: dict[str, Any], kind: str = "train") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty mapping stays, which clears what the base has there."""
    flat = {}
    for key, value in settings.items():
        if key in OURS[kind]:
            raise ConfigError(f"{key} is set by the launcher; leave it out{' (seeds has the seeds)' * (key == 'seed')}")
        if isinstance(value, dict) and value and not _is_reference(value):
            flat |= {f"{key}.{name}": one for name, one in _flat(value, "nested").items()}
        else:
            flat[key] = value
    return flat


def _settings_of(cell: Cell) -> dict[str, Any]:
    """What the result of a cell depends on, except the seed, and that its settings are right (else a ConfigError)."""
    try:
        config = read_config(Config, with_one_length(cell.arguments(OUTPUT)))
        config.check()
        if config.train.precision == "auto":
            raise ConfigError("train.precision is auto, which depends on the machine; set it in `settings`")
    except ConfigError as error:
        raise ConfigError(f"run {cell.run!r}: {error}") from None
    settings = result_settings(config)
    digests = {parent.run: digest(parent.settings) for parent in cell.needs}
    if cell.reseed:
        settings["reseed"] = cell.reseed
    for key, each in cell.references.items():
        named = (f"run {one['run']} ({digests[one['run']]}) {one.get('file', '')}".rstrip() for one in each)
        settings[key] = ", ".join(named)
    return settings


def weights_files(settings: dict[str, Any]) -> dict[str, str]:
    """{setting: file or folder} of the weights that are not given by a public name."""
    given = {key: settings[key] for key in WEIGHTS if settings.get(key)}
    return {
        key: value
        for key, value in given.items()
        if value.startswith("local-dir:") or (value[:7] != "hf-hub:" and ("/" in value or (ROOT / value).exists()))
    }


def result_settings(config: Config) -> dict[str, Any]:
    """{setting: value} of a config that a result depends on, without defaults, seed, and paths of data and weights."""
    settings = flat_settings(config)
    settings |= dict.fromkeys(weights_files(settings), "weights of a file")
    if config.train.epochs is not None or config.train.steps == STEPS:  # the config.yaml of a run always has steps
        settings.pop("train.steps")
    return {
        key: value
        for key, value in settings.items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE)
        and not (key.startswith("data.") and key.rpartition(".")[2] in PATHS)
        and (key not in DEFAULTS or DEFAULTS[key] != value or key == "task")
    }
