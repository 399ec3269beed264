"""plumbing/player.py - one decoding, to watch: `python rollout.py --model PATH --prompt "12+34="`."""

import sys
import time

from plumbing import checkpoints, runs

HIDDEN = "\u2591"


def main(rollout, argv=None):
    """Decodes one prompt with the functions of the module rollout.py, and shows how -> Rollout, model,
    tokenizer."""
    parser = runs.make_parser("Decode one prompt, and play it in the terminal.")
    flag = parser.add_argument
    flag("--model", required=True, help="checkpoint folder or hub id")
    flag("--prompt", required=True)
    flag("--strategy", choices=rollout.STRATEGIES, default="dynamic", help="what a denoising step reveals")
    flag("--block_size", type=runs.positive_int, help="K, if not the checkpoint's own")
    flag("--seed", type=int, default=0, help="of the draws")
    flag("--seconds", type=runs.not_negative, default=0.3, help="between two steps")
    runs.add_decoding_flags(parser, rollout.CACHES)
    args = parser.parse_args(argv)
    model, tokenizer = checkpoints.load_model(args.model, args.block_size)
    text = args.prompt
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=False).input_ids
    r, = rollout.generate(model, [prompt], seed=args.seed, block_size=args.block_size,
                          **runs.decoding_settings(args))
    play(r, tokenizer, args.seconds)
    return r, model, tokenizer


def play(r, tokenizer, seconds=0.0):
    """Plays a decoding in the terminal, coloured by step; a line per step where the output is no terminal."""
    is_terminal, last = sys.stdout.isatty(), max(r.step_map)
    texts = [tokenizer.decode([token]) for token in r.response]
    # 256 colours: 17 to 231 are a cube
    colour = lambda text, at: f"\033[48;5;{17 + 30 * at % 214}m{text}\033[0m" if is_terminal else text
    print(tokenizer.decode(r.prompt))
    for step in range(last + 1):
        shown = [colour(text, at) if at <= step else HIDDEN for text, at in zip(texts, r.step_map)]
        print(("\033[2K\r" if is_terminal else f"step {step:3d}  ") + "".join(shown),
              end="" if is_terminal and step < last else "\n", flush=True)
        time.sleep(seconds * is_terminal)
