"""Laws of a run: nothing is lost, nothing is wrong in silence, and many processes are one."""

import importlib.machinery
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
from conftest import COMPUTES, FIXTURES, ROOT, decode, random_model, random_prompts, small_data
from safetensors.torch import load_file
from tqdm import tqdm

import rollout
import tracerl
from plumbing import checkpoints, grading, parallel, runs, show, tiny
from rollout import Decoding

TINY = str(FIXTURES / "tiny")
SMALL = ["--model", TINY, "--train_data=train.jsonl", "--eval_data=test.jsonl", "--prompts=4",
         "--group_size=4", "--lr=1e-3", "--warmup=0", "--value_epochs=1", "--eval_every=0",
         "--eval_strategies=dynamic", "--eval_limit=2"]
PLOT = runs.Run.plot


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with small data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs.Run, "plot", lambda self: None)  # a second for each checkpoint
    small_data(tmp_path)
    return tmp_path


def metrics(name):
    """The lines of a run's log, without what no law can say: seconds."""
    lines = Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if "seconds" not in key} for line in lines]


def weights(name, step, kind="model"):
    """Weights of a checkpoint, by name."""
    return load_file(f"runs/{name}/checkpoints/step-{step}/{kind}.safetensors")


def distance(one, other):
    """Euclidean distance of two sets of weights."""
    return sum((one[name] - p).square().sum() for name, p in other.items()) ** 0.5


# ------------------------------------------------------------------------------------------------------------
# Processes. Each is a copy of this one (a fork), which has imported everything already: a new one would need
# seconds for that. test_commands.py starts some in the usual way, too.


