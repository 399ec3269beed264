"""plumbing/runs.py - a run: its flags, its folder, its metrics and curves, its checkpoints to resume from.

A run's folder, runs/<name>/, belongs to one command at a time (a lock that the kernel lets go of when its
holder dies), and is never emptied unless --overwrite asks for it. Whatever is replaced is written aside and
renamed: killed at any moment, what lies under a proper name is whole.
"""

import argparse
import fcntl
import glob
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import socket
import sys
import time
import traceback
import warnings
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from matplotlib.figure import Figure
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from plumbing import parallel
from plumbing.checkpoints import read_json, save_checkpoint, write_json

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# ------------------------------------------------------------------------------------------------------------
# Flags.


def number(kind, low, high=math.inf, is_open=False):
    """The type of a flag: a finite number of a kind from low (is_open: above it) to high."""
    def read(text):
        """The number in a text."""
        value = kind(text)
        if not low <= value <= high or value == math.inf or is_open and value == low:
            bounds = ("above " if is_open else "at least ") + str(low)
            bounds += f", at most {high}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value
    read.__name__ = kind.__name__  # argparse says it where the text is no number at all
    return read


positive, not_negative, share = number(float, 0, is_open=True), number(float, 0), number(float, 0, 1)
positive_int, count = number(int, 1), number(int, 0)


def folder_name(text):
    """A plain name, no path."""
    if os.path.basename(text) != text or text in ("", ".", ".."):
        raise argparse.ArgumentTypeError(f"must be a plain folder name, got {text!r}")
    return text


def make_parser(description, epilog=None):
    """A parser whose help shows the defaults of the case at hand, and which takes no abbreviations."""
    return argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False,
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def add_training_flags(parser, name):
    """Flags of sft.py and tracerl.py about the run, the machine, and what fits on it."""
    flag = parser.add_argument_group("run").add_argument
    flag("--name", type=folder_name, default=name, help="of the folder under runs/")
    flag("--seed", type=int, default=0, help="of weights, data order, masks and rollouts")
    flag("--resume", action="store_true",
         help="go on with the run of this name, with its settings, from its newest checkpoint (or the start)")
    flag("--overwrite", action="store_true", help="replace a run of this name")
    flag("--save_every", type=count, help="steps between checkpoints; 0 is at the end only")
    flag("--keep_checkpoints", type=positive_int, default=3, help="the newest ones to keep")
    flag("--report_to", choices=("wandb", "tensorboard"), help="where metrics go, too, if it is installed")
    flag("--debug", action="store_true", help="show the traceback of an error")
    flag = parser.add_argument_group("machine").add_argument
    flag("--device", choices=("cpu", "cuda"), help="None: a GPU if there is one; the CPU for the tiny model")
    flag("--tokens_per_micro_batch", type=positive_int,
         help="tokens of one forward and backward; None, with --model: as many as fit, at most 16384")
    flag("--dtype", choices=("float32", "bfloat16"),
         help="what layers compute in; weights, optimizer states, gradients and losses are float32 anyhow")
    flag("--save_dtype", choices=("float32", "bfloat16"),
         help="of the weights in a checkpoint; None is --dtype, the policy as it decoded; with --lora_rank "
         "float32, since bfloat16 would round small changes away (evaluate such a checkpoint with --dtype "
         "float32, too). What --resume needs is float32 anyhow")
    flag("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="keep one activation per "
         "layer and compute the others again in the backward pass: slower by a third, fits far longer rows")
    flag("--no_self_check", action="store_true", help="do not replay a few short rollouts before training")
    flag("--replicas", type=positive_int, default=1, help="whole sharded copies of the model, e.g. one per "
         "node: weights then travel inside a node only, gradients between nodes once per update")
    flag("--lora_rank", type=count, default=0,
         help="train adapters of this rank beside a frozen trunk; 0 trains everything")


def add_prompt_flags(parser, styles, instruction):
    """The flags of eval_math.encode_prompts."""
    # Shared by all three scripts: a model must be trained and tested on the same kind of prompt.
    flag = parser.add_argument_group("prompts").add_argument
    flag("--max_prompt_tokens", type=positive_int, default=784,
         help="longer prompts are skipped and counted")
    flag("--prompt_style", choices=styles, default="chat", help="how the chat template is used")
    flag("--instruction", default=instruction,
         help="text after each problem; empty for data with whole prompts")
    flag("--system", help="a system message before each problem")
    flag("--problem_column", help="column of the problem, if it has an uncommon name")
    flag("--answer_column", help="column of the answer, if it has an uncommon name")


