"""plumbing/player.py - plays a decoding in the terminal: what `python rollout.py` shows."""

import sys
import time
from types import SimpleNamespace

import rollout
from plumbing import check, flags, machine, runs
from plumbing.prompts import Prompting, encode_prompts
from rollout import Decoding

MASK = "\u2591"


def play(r, tokenizer, seconds=0.0):
    """Plays a Rollout, coloured by denoising step. If the output is no terminal, prints a line per step."""
    is_terminal = sys.stdout.isatty()
    last = max(r.step_map)
    texts = [tokenizer.decode([token]) for token in r.response]
    if is_terminal:  # neighbouring denoising steps have different backgrounds, of the colours 17 to 230
        texts = [f"\033[48;5;{17 + 30 * at % 214}m{text}\033[0m" for text, at in zip(texts, r.step_map)]
    prompt = tokenizer.decode(r.prompt)
    if not is_terminal:
        print(prompt)
    for step in range(last + 1):
        line = "".join(text if at <= step else MASK for text, at in zip(texts, r.step_map))
        # A terminal's screen is cleared before each step: a response may have many lines.
        start = f"\033[2J\033[H{prompt}\n" if is_terminal else f"step {step:3d}  "
        print(start + line, flush=True)
        time.sleep(seconds * is_terminal)


def main(argv=None):
    """Decodes one prompt and plays it -> Rollout, model, tokenizer. With --check: see check.check."""
    is_tiny = machine.is_tiny(flags.peek(argv, "--model"))
    groups = {"decoding": Decoding, "prompts": Prompting, "machine": machine.Inference}
    parser = flags.make_parser("Decode one prompt, and play it in the terminal.", groups, is_tiny)
    flag = parser.add_argument
    flag("--model", help="checkpoint folder or hub id; None: the tiny model")
    flag("--prompt", default="894+396=", help="text that the model answers")
    flag("--check", metavar="FILE", help="instead of decoding, replay the traces in this file, which another "
         "engine recorded; plumbing/check.py describes the format")
    flag("--seed", type=int, default=0, help="random seed of the draws")
    flag("--seconds", type=float, default=0.3, help="seconds between two denoising steps, in a terminal")
    # Nothing is appended to --prompt. load_to_answer reads args.ar, which is a flag of eval_math.py only.
    parser.set_defaults(instruction="", ar=None)
    args = flags.parse(parser, groups, argv)
    model, tokenizer, compute = machine.load_to_answer(args)
    if args.check is not None:
        return check.check(model, args.check, compute, args.temperature)
    problem = SimpleNamespace(problem=args.prompt)
    encode_prompts([problem], tokenizer, flags.read_flags(Prompting, args))
    r, = rollout.generate_everywhere(
        model, [problem.tokens], [args.seed], flags.read_flags(Decoding, args), compute)
    play(r, tokenizer, args.seconds)
    return r, model, tokenizer


if __name__ == "__main__":
    runs.run_command(main)
