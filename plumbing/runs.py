"""plumbing/runs.py - a run: its folder, its metrics and curves, its checkpoints to resume from.

runs/<name>/ belongs to one command at a time, and no command empties it. What replaces a file is first
written under a name that ends in .partial, and then renamed. So a command may be killed at any moment: every
file under its final name is complete. Only the log may end with half a line, which the next command drops.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from plumbing import flags, parallel
from plumbing.checkpoints import read_json, save_checkpoint, save_weights, write_json
from plumbing.flags import setting

KEPT = 3  # how many checkpoints of a run are kept: the newest ones


@dataclass
class RunSettings:
    """What a training run saves, and whether it goes on with what was saved before."""

    resume: bool = setting(False, "go on with the run of this --name: with its settings, from its newest "
                           "checkpoint", may_change=True)
    save_every: int = setting(20, "steps between checkpoints; 0: only one at the end", low=0, may_change=True)
    wandb: bool = setting(False, "send metrics to Weights & Biases, too; the package must be installed",
                          may_change=True)


def parse(parser, groups, argv):
    """The flags of a training run. With --resume their defaults are the settings of the run's last command.

    So only a flag that is to change must be given again.
    """
    path = os.path.join("runs", flags.peek(argv, "--name", parser.get_default("name")), "args.json")
    if "--resume" in (sys.argv[1:] if argv is None else argv) and os.path.isfile(path):
        parser.set_defaults(**read_json(path))
    return flags.parse(parser, groups, argv)


def run_command(main):
    """Runs the main() of a script. A ValueError or OSError is printed as one line, with exit status 2.

    Every script that uses this function takes --debug: then such an error shows its traceback, too.
    """
    program = os.path.basename(sys.argv[0])
    is_debugging = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    # A plug-in that imports tracerl gets this very module, and not a second copy of it.
    sys.modules.setdefault(program.removesuffix(".py"), sys.modules["__main__"])
    status = 0
    try:
        main()
        parallel.barrier()  # a process that left early would break the others' connections
        parallel.end_processes()
    except KeyboardInterrupt:
        status = 130
        if parallel.is_first():
            print(f"{program}: stopped. To go on with a run, repeat the command with --resume "
                  "(eval_math.py: the same command again)", file=sys.stderr)
    except Exception as error:  # a process that fails must say so and end: the others wait for it
        status = 2 if isinstance(error, (ValueError, OSError)) else 1
        has_traceback = status == 1 or is_debugging
        if has_traceback:
            traceback.print_exc()
        text = f"{program}: error: {error}" + " (--debug shows where)" * (not has_traceback)
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun prints at its end what is in this file
        if path:
            # If several processes fail, torchrun names the one with the earliest time, in whole seconds. A
            # process that only lost its connection to another is not the cause. So it gives a time that is a
            # minute later.
            is_gloo = type(error) is RuntimeError and "gloo" in str(error)
            is_lost = is_gloo or isinstance(error, dist.DistError)
            with suppress(OSError), open(path, "w", encoding="utf-8") as file:  # the disk may be full
                json.dump(dict(message=text, timestamp=int(time.time()) + 60 * is_lost), file)
        print(text, file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # End without Python's usual clean-up. After a failure it would wait for the other processes, which
        # wait for this one. After success, threads of torch sometimes crash the process during the clean-up.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


# ------------------------------------------------------------------------------------------------------------
# How many seconds the parts of a step take, and on a GPU how much memory tensors take at most.


TAKEN = Counter()  # name -> seconds (added up), or gibibytes (the largest number is kept)


@contextmanager
def timed(name):
    """Used as a decorator: measures how long a function runs, and adds it to TAKEN[name].

    name must end in _seconds. On a GPU the peak of memory goes to the same name with _gib.
    """
    started = time.perf_counter()
    has_gpu = torch.cuda.is_initialized()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    yield
    TAKEN[name] += time.perf_counter() - started
    if has_gpu:
        peak = name.replace("seconds", "gib")
        TAKEN[peak] = max(TAKEN[peak], torch.cuda.max_memory_allocated() / 2**30)


def take_seconds():
    """The seconds by name since the last call, and on a GPU the peaks of memory. They start again from 0."""
    taken = dict(TAKEN)
    TAKEN.clear()
    return taken


# ------------------------------------------------------------------------------------------------------------
# The folder.


# With LoRA only the adapters are saved for --resume, since the frozen weights are those of --model.
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


@contextmanager
def replacing(path):
    """Inside a `with`: a name under which to write a file or folder, which is renamed to `path` at the end.

    So `path` is never half-written. If a folder stands at `path` already, it is moved away first, and deleted
    last. If the disk fails, what was written is deleted, and OSError says what to do. Either the first
    process alone uses it, or all processes do. In both cases only the first one renames.
    """
    partial = f"{path}.partial"
    try:
        yield partial
        if parallel.is_first():
            # An .old.partial may be left from a command that was killed here.
            shutil.rmtree(f"{path}.old.partial", ignore_errors=True)
            if os.path.isdir(path):
                os.replace(path, f"{path}.old.partial")
            os.replace(partial, path)  # this also replaces a file
            shutil.rmtree(f"{path}.old.partial", ignore_errors=True)
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if os.path.isfile(partial):
            os.remove(partial)
        raise OSError(f"{path} could not be written ({parallel.cause_of(error)}): free some space or make "
                      "the folder writable, and go on with --resume (eval_math.py: without it). What was "
                      "saved before is complete") from error


def train_state(learners):
    """Weights and optimizer states of learners, for torch.distributed.checkpoint."""
    out = {}
    for number, (model, optimizer) in enumerate(filter(None, learners)):
        is_fresh = not optimizer.state
        weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
        out[str(number)] = dict(model=weights, optimizer=moments)
        for state in optimizer.state.values() if is_fresh else []:
            state["step"].zero_()  # to create moments, get_state_dict made a step of size 0
    return out


def mark(content):
    """A short hash of JSON values. Of an object, such as a Problem, all fields count."""
    return hashlib.sha256(json.dumps(content, default=vars).encode()).hexdigest()[:12]


def weight_mark(parameters):
    """A short hash of weights, made of a sum for each parameter. An update changes some of these sums."""
    sums = [f"{float(p.detach().sum(dtype=torch.float64)):.6g}" for p in parameters]
    return mark(parallel.from_first(sums))  # another kind of GPU may round another way


def frozen_mark(learners):
    """weight_mark of the weights that adapters (LoRA) leave as they are."""
    return weight_mark(p for p in learners[0].model.parameters() if not p.requires_grad)


def plugin_marks(settings):
    """A mark of each file that a setting names as file.py:function. If its text changes, the mark does, too.

    So a run does not go on with other functions than those with which it began.
    """
    values = [value if isinstance(value, (list, tuple)) else [value] for value in settings.values()]
    paths = {str(word).rpartition(":")[0] for words in values for word in words}
    return {f"the text of {path}": mark(Path(path).read_text(encoding="utf-8"))
            for path in sorted(paths) if path.endswith(".py") and os.path.isfile(path)}


class Run(AbstractContextManager):
    """The folder runs/<name>/ while a command works in it. To be used in a `with`.

    Only the first process writes (of train_state/ each process writes its part). resume: goes on with the run
    in the folder. Without it, a folder that holds a run is an error. groups: the settings classes, which say
    what a resumed run may change.
    """

    def __init__(self, name, settings, resume=False, groups=None, log="metrics.jsonl"):
        self.folder = os.path.join("runs", name)
        if os.path.relpath(self.folder, "runs").startswith("."):
            raise ValueError(f"--name {name!r} is no name of a folder under runs/")
        self.path = os.path.join(self.folder, log)
        self.settings = dict(settings) | plugin_marks(settings)
        if groups:  # the first group has another title in each script: sft.py cannot resume a tracerl.py run
            self.settings["kind_of_run"] = next(iter(groups))
        self.is_writer = parallel.is_first()
        self.resume = resume
        self.progress = dict(step=0)  # what a checkpoint holds besides weights and moments
        self.tokenizer = None  # saved with every checkpoint
        self.wandb = None  # a run of Weights & Biases, once `begin` has started it
        self.lock = filelock.FileLock(os.path.join(self.folder, "lock"))
        if self.is_writer:
            self.check_use(resume, flags.changeable(groups or {}))
            os.makedirs(self.folder, exist_ok=True)
            try:
                self.lock.acquire(timeout=0)  # the system releases it when this process ends
            except filelock.Timeout:
                raise ValueError(f"{self.folder} is in use by another command: wait for it, end it, or "
                                 "choose another --name") from None
        if any(other != self.settings for other in parallel.gather([self.settings])):
            raise ValueError("the processes of this run have different settings: give all of them the same "
                             "flags, the same files, and the same kind of device")

    def check_use(self, resume, may_change):
        """ValueError for a folder with a run, unless this command resumes it with the same settings."""
        has_lines = any(log.stat().st_size for log in Path(self.folder).glob("*.jsonl"))
        if not resume and (has_lines or checkpoints_of(self.folder)):
            raise ValueError(f"{self.folder} holds a run: go on with it (--resume), delete the folder, or "
                             "choose another --name")
        args_path = os.path.join(self.folder, "args.json")
        if resume and os.path.isfile(args_path):
            flags.check_same(read_json(args_path), self.settings, may_change, args_path)

    def begin(self, learners=()):
        """Begins to write: the settings go into args.json, and the log is opened.

        learners: those of a training run. With --resume they go on from the newest checkpoint.
        """
        if self.is_writer:
            with replacing(os.path.join(self.folder, "args.json")) as partial:
                write_json(partial, self.settings)
            # A command that was killed while it saved or deleted a checkpoint leaves such folders.
            for left in Path(self.folder, "checkpoints").glob("*.partial*"):
                shutil.rmtree(left, ignore_errors=True)
            open(self.path, "a", encoding="utf-8").close()
            self.keep_lines(self.lines())  # drops half a line, if a crash left one
            if self.settings.get("wandb"):
                import wandb  # not in requirements.txt: only a run that asks for it needs it
                self.wandb = wandb.init(project="tracerl", name=os.path.basename(self.folder),
                                        config=self.settings, dir=self.folder)
        if self.resume and learners:
            self.restore(learners)

    def __exit__(self, kind, error, trace):
        if self.wandb is not None:
            self.wandb.finish()
        self.lock.release()

    def steps(self, last, name):
        """The steps that are still to be done, up to `last`, with a progress bar."""
        if self.progress["step"] >= last:
            parallel.say(f"{self.folder} is at step {self.progress['step']}: nothing is left to train. Raise "
                         "the number of steps to go on")
        for step in parallel.bar(range(self.progress["step"] + 1, last + 1), name):
            self.progress["step"] = step
            yield step

    def write(self, line):
        """Appends one line to the log. NaN and inf become null, since JSON has neither."""
        if self.is_writer:
            clean = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                     for name, value in line.items()}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(clean) + "\n")
            if self.wandb is not None:
                self.wandb.log(clean, step=line["step"])

    def read(self):
        """The lines of the log so far, on every process."""
        return parallel.from_first(self.lines() if self.is_writer else None)

    def lines(self):
        """The same, on the first process only. A last line that a crash has cut off is left out."""
        with open(self.path, encoding="utf-8") as file:
            return [json.loads(line) for line in file if line.endswith("\n")]

    def keep_lines(self, lines):
        """Replaces the log by these lines. If the command is killed meanwhile, the old log stays."""
        with replacing(self.path) as partial, open(partial, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    def save(self, learners):
        """Saves checkpoints/step-<n>, and then deletes all checkpoints but the newest few.

        The folder itself holds the first learner's model in the Hugging Face layout. value/ holds the second
        learner's, which is a value model. train_state/ holds all that `restore` needs. The second learner may
        be None.
        """
        path = os.path.join(self.folder, "checkpoints", f"step-{self.progress['step']}")
        if self.settings.get("lora_rank") and "frozen" not in self.progress:
            self.progress["frozen"] = frozen_mark(learners)
        with replacing(path) as partial:
            save_checkpoint(learners[0].model, self.tokenizer, partial, self.save_dtype())
            if len(learners) > 1 and learners[1] is not None:
                save_weights(learners[1].model, os.path.join(partial, "value"), self.save_dtype())
            state_folder = os.path.join(partial, "train_state")
            with warnings.catch_warnings():  # torch warns if there is only one process
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                saved = dcp.save(
                    train_state(learners), checkpoint_id=state_folder, no_dist=not dist.is_initialized())
            if self.is_writer:
                write_json(os.path.join(state_folder, "progress.json"), self.progress)
                written = {place.relative_path for place in saved.storage_data.values()}
                if not written <= {*os.listdir(state_folder)}:
                    raise OSError("files of other processes are missing: all machines need one file system")
        if self.is_writer:
            for old in checkpoints_of(self.folder)[:-KEPT]:
                # Renamed first, so that a half-deleted checkpoint is not taken for a whole one. What cannot
                # be deleted now is deleted by the next command, see `begin`.
                os.rename(old, f"{old}.partial")
                shutil.rmtree(f"{old}.partial", ignore_errors=True)
            self.plot()

    def save_dtype(self):
        """The dtype of saved weights. It is the one in which the policy decoded.

        With adapters it is float32, since bfloat16 would round their small changes away.
        """
        is_float32 = self.settings.get("lora_rank") or self.settings.get("dtype") != "bfloat16"
        return torch.float32 if is_float32 else torch.bfloat16

    def save_model(self, model):
        """Saves the model alone in checkpoint/ -> its path."""
        path = os.path.join(self.folder, "checkpoint")
        with replacing(path) as partial:
            save_checkpoint(model, self.tokenizer, partial, self.save_dtype())
        return path

    def restore(self, learners):
        """Loads the newest checkpoint into models and optimizers, and cuts the log back to its step.

        Without a checkpoint the run starts at step 1. ValueError if it is damaged, or of another model.
        """
        paths = parallel.from_first(checkpoints_of(self.folder))
        if not paths:
            parallel.say(f"{self.folder} has no checkpoint to go on from, so the run starts at step 1")
            if self.is_writer:
                self.keep_lines([])
            return
        folder = os.path.join(paths[-1], "train_state")
        self.progress = read_json(os.path.join(folder, "progress.json"))
        if self.progress.get("frozen", "") not in ("", frozen_mark(learners)):
            raise ValueError(f"{paths[-1]} holds adapters for other weights than those of --model: give the "
                             "--model with which this run began")
        state = train_state(learners)
        try:
            parallel.load(state, checkpoint_id=folder)
            for (model, optimizer), part in zip(filter(None, learners), state.values()):
                set_state_dict(model, optimizer, model_state_dict=part["model"],
                               optim_state_dict=part["optimizer"], options=TRAINED_ONLY)
        except ValueError as error:
            raise ValueError(f"{paths[-1]} cannot be resumed from ({error}): it is damaged, or of another "
                             "model. Move it away to go on from the checkpoint before it") from error
        if self.is_writer:
            self.keep_lines([line for line in self.lines() if line["step"] <= self.progress["step"]])
        parallel.say(f"resuming {self.folder} after step {self.progress['step']}")

    def check_data(self, data, name):
        """ValueError if a resumed run would go on with other data (lists of numbers, texts, or Problems)."""
        found = mark(data)
        if self.progress.setdefault("data", parallel.from_first(found)) != found:
            raise ValueError(f"{name} have changed since {self.folder} began, or another process has others: "
                             "bring the old data back, or start a new run from its newest checkpoint "
                             "(--model, --name)")

    def finish(self, summary):
        """Writes summary.json."""
        if self.is_writer:
            with replacing(os.path.join(self.folder, "summary.json")) as partial:
                write_json(partial, summary)

    def plot(self):
        """Draws every number of the log against the step in curves.png, reward and accuracy first."""
        lines = self.lines()
        names = {name for line in lines for name in line if isinstance(line[name], (int, float))} - {"step"}
        first = [name for name in ("reward", "dev_accuracy", "accuracy", "loss") if name in names]
        names = first + sorted(names - {*first})
        # Not at the top: the first RL step would wait half a second for this import.
        from matplotlib.figure import Figure
        num_rows = math.ceil(len(names) / 3) or 1  # no number at all: somebody has deleted the log
        height = 2.2 * num_rows  # inches
        figure = Figure(figsize=(12, height))
        # Fixed margins: a layout that measures every label takes twice as long, at every checkpoint.
        figure.subplots_adjust(left=0.05, right=0.99, bottom=0.3 / height, top=1 - 0.3 / height, hspace=0.4)
        for number, name in enumerate(names, 1):
            axes = figure.add_subplot(num_rows, 3, number)
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            axes.plot(*zip(*points), marker="." if len(points) < 30 else None)
            axes.set_title(name, fontsize=9)
        with replacing(os.path.join(self.folder, "curves.png")) as partial:
            figure.savefig(partial, dpi=80, format="png")


def checkpoints_of(folder):
    """Paths of the whole checkpoints of a run's folder, by step. (A half-written one is called .partial.)"""
    steps = {path.name.removeprefix("step-"): path for path in Path(folder, "checkpoints").glob("step-*")}
    return [str(steps[step]) for step in sorted(filter(str.isdecimal, steps), key=int)]