def add_decoding_flags(parser, caches):
    """The flags of rollout.generate, but --strategy: of tracerl.py and eval_math.py."""
    flag = parser.add_argument_group("decoding").add_argument
    flag("--max_new_tokens", type=positive_int, default=2000,
         help="longest response; longer ones are truncated, and wrong. Full attention: length of the canvas")
    flag("--threshold", type=share, default=0.9, help="confidence above which dynamic reveals a token")
    flag("--denoising_steps", type=positive_int,
         help="steps per block that the quota of revealed tokens is made for; None is K")
    flag("--temperature", type=not_negative, default=1.0, help="T; 0 is greedy")
    flag("--top_k", type=count, default=0, help="draw among the k most probable tokens; 0 is all")
    flag("--top_p", type=number(float, 0, 1, is_open=True), default=1.0,
         help="draw among the most probable tokens up to this sum; 1 is all")
    flag("--slots", type=positive_int,
         help="sequences decoded together on one process; None: as many as fit into its memory")
    flag("--cache", choices=caches, default="none", help="full attention: keep keys and values outside "
         "the block (dual), or before it (prefix), for its later steps. Faster, and not the same policy")


def decoding_settings(args):
    """Those flags, for rollout.generate."""
    # The flags of add_decoding_flags, and --strategy.
    names = ("max_new_tokens", "strategy", "threshold", "denoising_steps", "temperature", "top_k", "top_p",
             "slots", "cache")
    return {name: getattr(args, name) for name in names}


# Settings that a resumed run may change: they do not touch results (beyond
# rounding), or only say how far to go.
MAY_CHANGE = {"name", "resume", "overwrite", "debug", "steps", "eval_every", "save_every", "keep_checkpoints",
              "slots", "tokens_per_micro_batch", "gradient_checkpointing", "device", "replicas", "save_dtype",
              "report_to", "no_self_check"}


def parse(parser, argv, tiny, real):
    """The flags, with the defaults of the tiny model, or those of a real checkpoint where --model is given.
    With --resume, those of the run itself: only what is to change has to be said again."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--model")
    first.add_argument("--name", default=parser.get_default("name"))
    first.add_argument("--resume", action="store_true")
    known, _ = first.parse_known_args(argv)
    parser.set_defaults(**(tiny if known.model is None else real))
    path = os.path.join("runs", known.name, "args.json")
    if not (known.resume and os.path.isfile(path)):
        return parser.parse_args(argv)
    saved = read_json(path)
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    check_same(saved, vars(args), path)
    return args


def check_same(saved, settings, path):
    """Refuses to mix two settings in one run."""
    settings = json.loads(json.dumps(settings))  # as they would come back from a file
    changed = [f"{name} was {saved.get(name)!r}, is {settings.get(name)!r}"
               for name in sorted({*saved, *settings} - MAY_CHANGE) if saved.get(name) != settings.get(name)]
    if changed:
        raise ValueError(f"{path} is of a run with other settings: {'; '.join(changed)}. "
                         "Say what the run says, or choose another --name")


def run_command(main):
    """main() of a script, for people: an error of the user's is one line, with exit status 2. (A RuntimeError
    is one only if this project raised it: torch's, out of memory or a bug, come with their traceback.)"""
    program, status = os.path.basename(sys.argv[0]), 0
    try:
        main()
        parallel.end_processes()
    except KeyboardInterrupt:
        status = 130
        if parallel.is_first():
            print(f"{program}: stopped. To go on: the same command with --resume (eval_math.py: without)",
                  file=sys.stderr)
    except Exception as error:  # any: whoever fails must say so and leave, or the others wait for ever
        # Not whatever lies under ROOT: the README's own virtual environment does, and torch with it.
        raised_in = os.path.dirname(traceback.extract_tb(error.__traceback__)[-1].filename)
        is_ours = raised_in in (ROOT, os.path.join(ROOT, "plumbing"))
        is_users = isinstance(error, (ValueError, OSError)) or is_ours and isinstance(error, RuntimeError)
        status = 2 if is_users else 1
        if not is_users or "--debug" in sys.argv:
            traceback.print_exc()
        text = f"{program}: error: {error} (--debug shows where)"
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's last words are what it finds there
            with open(path, "w", encoding="utf-8") as file:
                json.dump(dict(message=text, timestamp=int(time.time())), file)
        print(text, file=sys.stderr)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Leave without the interpreter's long goodbye. After a failure it would wait for the others, who wait
        # for this process. After success torch's own threads abort it now and then (gloo, 4 processes:
        # "terminate called without an active exception" in one run of four), and torchrun would report that.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def load_function(spec, built_in, flag):
    """What --reward, --advantage, --loss and --views name: a built-in function, or file.py:function of the
    user's own. ValueError that names what is missing."""
    if spec in built_in:
        return built_in[spec]
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        raise ValueError(f"{flag} {spec}: no file {path or spec!r}; give file.py:function, or one of "
                         + ", ".join(built_in))
    key = f"plugin {os.path.realpath(path)}"  # a file is executed once, however many flags name it
    if key not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(key, path)
        sys.modules[key] = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(sys.modules[key])
    module = sys.modules[key]
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{flag} {spec}: {path} has no function {name!r}")
    return getattr(module, name)


