"""The command line: LightningCLI over the module and the data module. The others are in `commands`, `caching`, ...

What a run leaves behind lies in one folder, ``trainer.default_root_dir``: checkpoints/, tensorboard/, metrics.csv,
config.yaml, predictions.jsonl, predictions.png, report.html, model/. A new run never overwrites an older one: it is
renamed first.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeFloat
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ModelSummary
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from PIL import Image

from mmprefix import __version__, adapters, caching
from mmprefix.commands import COMMANDS, estimate_command, scaling_command
from mmprefix.data.datamodule import ShardDataModule
from mmprefix.doctor import doctor_command
from mmprefix.errors import InputError, SaidElsewhereError, UnreadableError, out_of_memory, printable
from mmprefix.evaluation.report import PredictionReport
from mmprefix.files import replacing, set_aside
from mmprefix.inspection import inspect_command
from mmprefix.training.agreement import Agreement
from mmprefix.training.callbacks import (
    BadSampleReport,
    ProgressBar,
    ResumableCSVLogger,
    Throughput,
    drop_rows_after,
)
from mmprefix.training.checkpoints import (
    BEST_FILE,
    FOLDER,
    best_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    remove_leftovers,
    set_aside_newer,
)
from mmprefix.training.fsdp import STRATEGY_NAME, FullyShardedStrategy
from mmprefix.training.module import MMPrefixModule
from mmprefix.training.preemption import Preempted, Preemption
from mmprefix.training.saving import AtomicCheckpointIO, CheckpointArgs
from mmprefix.training.watchdog import Watchdog, lost_process

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


_WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping",
    "list": "a list", "NoneType": "null", "NonNegativeInt": "a whole number of at least 0",
    "PositiveInt": "a whole number of at least 1", "NonNegativeFloat": "a number of at least 0",
    "PositiveFloat": "a number above 0",
}  # fmt: skip
_TYPE = re.compile(
    r"<class '(?:[\w.]+\.)?(?P<name>\w+)'>|(?:typing\.)?Literal\[(?P<choices>[^]]*)\]|(?P<of>dict|list)(?:\[[^\[\]]*\])?"
)
_WRONG_VALUE = (
    re.compile(r'Parser key "(?P<key>[\w.]+)": Expected an? (?P<types>.+?)\. Got value: (?P<value>.*)'),
    re.compile(
        r'Parser key "(?P<key>[\w.]+)": Does not validate against any of the Union subtypes Subtypes: '
        r"\[(?P<types>.+?)\] Errors: .*? Given value type: .*? Given value: (?P<value>.*)"
    ),
    re.compile(r'Parser key "(?P<key>[\w.]+)": Not of type (?P<word>\w+): (?P<value>.*) does not conform to .*'),
)


def _plain(text: str) -> str:
    """The parser's message about a value of the wrong type, without Python's names; any other as it is."""
    for pattern in _WRONG_VALUE:
        if (found := pattern.fullmatch(text)) is None:
            continue
        parts = found.groupdict()
        words: list[str] = []
        if "word" in parts:
            kinds, rest = [parts["word"]], ""
        else:
            kinds, rest = [], _TYPE.sub("", parts["types"])
            for match in _TYPE.finditer(parts["types"]):
                if match["choices"] is not None:
                    words += re.findall(r"[\w.+-]+", match["choices"])
                else:
                    kinds.append(match["name"] or match["of"])
        value = {"None": "null", "True": "true", "False": "false"}.get(parts["value"], parts["value"])
        # In a list or mapping, it is what it holds that is wrong.
        inside = ("list" in kinds and value.startswith("[")) or ("dict" in kinds and value.startswith("{"))
        if rest.strip(" ,") or inside or not set(kinds) <= _WORDS.keys():
            return text
        # null last, each once: of one setting, `16` may be a number and a text.
        words += [_WORDS[kind] for kind in sorted(kinds, key=lambda kind: kind == "NoneType")]
        *first, last = dict.fromkeys(words)
        expected = f"{', '.join(first)} or {last}" if first else last
        return f"{parts['key']}: expected {expected}, got {value}"
    return text


def _in_config(value: Any) -> str:
    """As a config file has it."""
    return json.dumps(value, default=str)


class OneLineParser(LightningArgumentParser):
    """Errors in one line, with the nearest valid key, in place of the usage of 200 options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # `--trainer.max_epoch` must not quietly become another option that begins like it.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Prints ``error: ...`` and exits with status 2."""
        text = _plain(" ".join(str(message).split()))
        unknown = re.search(
            r"unrecognized arguments: -*([\w.]+)|does not accept (?:option|nested key) '([\w.]+)'", text
        )
        if unknown is not None:
            key = unknown.group(1) or unknown.group(2)
            close = get_close_matches(key, self._known_keys(), n=1, cutoff=0.5)
            text += f"; did you mean {close[0]}?" if close else ""
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT)

    def _known_keys(self) -> list[str]:
        keys = {action.dest for action in self._actions}
        for action in self._actions:
            if isinstance(action.choices, dict):  # subcommands
                for parser in action.choices.values():
                    keys |= {inner.dest for inner in parser._actions}
        return sorted(keys)


