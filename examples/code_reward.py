"""examples/code_reward.py - a reward that runs the Python code of a response, and then the problem's tests.

    torchrun tracerl.py --model JetLM/SDAR-4B-Chat --train_data code.jsonl --eval_data code.jsonl \
        --reward examples/code_reward.py:passes_tests --instruction "" --name code

A line of code.jsonl: {"problem": "Write add(a, b) in Python, in a ```python block.", "answer":
"assert add(1, 2) == 3"}. The tests stand in place of the answer. The code never runs inside the trainer, but
in a process of its own. That process has limits of time, memory and file size, an empty folder, no
environment variables, and Python's flag -I.

This protects against mistakes, but not against malice: such code can read files and use the network. So train
in a container, or as a user who may do little.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile

SECONDS = 5
MEGABYTES = 512

# What the process runs. The limits also hold for the code, and for all processes that it starts. Code that
# ends before its tests are done never writes the secret word. (On a Mac memory is not limited.)
PROGRAM = f"""
import json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
if sys.platform != "darwin": resource.setrlimit(resource.RLIMIT_AS, ({MEGABYTES} << 20, {MEGABYTES} << 20))
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
code, tests, secret = json.load(sys.stdin)
space = dict(__name__="__main__")
exec(compile(code, "response", "exec"), space)
exec(compile(tests, "tests", "exec"), space)
print("\\n" + secret)
"""


def passes_tests(problem, text, rollout):
    """--reward: 1 if the last block of Python code in the response passes the problem's tests, else 0.

    Without such a block the whole response is run. A truncated response earns 0. Tests are a text or a list.
    (If tests hold \\boxed{...} or a last line ####, give a list: data.py keeps only such parts of a text.)
    """
    # Blocks of other languages are matched, too. Otherwise the end of one would be taken for a beginning.
    blocks = re.findall(r"```(\w*)[^\n]*\n(.*?)```", text, re.DOTALL)
    python = [code for language, code in blocks if language.lower() in ("", "py", "py3", "python", "python3")]
    code = python[-1] if python else text
    tests = problem.answer
    if not tests:
        raise ValueError(f"no tests for {str(problem.problem)[:80]!r}: put them into the column answer")
    if tests.startswith('["'):  # a list in the data comes as JSON
        tests = "\n".join(json.loads(tests))
    return 0.0 if rollout.is_truncated else float(succeeds(code, tests))


def succeeds(code, tests):
    """Whether code, then tests, run to their end without an error."""
    secret = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", PROGRAM], cwd=folder, env={}, stdin=subprocess.PIPE, stdout=out,
            stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            process.communicate(json.dumps([code, tests, secret]).encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired:  # it sleeps or waits, which takes no CPU time
            pass
        finally:
            stop(process)
        out.seek(0)
        return out.read().endswith(f"\n{secret}\n".encode())


def stop(process):
    """Ends a process and its group. (A child that has begun a session of its own survives.)"""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        pass
    process.wait()