def start(main, flags, environment={}, prepare=lambda: None, output="output.txt"):
    """Runs a command in a process of its own, as from a shell -> the number of that process.

    prepare: called before it. output: the file for what it prints.
    """
    number = os.fork()
    if number:
        return number
    status = 70  # of a child that ends in an unforeseen way
    try:
        with open(output, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8")
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8")
        sys.argv = ["tracerl.py", *flags]
        os.environ.update(environment)
        # What a copy must not share with this process: workers, and a lock that dies with whoever is killed.
        grading.WORKERS.__init__()
        tqdm.set_lock(threading.RLock())
        prepare()
        runs.run_command(main)
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


def start_all(main, flags, number, prepare=lambda: None):
    """Starts a command on so many processes, as torchrun would -> their numbers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    whole = dict(WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1",
                 MASTER_PORT=port)
    return [start(main, flags, whole | dict(RANK=str(rank), LOCAL_RANK=str(rank)), prepare)
            for rank in range(number)]


def finish(process, seconds=60):
    """Waits for the end of a process -> its exit status; minus the signal that killed it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    pytest.fail(f"a process did not end: {Path('output.txt').read_text()}")


def wait_for(text, path, process):
    """Waits until a process has written a text into a file."""
    deadline = time.monotonic() + 60
    while not (os.path.exists(path) and text in Path(path).read_text()):
        is_alive = os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        assert is_alive and time.monotonic() < deadline, Path("output.txt").read_text()
        time.sleep(0.005)


MINE = """
def short(tokens):
    return -float(len(set(tokens)))

def lossy(logp):
    return logp.sum() * float("inf")
"""


@pytest.mark.parametrize("number, flags", [
    # Block attention, adapters. In mini-batches of two rollouts, some processes have no row at times.
    (3, [*SMALL, "--lora_rank=2", "--prompts=3", "--group_size=2", "--minibatches=3"]),
    # Full attention, sharded weights, a reward of one's own.
    (2, [*SMALL, "--model=full", "--reward=mine.py:short", "--minibatches=2", "--max_new_tokens=8"]),
], ids=["block, lora", "full, sharded"])
def test_many_processes_make_the_updates_of_one_and_one_goes_on_from_theirs(number, flags, folder):
    Path("mine.py").write_text(MINE)
    checkpoints.save_checkpoint(tiny.tiny_model(0, 4, "full"), tiny.tiny_tokenizer(), "full")
    flags = [*flags, "--advantage=value", "--value_warmup=0", "--tokens_per_micro_batch=300"]
    tracerl.main([*flags, "--steps=2", "--name=one"])  # first: what it imports, the copies need not import
    processes = start_all(tracerl.main, [*flags, "--steps=1", "--name=many"], number)
    assert [finish(process) for process in processes] == [0] * number, Path("output.txt").read_text()
    tracerl.main(["--resume", "--steps=2", "--name=many"])
    begun = load_file(f"{'full' if '--model=full' in flags else TINY}/model.safetensors")
    moved = distance(weights("one", 2), begun)
    for kind in ("model", "value/model"):
        assert moved > 0.02 and distance(weights("one", 2, kind), weights("many", 2, kind)) < 1e-3 * moved
    for one, many in zip(metrics("one"), metrics("many"), strict=True):
        assert one["skipped_updates"] == 0 and one["gap_max"] < 1e-4
        for key, value in one.items():
            assert many[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    assert len(metrics("one")) == 2


def test_a_killed_run_resumes_to_the_same_bits(folder):
    """Killed while it saves its second checkpoint, and once more at a random moment.

    The policy has not moved at the first checkpoint, since the value model learns alone. The run that is left
    in peace saves at its end only: so saving changes nothing, either.
    """
    flags = [*SMALL, "--advantage=value", "--value_warmup=1", "--steps=4"]
    tracerl.main([*flags, "--name=whole", "--save_every=0"])
    write_json = runs.write_json

    def die_while_saving():
        """Puts an end to the process before its second checkpoint is whole."""
        runs.write_json = lambda path, value: (
            os.kill(os.getpid(), signal.SIGKILL) if "step-2.partial" in path else write_json(path, value))

    process = start(tracerl.main, [*flags, "--name=killed", "--save_every=1"], prepare=die_while_saving)
    assert finish(process) == -signal.SIGKILL, Path("output.txt").read_text()
    assert set(os.listdir("runs/killed/checkpoints")) == {"step-1", "step-2.partial"}
    process = start(tracerl.main, ["--name=killed", "--resume"])
    wait_for('"step": 2', "runs/killed/metrics.jsonl", process)
    moment = random.uniform(0, 0.5)
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    tracerl.main(["--name=killed", "--resume"])
    assert metrics("killed") == metrics("whole") and len(metrics("whole")) == 4, moment
    for kind in ("model", "value/model"):
        whole, killed = weights("whole", 4, kind), weights("killed", 4, kind)
        assert all(torch.equal(whole[name], killed[name]) for name in whole), moment
    assert set(os.listdir("runs/killed/checkpoints")) == {"step-2", "step-3", "step-4"}  # the newest three


def test_ctrl_c_is_one_line_and_libraries_warn_of_nothing(folder):
    """Any warning would be an error."""
    flags = [*SMALL, "--steps=100000", "--save_every=0"]
    process = start(tracerl.main, flags, prepare=lambda: warnings.simplefilter("error"))
    wait_for("step   2", "output.txt", process)
    os.kill(process, signal.SIGINT)
    assert finish(process) == 130
    said = Path("output.txt").read_text()
    assert said.strip().splitlines()[-1].endswith(
        "tracerl.py: stopped. To go on with a run, repeat the command with --resume (eval_math.py: the "
        "same command again)")
    assert "Traceback" not in said


def test_the_process_that_fails_first_is_named_as_the_cause(folder):
    """The other one waits for it, and loses its connection. torchrun reports the earliest last words."""
    Path("mine.py").write_text(
        "import os\n\ndef fails_on_one(text):\n    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('a mistake on process 1')\n    return 0.0\n")
    prepare = lambda: os.environ.update(TORCHELASTIC_ERROR_FILE=f"words{os.environ['RANK']}.json")
    processes = start_all(tracerl.main, [*SMALL, "--reward=mine.py:fails_on_one"], 2, prepare)
    assert [finish(process) for process in processes] == [1, 2]
    words = [json.loads(Path(f"words{rank}.json").read_text()) for rank in range(2)]
    first = min(words, key=lambda said: said["timestamp"])  # as torchrun does: of equal ones the first
    assert first["message"] == "tracerl.py: error: a mistake on process 1 (--debug shows where)", words


# ------------------------------------------------------------------------------------------------------------
# Nothing is lost.


def test_a_run_is_never_replaced(folder):
    tracerl.main([*SMALL, "--steps=1", "--name=mine"])
    with pytest.raises(ValueError, match="runs/mine holds a run: go on with it .--resume., delete the folder"):
        tracerl.main([*SMALL, "--name=mine"])
    os.makedirs("runs/mine/checkpoints/step-7.partial/train_state")  # killed while it saved: this may go
    with runs.Run("mine", json.loads(Path("runs/mine/args.json").read_text()), resume=True) as run:
        run.begin()
    assert os.listdir("runs/mine/checkpoints") == ["step-1"] and len(metrics("mine")) == 1
    Path("runs/taken").write_text("a file")
    os.makedirs("runs/asked")
    Path("runs/asked/responses.jsonl").write_text("{}\n")  # of eval_math.py
    with pytest.raises(ValueError, match="runs/asked holds a run"):
        tracerl.main([*SMALL, "--name=asked"])
    with pytest.raises(FileExistsError, match="runs/taken"):
        runs.Run("taken", {})


def test_a_folder_is_old_or_new_whenever_the_command_is_killed(folder, monkeypatch):
    os.makedirs("whole")
    Path("whole/old").touch()

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), runs.replacing("whole") as partial:
        patch.setattr(runs.shutil, "rmtree", killed)
        os.makedirs(partial)
        Path(partial, "new").touch()
    assert os.listdir("whole") in (["old"], ["new"])
    os.makedirs("whole.old.partial/left")  # by a command that was killed later
    with runs.replacing("whole") as partial:
        Path(partial).mkdir(exist_ok=True)
        Path(partial, "newest").touch()
    assert "newest" in os.listdir("whole") and not os.path.exists("whole.old.partial")


def test_a_command_that_cannot_start_changes_nothing(folder):
    tracerl.main([*SMALL, "--steps=1"])
    args = Path("runs/tracerl/args.json").read_bytes()
    os.remove("test.jsonl")
    with pytest.raises(FileNotFoundError):
        tracerl.main(["--resume", "--steps=2"])
    assert len(metrics("tracerl")) == 1 and Path("runs/tracerl/args.json").read_bytes() == args
    for flags in (["--model=nowhere"], ["--eval_data=missing.jsonl"]):
        with pytest.raises(FileNotFoundError):
            tracerl.main([*SMALL, *flags, "--name=free"])
    with pytest.raises(KeyboardInterrupt), runs.Run("free", {}):  # nor does one that is stopped there
        raise KeyboardInterrupt
    with runs.Run("free", {}) as run:
        run.begin()


def test_two_commands_never_work_in_one_folder(folder):
    with runs.Run("r", {}):
        with pytest.raises(ValueError, match="runs/r is in use by another command: wait for it, end it, or choose"):
            runs.Run("r", {})

    def hold():
        """Works in the folder for long."""
        with runs.Run("r", {}) as run:
            run.begin()
            print("held")
            time.sleep(60)

    holder = start(hold, [])
    wait_for("held", "output.txt", holder)
    with pytest.raises(ValueError, match="in use"):
        runs.Run("r", {})
    os.kill(holder, signal.SIGKILL)  # the kernel lets go of the lock of whoever dies
    os.waitpid(holder, 0)
    with runs.Run("r", {}):
        pass


def test_the_log_is_whole_at_every_moment(folder, monkeypatch):
    with runs.Run("r", {}) as run:
        run.begin()
        for step in range(3):
            run.write(dict(step=step))
        lines = Path(run.path).read_text()
        monkeypatch.setattr(runs.os, "replace", lambda *paths: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run.keep_lines(run.lines()[:1])
        assert Path(run.path).read_text() == lines
        Path(run.path).write_text(lines + '{"step": 3')  # killed while it wrote
        assert run.lines() == [dict(step=0), dict(step=1), dict(step=2)]


def new_learner(seed=0):
    """A random model that has made one update."""
    learner = parallel.make_learner(random_model(seed=seed), 0.01, (0.9, 0.95))
    learner.model(torch.tensor([[3, 4, 5, 6]])).sum().backward()
    parallel.optimizer_step(learner)
    return learner


class file_size_limit:
    """Inside, no file of this process may grow beyond `limit` bytes: a disk that is full."""

    def __init__(self, limit):
        self.limit = limit

    def __enter__(self):
        self.kept = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.kept[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.kept)


def test_a_full_disk_is_a_clear_error_wherever_it_strikes(folder, monkeypatch):
    learner = new_learner()
    tokenizer = tiny.tiny_tokenizer()
    rollouts = decode(learner.model, random_prompts([5, 5]), max_new_tokens=8)
    full = lambda name: pytest.raises(OSError, match=f"{name} could not be written .*: free some space or make")
    with runs.Run("r", {}) as run:
        run.begin()
        run.tokenizer = tokenizer
        for step in (1, 2):
            run.write(dict(step=step, reward=0.5))
        run.progress["step"] = 1
        run.save([learner])
        run.progress["step"] = 2
        size = os.path.getsize("runs/r/checkpoints/step-1/model.safetensors")
        for limit in (20_000, size + 100):  # the weights do not fit; only the larger train state does not
            with file_size_limit(limit), full("runs/r/checkpoints/step-2"):
                run.save([learner])
        with file_size_limit(20_000), full("runs/r/checkpoint"):
            run.save_model(learner.model)
        with file_size_limit(10), pytest.raises(OSError, match="too large"):
            run.write(dict(step=3, text="longer than that"))
        with file_size_limit(10), full("summary.json"):
            run.finish(dict(text="longer than that"))
        with file_size_limit(1000), full("curves.png"):
            PLOT(run)
        with file_size_limit(1000), full("trace.html"):
            show.write_trace(run, rollouts, learner.model.config, tokenizer)
        left = {path.name for path in Path("runs/r").iterdir()}
        assert left == {"args.json", "checkpoints", "lock", "metrics.jsonl"}
        assert os.listdir("runs/r/checkpoints") == ["step-1"]
        run.restore([learner])
        assert run.progress["step"] == 1  # what was saved before is whole
        PLOT(run)
        show.write_trace(run, rollouts, learner.model.config, tokenizer)
        assert {"curves.png", "trace.html"} <= set(os.listdir("runs/r"))
    with file_size_limit(100), full("args.json"):
        runs.Run("s", dict(text="longer than that" * 10)).begin()
    assert not list(Path("runs").rglob("*.partial*"))


def test_a_checkpoint_that_lacks_the_files_of_another_machine_is_no_checkpoint(folder, monkeypatch):
    """Each process writes its own part. On another machine it may have written to another disk."""
    save = runs.dcp.save

    def save_elsewhere(state, checkpoint_id, no_dist):
        saved = save(state, checkpoint_id=checkpoint_id, no_dist=no_dist)
        next(Path(checkpoint_id).glob("*.distcp")).unlink()
        return saved

    monkeypatch.setattr(runs.dcp, "save", save_elsewhere)
    learner = parallel.make_learner(tiny.tiny_model(), 1e-3, (0.9, 0.95))
    with runs.Run("r", {}) as run:
        run.begin()
        run.progress["step"] = 1
        with pytest.raises(OSError, match="step-1 could not be written .*all machines need one file system"):
            run.save([learner])
    assert not runs.checkpoints_of("runs/r")


def test_processes_with_other_settings_or_data_do_not_train_together(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "gather", lambda own: own + [{**own[0], "dtype": "float32"}])
        with pytest.raises(ValueError, match="the processes of this run have different settings"):
            runs.Run("r", dict(dtype="bfloat16"))
    with runs.Run("s", {}) as run:
        monkeypatch.setattr(parallel, "from_first", lambda found: runs.mark([1]))
        run.check_data([1], "the problems")
        with pytest.raises(ValueError, match="another process has others"):
            run.check_data([2], "the problems")


def test_damaged_and_foreign_checkpoints_are_named_with_the_remedy(folder):
    learner = new_learner()

    def go_on(learner=learner):
        """What --resume does."""
        with runs.Run("r", {}, resume=True) as run:
            run.begin()
            run.restore([learner])
            return run.progress["step"] == 1

    with runs.Run("r", {}) as run:
        run.begin()
        run.restore([learner])  # nothing to go on from is no error
        run.write(dict(step=1))
        run.progress["step"] = 1
        run.save([learner])
    shutil.copytree("runs/r", "kept")
    state = "checkpoints/step-1/train_state"
    whole = Path(f"kept/{state}/__0_0.distcp").read_bytes()
    damaged = "step-1 cannot be resumed from .*Move it away"
    for name, content, message in [
            (f"{state}/__0_0.distcp", whole[:len(whole) // 2], damaged),
            (f"{state}/__0_0.distcp", None, damaged), (f"{state}/.metadata", b"", damaged),
            (f"{state}/progress.json", b'{"step": 1', "progress.json is damaged"),
            ("args.json", b"{", "args.json is damaged")]:
        path = Path("runs/r", name)
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            go_on()
        shutil.rmtree("runs/r")
        shutil.copytree("kept", "runs/r")
    foreign = parallel.make_learner(tiny.tiny_model(), 0.01, (0.9, 0.95))
    with pytest.raises(ValueError, match="step-1 cannot be resumed from .*damaged, or of another model"):
        go_on(foreign)
    assert go_on()


# ------------------------------------------------------------------------------------------------------------
# Nothing is wrong in silence.


def test_resume_takes_its_settings_and_its_data_from_the_run(folder):
    """With adapters: a checkpoint holds merged weights. Adapters, added to those, would count twice."""
    flags = [*SMALL, "--lora_rank=2", "--lr=1e-2"]
    tracerl.main([*flags, "--steps=2", "--name=whole"])
    tracerl.main([*flags, "--steps=1", "--name=parts"])
    tracerl.main(["--name=parts", "--resume", "--steps=2"])
    args = json.loads(Path("runs/parts/args.json").read_text())
    assert args["prompts"] == 4 and args["steps"] == 2 and metrics("parts") == metrics("whole")
    whole, parts = weights("whole", 2), weights("parts", 2)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(ValueError, match="other settings: lr was 0.01, is 0.5. Give the settings of the run"):
        tracerl.main(["--name=parts", "--resume", "--lr=0.5"])
    rows = Path("train.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    Path("train.jsonl").write_text("\n".join([*rows[:-1], json.dumps(last | dict(answer="7"))]))
    with pytest.raises(ValueError, match="the problems of --train_data or --eval_data have changed since"):
        tracerl.main(["--name=parts", "--resume", "--steps=3"])
    assert len(metrics("parts")) == 2


def strictly(path):
    """The lines of a file of JSON, as every other program reads it: without NaN and Infinity."""
    def refuse(word):
        """Called for what is no JSON."""
        raise ValueError(word)
    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


def test_metrics_are_json_whatever_happens(folder):
    Path("mine.py").write_text(MINE)
    tracerl.main([*SMALL, "--steps=1", "--loss=mine.py:lossy"])
    line, = strictly("runs/tracerl/metrics.jsonl")
    assert line["loss"] is None and line["gradient_norm"] is None and line["skipped_updates"] == 2
    with runs.Run("r", {}) as run:
        run.begin()
        run.write(dict(step=1, nan=math.nan, inf=-math.inf, reward=0.5))
        PLOT(run)  # and they can be drawn
    assert strictly("runs/r/metrics.jsonl") == [dict(step=1, nan=None, inf=None, reward=0.5)]


def test_metrics_go_to_other_programs_when_asked(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="wandb"), runs.Run("r", dict(wandb=True)) as run:
        run.begin()
    started = []
    logged = []

    def init(**settings):
        """A stand-in for wandb.init."""
        started.append(settings)
        return types.SimpleNamespace(log=lambda line, step: logged.append((step, line)),
                                     finish=lambda: logged.append("finish"))

    wandb = types.ModuleType("wandb")
    wandb.init = init
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with runs.Run("s", dict(wandb=True, lr=0.5)) as run:
        run.begin()
        run.write(dict(step=1, reward=0.5, loss=math.nan))
    assert logged == [(1, dict(step=1, reward=0.5, loss=None)), "finish"]
    assert started[0]["name"] == "s" and started[0]["config"]["lr"] == 0.5


def test_a_collapse_is_seen_and_said(folder, capsys):
    """One update per step: its own ratio, KL and clip say nothing. Drift does."""
    tracerl.main([*SMALL, "--steps=1", "--lr=0.1", "--minibatches=1"])
    line, = metrics("tracerl")
    assert line["ratio_max"] == 1 and line["kl"] == 0 and line["drift_kl"] > show.MAX_DRIFT
    assert "WARNING: step 1 moved the policy by" in capsys.readouterr().out


def test_the_line_of_a_step_has_the_names_of_the_log_and_says_if_nothing_was_learnt(capsys):
    line = dict(step=3, reward=1.0, kept_groups=0, gap=2e-7)
    show.say_step(line)
    show.say_step(line | dict(kl=0.0, drift_kl=0.001))
    show.say_step(line | dict(value_loss=0.5))
    idle, moved, alone = capsys.readouterr().out.splitlines()
    assert idle == "step   3  reward 1.000  kept_groups 0  gap 2.0e-07  nothing to learn from: no update"
    assert "kl 0.0000  drift_kl 0.0010" in moved and "learn" not in moved and "only" not in moved
    assert alone.endswith("value_loss 0.5000  gap 2.0e-07  value model only")


@pytest.mark.parametrize("compute", COMPUTES.values(), ids=COMPUTES)
def test_a_prompt_token_outside_the_vocabulary_is_named(compute):
    with pytest.raises(ValueError, match="token id 18 is outside the vocabulary of 18 tokens"):
        compute.generate(random_model(), [[3, 18]], [0], Decoding(max_new_tokens=4))


# ------------------------------------------------------------------------------------------------------------
# What a person sees.


def test_a_mistake_is_one_line_with_status_2(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/tracerl.py", *SMALL, "--model=nowhere"])
    with pytest.raises(SystemExit, match="2"):
        runs.run_command(tracerl.main)
    assert capsys.readouterr().err == (
        "tracerl.py: error: no checkpoint folder 'nowhere' (a hub id looks like JetLM/SDAR-4B-Chat) "
        "(--debug shows where)\n")
    monkeypatch.setattr(tracerl, "load_start", lambda args: 1 / 0)  # a mistake of ours shows where
    with pytest.raises(SystemExit, match="1"):
        runs.run_command(tracerl.main)
    assert "ZeroDivisionError" in capsys.readouterr().err
    # So does an error of a library, also where that lies in a virtual environment inside the project.
    code = compile("raise RuntimeError('CUDA out of memory')", str(ROOT / ".venv/lib/torch/x.py"), "exec")
    with pytest.raises(SystemExit, match="1"):
        runs.run_command(lambda: exec(code))
    assert "Traceback" in capsys.readouterr().err


def test_the_page_of_traces_plays(folder):
    """Slider, button and colours, in node with a stand-in for the page's elements."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    model = random_model()
    rollouts = decode(model, random_prompts([3, 3, 9, 9]), max_new_tokens=12, seed=1, eos_ids=())
    for i, r in enumerate(rollouts):
        r.group = i // 2
        r.reward = float(i % 2)
        r.advantage = [0.5] * 12
    with runs.Run("r", {}) as run:
        run.progress["step"] = 7
        show.write_trace(run, rollouts, model.config, tiny.tiny_tokenizer())
    page = Path("runs/r/trace.html").read_text()
    assert "Traces of RL step 7" in page and "ratio" not in page
    done = subprocess.run(["node", str(ROOT / "tests/page.js"), "runs/r/trace.html"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    num_tokens = sum(len(r.response) for r in rollouts)
    last = max(max(r.step_map) for r in rollouts)
    assert found["tokens"] == num_tokens and found["hidden_at_start"] == 0
    assert found["blocks"] == sum(len(rollout.blocks_of(len(r.prompt), len(r.response), 4)) for r in rollouts)
    assert found["rewards"] == ["1", "0", "1", "0"]  # the best response to a prompt, and the worst
    assert found["hidden_at_1"] == num_tokens - sum(r.step_map.count(1) for r in rollouts)
    assert found["playing"] == "Pause" and found["played"] == "Play" and found["hidden_at_end"] == 0
    assert found["output"] == f"after denoising step {last} of {last}" and found["by_advantage"].startswith("hsl(90 ")