def _refuse_untyped(parser: LightningArgumentParser, settings: Namespace) -> None:
    """Ends with one line for what the parser takes for every type: null, and anything in place of a group of settings."""
    actions = [action for action in parser._actions if not action.dest.endswith(".help")]
    groups = {action.dest[:end] for action in actions for end, sign in enumerate(action.dest) if sign == "."}
    for group in sorted(groups):
        if group in settings and not isinstance(settings[group], Namespace):
            parser.error(f"{group}: expected a mapping, got {_in_config(settings[group])}")
    for action in actions:
        takes_null = action.default is None or type(None) in get_args(getattr(action, "_typehint", None))
        # Of Lightning's, some mean something by null.
        if (
            not takes_null
            and not action.dest.startswith("trainer.")
            and action.dest in settings
            and settings[action.dest] is None
        ):
            default = _in_config(action.default)
            parser.error(f"{action.dest}: expected a value, got null; without the line it is {default}, the default")


@dataclass(frozen=True)
class _Room:
    """What was done for a new run's folder.

    Attributes:
        folder: the new run's.
        inode: of the folder: another run may begin in its place.
        is_new: whether it was made for the run.
        kept: where the run is now that was there before.
    """

    folder: Path
    inode: int
    is_new: bool
    kept: Path | None

    def give_back(self) -> None:
        """Undoes it, unless there is more in the folder than what is made before training, or it is another's."""
        try:
            if self.folder.stat().st_ino != self.inode:
                return
            made = {path.name: path for path in self.folder.iterdir()}
            if not made.keys() <= {"config.yaml", "tensorboard"}:
                return
            for path in made.values():
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            if self.is_new:
                self.folder.rmdir()
            if self.kept is not None:
                self.kept.rename(self.folder)
                print(f"{self.folder} holds the earlier run again", flush=True)
        except OSError as error:  # of less interest than why the run failed
            where = f"; the earlier run is {self.kept}" if self.kept is not None else ""
            print(f"{self.folder} could not be cleared: {error}{where}", file=sys.stderr)


