"""plumbing/grading/workers.py - the comparison runs in processes that may be killed.

A response may hold any text. So only a child process parses its answer and computes with it. The kernel
limits the memory and the CPU time of that process. The training process finds the answer in the response,
spells it in one way (both take bounded time), and gets a yes or a no.
"""

import atexit
import functools
import json
import os
import queue
import subprocess
import sys
import threading

COMMAND = "from plumbing.grading.workers import work; work()"
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


class Workers:
    """Two persistent processes that compare answers, with kernel limits on memory and on CPU time per check.

    They are started when first needed, as new programs: never forked from a process with threads or CUDA. If
    a worker dies of a check, that answer is wrong, and a new worker is started. The limit is on CPU time, so
    a usual load of the machine changes no verdict. The wall clock ends checks that sleep, or that hardly ever
    get a CPU.
    """

    NUMBER = 2
    CPU_SECONDS = 2
    WALL_SECONDS = 20
    MEMORY = 1 << 30

    def __init__(self):
        self.idle = queue.Queue()
        self.lock = threading.Lock()
        self.started = 0
        self.killed = 0
        self.ask = functools.lru_cache(maxsize=100_000)(self.run)  # a question that was asked is remembered

    def run(self, answer, gold):
        """(verdict, how) of an answer and a gold answer: one check in the next idle worker."""
        with self.lock:
            if self.started < self.NUMBER:
                self.started += 1
                self.idle.put(None)
        process = self.idle.get()
        reply = ""
        try:
            if process is not None and process.poll() is not None:  # it died between two checks
                self.bury(process)
                process = None
            process = process or self.start()
            timer = threading.Timer(self.WALL_SECONDS, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps([answer, gold]) + "\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                timer.cancel()
        finally:
            # If there is no reply, the worker is dead, or this wait was interrupted. In the second case the
            # worker must end, since its late reply would be taken for the verdict on the next question.
            if process is not None and not reply:
                process.kill()
                self.bury(process)
                process = None
            self.idle.put(process)
        if reply:
            return json.loads(reply), "expression"
        print(f"grading: a check went beyond its limits, so this answer counts as wrong: {answer!r}",
              file=sys.stderr)
        return False, "killed"

    def start(self):
        """A new worker, ready."""
        process = subprocess.Popen(
            [sys.executable, "-c", COMMAND], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if process.stdout.readline() != "ready\n":
            # Without this error, all of its checks would count as wrong.
            raise RuntimeError(f"the grading worker does not start: `python -c {COMMAND!r}` shows why")
        atexit.register(process.kill)
        return process

    def bury(self, process):
        """Counts a worker that died, and closes its pipes, which count as open files of the run."""
        process.wait()
        atexit.unregister(process.kill)
        process.stdout.close()
        try:
            process.stdin.close()
        except BrokenPipeError:  # the pipe still holds a question that nobody has read
            pass
        with self.lock:
            self.killed += 1


WORKERS = Workers()


def work():
    """The life of a worker: one question in, one verdict out, until its input closes."""
    import resource

    import mpmath  # noqa: F401 - before the limits, and so that a worker without it does not start

    from plumbing.grading.compare import is_same
    limit_resource(resource.RLIMIT_AS, Workers.MEMORY)
    limit_resource(resource.RLIMIT_CORE, 0)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints goes to stderr: it is no reply
    print("ready", file=replies)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit_resource(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + 1 + Workers.CPU_SECONDS)
        try:
            verdict = is_same(*json.loads(line))
        except Exception:  # whatever error a model's text causes, its answer is not right
            verdict = False
        print(json.dumps(bool(verdict)), file=replies)


def limit_resource(kind, limit):
    """Sets a limit of the kernel on this process. A lower hard limit stays.

    macOS is reported to refuse a limit on memory, because a process holds more addresses there from the
    start. So on a Mac memory has no limit.
    """
    import resource
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    if sys.platform != "darwin" or kind != resource.RLIMIT_AS:
        resource.setrlimit(kind, (limit, hard))