def call(function, *arguments):
    """Calls a user's function with as many of the arguments as it requires: the last ones are optional."""
    wanted = inspect.signature(function).parameters.values()
    takes_all = any(p.kind is p.VAR_POSITIONAL for p in wanted)
    number = len(arguments) if takes_all else sum(p.default is p.empty for p in wanted)
    return function(*arguments[:number])


# ------------------------------------------------------------------------------------------------------------
# The folder.


# of LoRA, the adapters alone: the frozen trunk is in --model already
TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


@contextmanager
def writing(path, partial=None):
    """Inside, an error of the disk is one that says what to do, and `partial`, half-written, goes."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
            if os.path.isfile(partial):
                os.remove(partial)
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise RuntimeError(f"{path} could not be written ({reason}): free some space and go on "
                           "(--resume); what was saved before is whole") from error


def train_state(trainers):
    """Weights and optimizer states of (model, optimizer) pairs, for torch.distributed.checkpoint."""
    out = {}
    for number, (model, optimizer) in enumerate(trainers):
        is_fresh = not optimizer.state
        weights, moments = get_state_dict(model, optimizer, options=TRAINED_ONLY)
        out[str(number)] = dict(model=weights, optimizer=moments)
        for state in optimizer.state.values() if is_fresh else []:
            state["step"].zero_()  # get_state_dict made a step of size 0 to have moments: it does not count
    return out


def checksums(folder):
    """{file name: [size, sha256]} of the tensor files of a folder, each process reading its share."""
    names = parallel.from_first(sorted(name for name in os.listdir(folder) if name != "progress.json"))
    names = parallel.share(names)
    own = []
    for name in names:
        path = os.path.join(folder, name)
        with open(path, "rb") as file:
            own.append((name, [os.path.getsize(path), hashlib.file_digest(file, "sha256").hexdigest()]))
    return dict(parallel.gather(own))


class Run:
    """runs/<name>/ while a command works in it. To be used in a `with`; only the first process writes.

    resume: what is there is kept. overwrite: what is there goes, once `begin` is called: when the settings,
    the model and the data have proved good. Neither: a name that holds a run is an error.
    """

    def __init__(self, name, settings, resume=False, overwrite=False, log="metrics.jsonl"):
        self.folder, self.is_writer, self.lock = os.path.join("runs", name), parallel.is_first(), None
        # In bfloat16 the small changes of an adapter would be rounded away when they join the weights.
        dtype = "float32" if settings.get("lora_rank") else settings.get("dtype") or "float32"
        self.save_dtype = getattr(torch, settings.get("save_dtype") or dtype)
        self.report = self.end_report = None  # of metrics to another program
        self.path, self.settings = os.path.join(self.folder, log), dict(settings)
        kind = settings.get("report_to")
        if kind is not None and importlib.util.find_spec(kind) is None:
            raise ValueError(f"--report_to {kind}: it is not installed (pip install {kind})")
        if self.is_writer:
            self.open(resume, overwrite)
        # Every process reads checkpoints here and writes its part of them: say so now, not after hours.
        lock = os.path.join(self.folder, "lock")
        # The others look once it is there: a network disk remembers for seconds that there was no such file.
        holder = parallel.from_first(read_text(lock) if self.is_writer else None)
        if not all(parallel.gather([read_text(lock) == holder])):
            raise ValueError(f"not all processes see the same {self.folder}: start the command where all "
                             "machines share a disk")

    def open(self, resume, overwrite):
        """The first process's part: takes the folder, or says why not."""
        self.take()
        try:
            settings_path = os.path.join(self.folder, "args.json")
            is_used = checkpoints_of(self.folder) or (
                os.path.isfile(self.path) and os.path.getsize(self.path) > 0)
            if is_used and resume and not os.path.isfile(settings_path):
                raise ValueError(f"{self.folder} holds a run without its args.json: put it back to go on")
            self.replaces = bool(is_used and not resume)
            if resume and os.path.isfile(settings_path):
                check_same(read_json(settings_path), self.settings, settings_path)
            if self.replaces and not overwrite:
                raise ValueError(f"{self.folder} holds a run: go on with it (--resume), replace it "
                                 "(--overwrite), or choose another --name")
            model = os.path.realpath(self.settings.get("model") or "/")
            if self.replaces and model.startswith(os.path.realpath(self.folder) + os.sep):
                raise ValueError(f"--model {self.settings['model']} lies inside {self.folder}, which "
                                 "--overwrite would delete: choose another --name")
        except BaseException:
            self.lock.close()
            raise

    def begin(self):
        """From here on the run is under way: what it replaces goes, settings are written, the log opens."""
        if not self.is_writer:
            return
        if self.replaces:
            names = set(os.listdir(self.folder)) - {"lock"}
            for name in sorted(names, key=lambda name: name != "checkpoints"):  # these first
                path = os.path.join(self.folder, name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        path = os.path.join(self.folder, "args.json")
        with writing(path, f"{path}.partial"):
            write_json(path, self.settings)
        # Of a command that was killed while it saved, or deleted an old checkpoint.
        for left in glob.glob(os.path.join(glob.escape(self.folder), "checkpoints", "*.partial*")):
            shutil.rmtree(left, ignore_errors=True)
        open(self.path, "a", encoding="utf-8").close()
        self.keep_lines(self.own_lines())  # without half a line, if a crash left one
        self.report, self.end_report = reporter(self.settings.get("report_to"), self.folder, self.settings)

    def take(self):
        """Makes the folder this command's own, or says whose it is."""
        try:
            os.makedirs(self.folder, exist_ok=True)
            self.lock = open(os.path.join(self.folder, "lock"), "a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write to {self.folder} ({error.strerror}): run this from a folder "
                             "of your own, or free the name") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = self.lock.read().strip()
            self.lock.close()
            raise ValueError(f"{self.folder} is in use by {holder}: wait for it, "
                             "or choose another --name") from None
        except OSError as error:  # some network disks
            parallel.say(f"WARNING: this disk has no locks ({error.strerror}): nothing keeps a second "
                         f"command out of {self.folder}")
        with writing(self.lock.name):
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            self.lock.flush()
            os.fsync(self.lock.fileno())  # other machines look at it at once

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.is_writer:
            if kind is KeyboardInterrupt and os.path.isfile(self.path):
                self.plot()  # as far as it came, if it had begun
            if self.end_report is not None:
                self.end_report()  # the last lines are still on their way
            self.lock.close()  # lets go of the lock

    def write(self, line):
        """Appends one line to the log."""
        if self.is_writer:
            with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            if self.report is not None:
                self.report(line)

    def read(self):
        """The lines so far, on every process."""
        return parallel.from_first(self.own_lines() if self.is_writer else None)

    def own_lines(self):
        """The same, on the first process only. A last line that was cut off by a crash is not one."""
        lines = []
        with open(self.path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.endswith("\n"):
                    try:
                        lines.append(json.loads(line))
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{self.path}, line {number} is damaged ({error}): mend or remove "
                                         "that line") from None
        return lines

    def keep_lines(self, lines):
        """The log with these lines only. Written aside and renamed: killed here, no earlier line is lost."""
        if self.is_writer:
            with writing(self.path, f"{self.path}.partial"):
                with open(f"{self.path}.partial", "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                os.replace(f"{self.path}.partial", self.path)

    def save(self, tokenizer, trainers, progress, keep, write_more=None):
        """Saves checkpoints/step-<progress["step"]>: the first model of `trainers` in its Hugging Face
        layout, and in train_state/ all that `restore` needs. All but the newest `keep` are deleted after.

        trainers: (model, optimizer) pairs. progress: JSON values. write_more(folder) may add its own files.
        """
        path = os.path.join(self.folder, "checkpoints", f"step-{progress['step']}")
        partial = f"{path}.partial"
        with writing(path, partial):
            save_checkpoint(trainers[0][0], tokenizer, partial, self.save_dtype)
            parallel.barrier()  # it waits for hours, the groups of --replicas for minutes
            if write_more is not None:
                write_more(partial, self.save_dtype)
            parallel.barrier()
            state_folder = os.path.join(partial, "train_state")
            with warnings.catch_warnings():  # of one process: that it is one
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.save(train_state(trainers), checkpoint_id=state_folder, no_dist=not dist.is_initialized())
            parallel.barrier()
            progress = progress | dict(files=checksums(state_folder))
            if self.is_writer:
                write_json(os.path.join(state_folder, "progress.json"), progress)
                shutil.rmtree(path, ignore_errors=True)
                os.rename(partial, path)
        if self.is_writer:
            for old in checkpoints_of(self.folder)[:-keep]:
                # Renamed first: what is half deleted has no proper name. What cannot go yet may stay.
                os.rename(old, f"{old}.partial")
                shutil.rmtree(f"{old}.partial", ignore_errors=True)
            self.plot()
        parallel.barrier()

    def save_model(self, model, tokenizer):
        """Saves the model alone in checkpoint/ -> its path."""
        path = os.path.join(self.folder, "checkpoint")
        with writing(path):
            save_checkpoint(model, tokenizer, path, self.save_dtype)
        parallel.barrier()
        return path

    def restore(self, trainers):
        """Loads the newest checkpoint into the models and optimizers, and cuts the log back
        to its step -> its progress, or None where there is no checkpoint yet. ValueError for
        a damaged or foreign checkpoint."""
        parallel.barrier()
        paths = parallel.from_first(checkpoints_of(self.folder))
        if not paths:
            parallel.say(f"{self.folder} has no checkpoint to go on from: this starts at the beginning")
            self.keep_lines([])
            return None
        folder = os.path.join(paths[-1], "train_state")
        remedy = "Move it away to go on from the one before"
        if not os.path.isfile(os.path.join(folder, "progress.json")):
            raise ValueError(f"{paths[-1]} has no train_state to resume from: use it with --model. {remedy}")
        progress = read_json(os.path.join(folder, "progress.json"))
        saved, found = progress.pop("files", {}), checksums(folder)
        damaged = sorted(name for name in {*found, *saved} if saved.get(name) != found.get(name))
        if damaged:
            raise ValueError(f"{folder} is damaged: {', '.join(damaged)} is not what was saved. {remedy}")
        state = train_state(trainers)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
            for (model, optimizer), part in zip(trainers, state.values()):
                set_state_dict(model, optimizer, model_state_dict=part["model"],
                               optim_state_dict=part["optimizer"], options=TRAINED_ONLY)
        except (torch.OutOfMemoryError, dist.DistError):  # RuntimeErrors, too, but not the checkpoint's fault
            raise
        except (OSError, CheckpointException, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(f"{paths[-1]} cannot be resumed from ({reason}): it is of another model. "
                             f"{remedy}") from error
        self.keep_lines([line for line in self.read() if line["step"] <= progress["step"]])
        parallel.barrier()
        return progress

    def finish(self, summary):
        """Writes summary.json."""
        if self.is_writer:
            path = os.path.join(self.folder, "summary.json")
            with writing(path, f"{path}.partial"):
                write_json(path, summary)

    def plot(self):
        """Draws every number of the log against the step in curves.png, reward and accuracy
        first. On the first process only."""
        lines = self.own_lines()
        names = {name for line in lines for name in line if isinstance(line[name], (int, float))} - {"step"}
        first = [name for name in ("reward", "dev_accuracy", "accuracy", "loss") if name in names]
        names = first + sorted(names - {*first})
        if not names or "step" not in lines[0]:
            return
        figure = Figure(figsize=(12, 2.2 * math.ceil(len(names) / 3)), layout="constrained")
        for number, name in enumerate(names, 1):
            axes = figure.add_subplot(math.ceil(len(names) / 3), 3, number)
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points), marker="." if len(points) < 30 else None)
            axes.set_title(name, fontsize=9)
        figure.savefig(os.path.join(self.folder, "curves.png"), dpi=80)

    def files(self):
        """What the folder holds."""
        return sorted(set(os.listdir(self.folder)) - {"lock"}) if self.is_writer else []


def reporter(kind, folder, settings):
    """Two functions: one gives a line of metrics to Weights & Biases or TensorBoard, one ends that (None: to
    nobody)."""
    if kind == "wandb":
        import wandb
        run = wandb.init(project="tracerl", name=os.path.basename(folder), config=settings, dir=folder)
        return lambda line: run.log(line, step=line["step"]), run.finish
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder)
        report = lambda line: [writer.add_scalar(name, x, line["step"]) for name, x in line.items()]
        return report, writer.close
    return None, None


def read_text(path):
    """The content of a file, None where there is none."""
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            return file.read()


def checkpoints_of(folder):
    """Paths of the whole checkpoints of a run's folder, by step. (A half-written one is called .partial.)"""
    folder = os.path.join(folder, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = sorted(int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name))
    return [os.path.join(folder, f"step-{step}") for step in steps]