class MMPrefixCLI(LightningCLI):
    """fit, validate, test and predict."""

    _room: _Room | None = None
    """Of a new run; on rank 0."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One seed for everything; the data gets the model's processor."""
        parser.add_class_arguments(CheckpointArgs, "checkpoints")
        parser.add_argument(
            "--resume", type=Literal["optional", "required"], default="optional",
            help="what `--ckpt_path last` does where there is no checkpoint: start anew, and say so, or fail",
        )  # fmt: skip
        parser.add_argument(
            "--hang_timeout_minutes", type=NonNegativeFloat, default=20.0,
            help="several processes end when training has not moved on for so long, with the name and the stacks of the "
            "one that the others wait for; 0: never",
        )  # fmt: skip
        parser.link_arguments("model.processor", "data.processor", apply_on="instantiate")
        parser.link_arguments("model.frozen_feature_key", "data.feature_key", apply_on="instantiate")
        for part in ("model", "data"):
            parser.link_arguments("seed_everything", f"{part}.seed", compute_fn=_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning's, but that `--trainer.strategy fsdp2` may have settings beside it."""
        super().parse_arguments(parser, _with_class(args))
        name = self.config["subcommand"]
        if not self.config[name].config and not any(word.startswith("--model") for word in args):
            parser.error(f"{name}: expected --config FILE (or settings of a model), got neither")
        for action in parser._actions:
            if isinstance(action.choices, dict):
                _refuse_untyped(action.choices[name], self.config[name])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Adds what every run has: loggers, checkpoints, reports, in the run folder."""
        config = self._get(self.config_init, "trainer")
        for name in ("accumulate_grad_batches", "log_every_n_steps", "check_val_every_n_epoch"):
            value = getattr(config, name)
            if value is not None and value < 1:
                raise InputError(f"trainer.{name}: expected at least 1, got {value}")
        if self.subcommand == "fit" and config.limit_train_batches == 0:
            raise InputError("trainer.limit_train_batches: expected more than 0, got 0")
        run_folder = Path(config.default_root_dir or "runs/latest")
        if run_folder.exists() and not run_folder.is_dir():
            raise InputError(f"trainer.default_root_dir: expected a folder, got the file {run_folder}")
        config.default_root_dir = str(run_folder)
        self.resume_from = self._resolve_checkpoint(run_folder)
        self.model.settings = self.parser.dump(self.config, skip_link_targets=False)
        if config.logger in (None, True):
            kwargs["logger"] = False if self.subcommand != "fit" else [
                ResumableCSVLogger(str(run_folder)),
                TensorBoardLogger(str(run_folder), name="", version="tensorboard"),
            ]  # fmt: skip
        callbacks = list(config.callbacks or [])
        own_checkpoints = config.enable_checkpointing is False or any(isinstance(c, ModelCheckpoint) for c in callbacks)
        checkpoints: CheckpointArgs = self._get(self.config_init, "checkpoints")
        if self.subcommand == "fit" and not own_checkpoints:
            callbacks += checkpoints.callbacks(run_folder)
        if self.subcommand == "fit" and config.enable_checkpointing is not False:
            callbacks.append(Preemption())
        callbacks.append(Agreement())
        timeout = self._get(self.config_init, "hang_timeout_minutes")
        if self.subcommand == "fit" and timeout:
            callbacks.append(Watchdog(timeout))
        if config.enable_progress_bar is not False and not any(isinstance(c, LightningProgressBar) for c in callbacks):
            # In a log file each refresh is a line of its own.
            callbacks.append(ProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50))
        if config.enable_model_summary is not False and not any(isinstance(c, ModelSummary) for c in callbacks):
            callbacks.append(ModelSummary(max_depth=2))  # parameters of encoder, connector and decoder
        # What `fit` left is not overwritten by a later command.
        name = "predictions" if self.subcommand == "fit" else f"predictions-{self.subcommand}"
        self.report = PredictionReport(str(run_folder), name=name)
        config.callbacks = [*callbacks, Throughput(), BadSampleReport(str(run_folder)), self.report]
        plugins = config.plugins or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins])]
        kwargs["plugins"].append(AtomicCheckpointIO(checkpoints.asynchronous))
        # A plugin goes before what Lightning finds out by itself: torchrun, which may run inside a job of SLURM.
        of_slurm = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()
        if of_slurm and not any(isinstance(p, ClusterEnvironment) for p in kwargs["plugins"]):
            # Lightning's own requeueing saves in the middle of whatever the signal interrupts.
            kwargs["plugins"].append(SLURMEnvironment(auto_requeue=False))
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError) as error:  # Lightning's own checks of its settings
            raise InputError(f"trainer: {error}") from error

    def _set_seed(self) -> None:
        """Lightning's, which checks it.

        Raises:
            InputError: none that its generators take.
        """
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(f"seed_everything: {error}") from error

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would read hyper-parameters from the file, which ours don't have, before we can check it."""

    def _resolve_checkpoint(self, run_folder: Path) -> Path | None:
        """Turns ``last`` and ``best`` into a path, and says which.

        Raises:
            InputError: a checkpoint that is not there.
        """
        wanted = self._get(self.config_init, "ckpt_path")
        if wanted is None:
            if self.subcommand != "fit":
                raise InputError(f"{self.subcommand}: expected --ckpt_path FILE (or `last`), got none")
            return None
        path, why = newest_checkpoint(run_folder) if str(wanted) == "last" else Path(wanted), ""
        if str(wanted) == "best":
            best = best_checkpoint(run_folder)
            if best is None:
                raise InputError(
                    f"--ckpt_path best: expected {run_folder / FOLDER}/{BEST_FILE} and a checkpoint that it names, as `fit` "
                    "leaves them with checkpoints.best, there is none"
                )
            path, why = best[0], f", the best by {best[1]}: {best[2]:.6g}"
        if path is None:
            missing = f"--ckpt_path last: there is no {run_folder / FOLDER}/step=*.ckpt"
            if self.subcommand != "fit":
                raise InputError(missing)
            if self._get(self.config_init, "resume") == "required":
                raise InputError(f"{missing}, and --resume is `required`")
            if rank_zero_only.rank == 0:
                print(f"{missing}: a new run begins")
            self.config_init[self.subcommand]["ckpt_path"] = None
            return None
        self.resume_step = int(read_checkpoint(path, None)["global_step"])
        self.config_init[self.subcommand]["ckpt_path"] = str(path)
        if rank_zero_only.rank == 0:
            print(f"{'resuming from' if self.subcommand == 'fit' else 'weights from'} {path}{why}")
        return path

    def before_fit(self) -> None:
        """Makes room in the run folder, once the data is known to be there: a typo must not move a good run away."""
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        if rank_zero_only.rank != 0 or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        run_folder = Path(self.trainer.default_root_dir)
        if self.resume_from is None:
            self._make_room(run_folder)
            return
        remove_leftovers(run_folder)
        drop_rows_after(run_folder / "metrics.csv", self.resume_step)
        for left in set_aside_newer(self.resume_from):
            print(f"a later checkpoint is kept as {left}")

    def _make_room(self, run_folder: Path) -> None:
        if run_folder.name in ("", "..") and run_folder.exists() and any(run_folder.iterdir()):
            raise InputError(
                f"trainer.default_root_dir: expected a folder that can be renamed, since it holds something, got {run_folder}"
            )
        kept = set_aside(run_folder)
        if kept is not None:
            print(f"{run_folder} holds an earlier run: kept as {kept}")
        is_new = not run_folder.exists()
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            self._room = _Room(run_folder, run_folder.stat().st_ino, is_new, kept)
        except OSError:
            pass  # who writes there first says it: by then all processes are connected, and none waits for this one

    def _run_subcommand(self, subcommand: str) -> None:
        """Lightning's, but that a run which fails before its first step leaves the run folder as it was."""
        try:
            super()._run_subcommand(subcommand)
        except Exception:
            if self._room is not None and self.trainer.global_step == 0:
                self._room.give_back()
            raise

    def after_fit(self) -> None:
        """Scores the test split (validation where there is none) with the last weights, and exports the model."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.datamodule.has("test"):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        else:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        strategy: Any = self.trainer.strategy
        sharded = isinstance(strategy, FullyShardedStrategy)
        weights = strategy.whole_state(self.model.model) if sharded else None
        if self.trainer.is_global_zero:
            folder, model = Path(self.trainer.default_root_dir), self.model.model
            if adapters.configs_of(model):
                weights = weights or {name: value.cpu() for name, value in model.state_dict().items()}
                adapters.save_adapters(model, weights, folder)
                model, weights = adapters.merged(model, weights), None
            with replacing(folder / "model") as temporary:
                model.save_pretrained(temporary, state_dict=weights)
                self.model.processor.save_pretrained(temporary)
            print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


class PartsCLI(MMPrefixCLI):
    """Builds model and data from the arguments of ``fit``, weights and all as ``fit`` would, and runs nothing."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None: loggers and checkpoints would make a run folder."""
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class SettingsCLI(MMPrefixCLI):
    """Reads what ``fit`` would run with, and builds and runs nothing."""

    def instantiate_classes(self) -> None:
        """Builds nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def fit_settings(arguments: list[str]) -> Mapping[str, Any]:
    """Plain values of ``fit``'s settings, defaults included, from its command line."""
    reader = _build(SettingsCLI, ["fit", *arguments])
    settings: Mapping[str, Any] = reader.config["fit"].as_dict()
    return settings


class _SaveConfig(SaveConfigCallback):
    """``config.yaml`` is that of `fit`; others leave ``config-test.yaml`` and so on beside it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See `SaveConfigCallback`."""
        if not self.already_saved and stage != "fit":
            name = getattr(stage, "value", stage)  # an enumeration, which prints its own name
            self.config_filename = f"config-{name}.yaml"
        super().setup(trainer, pl_module, stage)


def _build(cli: type[MMPrefixCLI], arguments: list[str]) -> MMPrefixCLI:
    return cli(
        MMPrefixModule,
        ShardDataModule,
        parser_class=OneLineParser,
        save_config_callback=_SaveConfig,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        seed_everything_default=0,
        trainer_defaults={"use_distributed_sampler": False},
        parser_kwargs={"version": f"mmprefix {__version__}"},
        args=arguments,
    )


def _cache_features(arguments: list[str]) -> int:
    options, others = caching.parse(arguments)
    parts = _build(PartsCLI, ["fit", *others])
    return caching.cache_features(parts.model, parts.datamodule, options)


def _with_class(arguments: list[str]) -> list[str]:
    """Names the class of a registered strategy that settings follow, as only classes take them."""
    option, words = "--trainer.strategy", list(arguments)
    if not any(word.startswith(f"{option}.") for word in words):
        return words
    path = f"{FullyShardedStrategy.__module__}.{FullyShardedStrategy.__name__}"
    for i, word in enumerate(words):
        if word == f"{option}={STRATEGY_NAME}":
            words[i] = f"{option}={path}"
        elif word == STRATEGY_NAME and i and words[i - 1] == option:
            words[i] = path
    return words


def _seed(value: bool | int) -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if isinstance(value, bool) else value


def _quieten() -> None:
    """Hides advice that is not meant for users of this package; warnings of substance stay."""
    for message in (
        r"The '\w+_dataloader' does not have many workers",
        r"The number of training batches \(\d+\) is smaller than the logging interval",
        r"Checkpoint directory .* exists and is not empty",
        r"Trying to infer the `batch_size` from an ambiguous collection",
        r".*isinstance\(treespec, LeafSpec\)",
        r"`training_step` returned `None`",  # a batch of bad samples only; they are reported by name
        r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
        r"You are using a custom batch sampler `EvaluationBatchSampler` for prediction",
        r"You're resuming from a checkpoint that ended before the epoch ended",  # the sampler knows where it was
        r"Found \d+ module\(s\) in eval mode at the start of training",  # frozen parts, on purpose
        r"Precision bf16-mixed is not supported by the model summary",
        r"The `srun` command is available on your system but is not used",
        r"LightningCLI's args parameter is intended to run from within Python",
    ):
        warnings.filterwarnings("ignore", message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch|lightning|timm")
    # Of large pictures: there is a limit of our own, which names them.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    advice = ("💡 Tip", "Loading `train_dataloader`", "GPU available: False", "TPU available: False", "Seed set to")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: not record.getMessage().startswith(advice))
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def run(arguments: list[str]) -> int:
    """Runs a command; bad input becomes one line and status 2."""
    _quieten()
    try:
        if arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        if arguments[0] == "cache-features":
            return _cache_features(arguments[1:])
        if arguments[0] == "inspect":
            return inspect_command(arguments[1:], fit_settings)
        if arguments[0] == "doctor":
            return doctor_command(arguments[1:], fit_settings)
        if arguments[0] == "estimate":
            return estimate_command(arguments[1:], fit_settings)
        if arguments[0] == "scaling":
            return scaling_command(arguments[1:], fit_settings)
        _build(MMPrefixCLI, arguments)
    except (InputError, MisconfigurationException) as error:
        if str(error):  # else another process says it
            print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # `__main__` knows whose pipe it was
        raise
    except OSError as error:
        if error.errno is None and not isinstance(error, UnreadableError):
            raise
        if not isinstance(error, SaidElsewhereError):
            print(f"error: {error}", file=sys.stderr)
        return 1
    except UnicodeDecodeError as error:
        print(f"error: --config: expected a text file in UTF-8: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ValueError as error:
        if (
            not str(error).strip().startswith("`val_check_interval`")
        ):  # Lightning's check, once it knows the number of batches
            raise
        print(f"error: trainer: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (RuntimeError, MemoryError) as error:
        reason = lost_process(error) or out_of_memory(error)
        if reason is None:
            raise
        print(f"error: {reason}", file=sys.stderr)
        return 1
    except Preempted as stopped:
        if stopped.status:
            print(f"{stopped}; go on with --ckpt_path last", file=sys.stderr)
        return stopped.status
    except SIGTERMException:
        return _stopped("terminated", EXIT_TERMINATED, arguments[0])
    except KeyboardInterrupt:
        return _stopped("interrupted", EXIT_INTERRUPTED, arguments[0])
    except SystemExit as error:
        # Lightning turns Ctrl-C into an exit of its own, after it has closed loggers and workers.
        if isinstance(error.__context__, KeyboardInterrupt):
            return _stopped("interrupted", EXIT_INTERRUPTED, arguments[0])
        return int(error.code or 0)
    return 0


def _stopped(how: str, status: int, command: str) -> int:
    further = "go on with --ckpt_path last, if a checkpoint was written"
    if command in ("validate", "test", "predict"):
        further = "with --ckpt_path, the same command goes on from the answers that it has kept"
    print(f"{how}; {further}", file=sys.stderr)
    return status
