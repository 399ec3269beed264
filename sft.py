"""sft.py - how the starting model is made.

Supervised fine-tuning of a block diffusion model: hide some tokens of every block, and predict them from
the rest of the block and the clean blocks before it. The rows are laid out as in TraceRL itself, by
rollout.build_rows. What differs: the views are random, what fills the block behind eos is trained as well,
and the loss is a plain log-likelihood.

    response, K = 4    1 0 1 ;   1 9 1 ;   ...
    views              1 ? ? ;   ? ? ? ?   ...

One view per block: k of its 4 tokens hidden, k uniform in 1..4. Loss: minus the log-probability of these.
(In this file a step is an update; but those of a step map are denoising steps, as everywhere.)

From an autoregressive Qwen3 checkpoint this makes a block diffusion model (the recipe of SDAR, arXiv
2510.06303); a trained model learns long chains of thought in the same way, from long examples.

    python sft.py                     # the tiny model on embedded arithmetic, one or two minutes
    torchrun --nproc_per_node=8 sft.py --model Qwen/Qwen3-4B --data solutions.jsonl --name qwen3-block

Read in this order: to_examples, noise_views, sft_loss, train_step, train; the warm start is the embedded
default of tracerl.py, and plumbing/tiny.py makes its model.

Left out:
  1. a loss on the prompt: only the response is hidden and predicted;
  2. packing short examples into one row on a CPU (on a GPU rows are packed: plumbing/packing.py).
"""

import functools
import hashlib
import json
import os

import torch

import eval_math
import rollout
from plumbing import checkpoints, packing, parallel, runs
from plumbing.tiny import tiny_model, tiny_tokenizer
from rollout import Rollout

# ------------------------------------------------------------------------------------------------------------
# Examples, views, loss.


def to_examples(problems, tokenizer, config, max_new_tokens):
    """Worked problems -> list[Rollout], the record that training rows are made
    from. Responses of more than max_new_tokens, eos included, are left out.

    The response is filled up with eos: to its block's end, or (full attention) to the end of the canvas. The
    filling is trained as well: in decoding it is context for the tokens before it, and may be revealed
    before them (with --views trace it comes last).
    """
    if not config.eos_ids:
        raise ValueError("this checkpoint names no eos token: without one a response cannot end")
    # The first eos id is the one to teach: <|im_end|> where a chat model has it. At
    # decoding any of them ends a response.
    eos, K, examples = config.eos_ids[0], config.block_size, []
    for p in problems:
        # An answer alone is no solution: there would be nothing to imitate but the last line.
        if not p.solution:
            raise ValueError(f"no solution to learn from: {str(p.problem)[:80]!r}")
        # Text is made into tokens once, here; from here on the record is token ids.
        response = eval_math.encode(p.solution, tokenizer) + [eos]
        # A step map says when each token was revealed, so that --views trace can rebuild the states. Without
        # one the solution counts as written from left to right, one token a step.
        steps = list(p.step_map or range(1, len(response)))
        if len(steps) != len(response) - 1:
            raise ValueError(f"{len(steps)} steps in the step map of {len(response) - 1} tokens: "
                             f"{str(p.problem)[:80]!r}")
        if len(response) > max_new_tokens:  # it could not be decoded in that room either
            continue
        # K = 4, 9 prompt tokens, 6 of response with eos: 15 tokens, so that 1 more fills the block
        filling = max_new_tokens - len(response) if config.is_full else -(len(p.tokens) + len(response)) % K
        response += [eos] * filling
        # The end comes last: after steps 1..5, eos and one token of filling are steps 6 and 7.
        steps += range(max(steps) + 1, max(steps) + 2 + filling)
        # Full attention: every forward of the decoder will see all max_new_tokens
        # places, so the example must too.
        canvas = len(response) if config.is_full else 0
        examples.append(Rollout(p.tokens, response, len(response), steps, canvas=canvas))
    return examples


def noise_views(rollout, block, shrink, rng):
    """One view per block (full attention: of the response): k of its c tokens hidden, k uniform in 1..c."""
    # k uniform, not each token by a coin: with a coin of 0.5 a block of 4 would be wholly hidden only once in
    # 16, and wholly hidden is how every block begins when it is decoded.
    hidden = sorted(rng.sample(block, rng.randint(1, len(block))))
    return [(hidden, hidden)]


# --views. random: the views above, not rollout.random_views; trace: by the step map of the data.
VIEWS = dict(random=noise_views, trace=rollout.trace_views)


def sft_loss(logp, masked_share, normalizer, is_weighted):
    """Minus the log-likelihood of the hidden tokens over the whole update's
    normaliser; logp, masked_share (N,).

    is_weighted: each token by 1 / t, t the hidden share of its block. A token is hidden with probability t,
    so that the sum is then an unbiased estimate over ALL response tokens: the diffusion bound, normalised by
    their number. Without weights (the authors' choice), normalised by the number of hidden tokens.
    """
    return -(logp / masked_share if is_weighted else logp).sum() / normalizer


def train_step(model, optimizer, examples, views, is_weighted, max_tokens):
    """One update on a batch of examples, the same for any number of processes -> (loss, gradient norm)."""
    # Every process has the same batch, builds the rows of its share of it, and runs as many micro-batches as
    # the others (see tracerl.own_rows).
    config = model.config
    built = rollout.build_rows(parallel.share(examples), config, config.block_size, views)
    parts = packing.micro_batches(built, max_tokens, config.pad_id, model.device)
    parts = packing.with_dummies(parts, config.pad_id, model.device)
    hidden = torch.tensor(packing.count_targets(parts), device=model.device)
    hidden = int(parallel.add_up(hidden))
    # One number for the whole update, taken before the split: a mean per micro-batch or per process would
    # make the gradient depend on how the batch was cut.
    normalizer = sum(len(r.response) for r in examples) if is_weighted else hidden
    total = torch.zeros((), device=model.device)
    for part in parts:
        logp, _ = rollout.forward_rows(model, part)
        loss = sft_loss(logp, part.targets.masked_share, normalizer, is_weighted)
        # The parts' losses are shares of one sum, so that their gradients simply add.
        parallel.backward(loss, model, part is parts[-1])
        total += loss.detach()
    norm, _ = parallel.optimizer_step(model, optimizer, 1.0)
    return float(parallel.add_up(total)), norm


# ------------------------------------------------------------------------------------------------------------
# The loop.


def learning_rate(step, peak, warmup, cooldown, decay_start):
    """Up over `warmup` steps, level, from decay_start on down to a tenth over `cooldown` steps."""
    # The last, small steps average out the noise of masks and batches. warmup 30, cooldown 200, decay_start
    # 500: full size from step 29 to 499, 0.55 of it at step 599, a tenth from step 699 on.
    cooled = max(0, step - decay_start + 1) / cooldown
    return peak * min((step + 1) / warmup, 1 - 0.9 * min(1.0, cooled))


@functools.lru_cache(maxsize=2)
def shuffled(number, seed):
    """A seeded permutation of range(number)."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()


def draw_batch(examples, step, args):
    """The examples of an update, every epoch in an order of its own, each with the seed of its masks."""
    # 130 examples in batches of 64: two updates an epoch; the two that are left over wait for another epoch,
    # with another order.
    epoch, turn = divmod(step, len(examples) // args.batch_size)
    order = shuffled(len(examples), args.seed * 1_000_003 + epoch)
    batch = [examples[i] for i in order[turn * args.batch_size:(turn + 1) * args.batch_size]]
    for i, r in enumerate(batch):
        # Views draw from random.Random(r.seed): another epoch hides other tokens, a
        # resumed run hides the same.
        r.seed = (args.seed * 1_000_003 + step) * 1_000_003 + i
    return batch


def train(model, tokenizer, examples, dev_problems, args, run):
    """The loop. Stops after args.steps, or earlier: once accuracy on the development problems reaches
    args.stop_accuracy, the learning rate goes down over args.cooldown steps and training ends.

    Order and masks follow from the step, the learning rate from the step and `decay_start`: so a run resumes
    from any checkpoint."""
    # betas of AdamW: the tiny model was tuned with these; reinforcement learning uses its own.
    optimizer = parallel.make_optimizer(model, args.lr, (0.9, 0.98), args.weight_decay)
    # FORK HERE (what is hidden): --views file.py:function, with the signature of noise_views.
    views = runs.load_function(args.views, VIEWS, "--views")
    # What a checkpoint holds: weights and moments of these, and `progress`. All else follows from the step.
    trainers, line = [(model, optimizer)], {}
    progress = run.restore(trainers) if args.resume else None
    progress = progress or dict(step=0, decay_start=None)
    end = max(1, args.steps - args.cooldown)  # where the learning rate goes down at the latest
    bar = parallel.progress(range(progress["step"], args.steps), "sft")
    for step in bar:
        decay_start = min(progress["decay_start"] or end, end)  # by accuracy, or by the number of steps
        if step >= decay_start + args.cooldown:
            break
        lr = learning_rate(step, args.lr, args.warmup, args.cooldown, decay_start)
        parallel.set_learning_rate(optimizer, lr)
        # The same batch on every process, which takes its share of it.
        loss, norm = train_step(model, optimizer, draw_batch(examples, step, args), views, args.weighted,
                                args.tokens_per_micro_batch)
        line = dict(step=step + 1, loss=loss, gradient_norm=norm, lr=lr)  # one line of metrics.jsonl
        if dev_problems and (step + 1) % args.eval_every == 0:
            # Accuracy by decoding, not the loss: a loss can still fall when the answers are already right.
            found = eval_math.evaluate(
                model, tokenizer, dev_problems, max_new_tokens=args.max_new_tokens, seed=args.seed)
            line["accuracy"] = found["accuracy"]
        # The warm start stops on accuracy, not on a number of updates: the skill comes
        # suddenly, at another time from each seed, and a warm start that is too good leaves
        # reinforcement learning nothing to do.
        is_reached = args.stop_accuracy is not None and line.get("accuracy", 0) >= args.stop_accuracy
        if progress["decay_start"] is None and is_reached:
            progress["decay_start"] = step + 1
        if args.stop_accuracy is not None and progress["decay_start"] is None and step + 1 == end:
            parallel.say(f"sft: accuracy did not reach {args.stop_accuracy} in {step + 1} updates; "
                         "going on from here")
        run.write(line)
        if (step + 1) % args.eval_every == 0:
            parallel.say(describe_line(line))
        progress["step"] = step + 1
        if args.save_every and (step + 1) % args.save_every == 0:
            run.save(tokenizer, trainers, progress, args.keep_checkpoints)
    if line and not (args.save_every and progress["step"] % args.save_every == 0):  # the end is always saved
        run.save(tokenizer, trainers, progress, args.keep_checkpoints)
    bar.close()
    if not line:
        parallel.say(f"sft: all of {progress['step']} updates were made before")
    elif progress["step"] % args.eval_every:  # else it has just been said
        parallel.say(describe_line(line))


def describe_line(line):
    """One line of the terminal."""
    accuracy = f", accuracy on development problems {line['accuracy']:.3f}" if "accuracy" in line else ""
    return f"sft: update {line['step']}, loss {line['loss']:.3f}{accuracy}"


# Defaults of the tiny model. 2,700 updates of 64 examples are 8.6 epochs; the learning rate is large because
# the model is small; a canvas of 20 tokens holds every solution.
TINY = dict(
    data="arithmetic", steps=2700, lr=6e-3, weight_decay=0.2, max_new_tokens=20,
    save_every=0, tokens_per_micro_batch=4096, dtype="float32", attention="block")
REAL = dict(  # defaults with --model
    steps=1000, lr=1e-5, weight_decay=0.0, max_new_tokens=2000, save_every=200,
    gradient_checkpointing=True, dtype="bfloat16" if torch.cuda.is_available() else "float32")


def parse_args(argv=None):
    """The flags of sft.py."""
    parser = runs.make_parser("Supervised fine-tuning of a block diffusion model.")
    flag = parser.add_argument_group("most used").add_argument
    flag("--model", help="checkpoint folder or hub id; without it, a new tiny model")
    flag("--data", help="embedded arithmetic or sudoku, or a file or hub id with problem and solution, "
         "prompt and response, or messages; optionally step_map")
    flag("--dev_data", help="problems with answers for --eval_every; the embedded ones with the tiny model")
    flag("--steps", type=runs.positive_int, help="most updates")
    flag("--batch_size", type=runs.positive_int, default=64, help="examples per update")
    flag("--lr", type=runs.positive, help="peak learning rate of AdamW")
    flag("--max_new_tokens", type=runs.positive_int,
         help="longer responses are skipped and counted; full attention: length of the canvas")
    flag("--views", default="random", help="what is hidden. random: some tokens of every block (full "
         "attention: of the response); trace: by the step map of the data (left to right where there is "
         "none); or file.py:function")
    flag("--block_size", type=runs.positive_int, help="K; None is the checkpoint's own, 4 for the tiny model")
    flag = parser.add_argument_group("training").add_argument
    flag("--weighted", action="store_true",
         help="weight each hidden token by 1 / hidden share of its block (the diffusion bound)")
    flag("--warmup", type=runs.positive_int, default=30, help="updates of rising learning rate")
    flag("--cooldown", type=runs.positive_int, default=200,
         help="updates of falling learning rate at the end")
    flag("--weight_decay", type=runs.not_negative, help="of AdamW, on matrices")
    flag("--stop_accuracy", type=runs.share,
         help="start the cooldown at this accuracy on development problems")
    flag("--eval_every", type=runs.positive_int, default=100, help="updates between evaluations on those")
    flag("--slip", type=runs.share, default=0.6, help="embedded data: how often the pupil forgets a carry")
    flag("--attention", choices=("block", "full"),
         help="of the tiny model, or of a checkpoint that leaves it open (a2d-qwen3)")
    runs.add_prompt_flags(parser, eval_math.PROMPT_STYLES, eval_math.INSTRUCTION)
    runs.add_training_flags(parser, "sft")
    # Two tables of defaults, and with --resume the settings of the run itself.
    args = runs.parse(parser, argv, TINY, REAL)
    if args.data is None:
        parser.error("--model needs --data")
    if args.dev_data is None and args.data in eval_math.EMBEDDED:
        args.dev_data = f"{args.data}-dev"
    if args.model is None and (args.lora_rank or args.gradient_checkpointing):
        parser.error("--lora_rank and --gradient_checkpointing need --model: the tiny model is trained whole")
    if args.stop_accuracy is not None and args.dev_data is None:
        parser.error("--stop_accuracy needs --dev_data")
    if args.weighted and args.views == "trace":
        parser.error("--weighted needs random views: every token of a trace is a target once anyhow")
    return args


def main(argv=None):
    """Trains and saves runs/<name>/checkpoint -> its path."""
    args = parse_args(argv)
    parallel.start_processes(args.device, args.model is None, args.dtype == "bfloat16")
    with runs.Run(args.name, vars(args), args.resume, args.overwrite) as run:  # a taken name is said at once
        if args.model is None:
            model, tokenizer = tiny_model(args.seed, args.block_size or 4, args.attention), tiny_tokenizer()
            model.to(parallel.default_device())
            parallel.shard(model, model.layers)
        else:
            model, _, tokenizer = checkpoints.load_to_train(args.model, args)
        examples = load_examples(tokenizer, model.config, args)
        dev_problems = eval_math.load_prompts(args.dev_data, tokenizer, args)[:200] if args.dev_data else []
        run.begin()
        train(model, tokenizer, examples, dev_problems, args, run)
        path = run.save_model(model, tokenizer)
    parallel.say(f"sft: the model is in {path}")
    return path


def load_examples(tokenizer, config, args):
    """The training data, by the flags -> list[Rollout]. ValueError if they are fewer than a batch."""
    if args.data in eval_math.EMBEDDED:
        problems = eval_math.EMBEDDED[args.data]("train", 20000, args.seed, args.slip)
        problems, _ = eval_math.encode_prompts(problems, tokenizer, args.max_prompt_tokens, args.instruction)
    else:
        problems = eval_math.load_prompts(args.data, tokenizer, args, needs_answer=False)
    examples = to_examples(problems, tokenizer, config, args.max_new_tokens)
    if len(examples) < args.batch_size:
        raise ValueError(f"{len(examples)} examples with at most {args.max_new_tokens} tokens are fewer "
                         f"than a batch of {args.batch_size}: lower --batch_size or raise --max_new_tokens")
    parallel.say(f"sft: {len(examples)} examples; skipped {len(problems) - len(examples)} long responses")
    return examples


# ------------------------------------------------------------------------------------------------------------
# The warm start of the embedded default. The method ends here.


def warm_start(seed, block_size=4, attention="block", task="arithmetic"):
    """The embedded default's starting model -> checkpoint folder; made once for each seed and setting."""
    # stop_accuracy, by trying: high enough that most groups hold right and wrong responses, low enough to
    # leave room. lr: full attention learns this more slowly, and at 6e-3 not from every seed.
    stop_accuracy = 0.2 if attention == "full" else 0.4 if task == "arithmetic" else 0.3
    settings = dict(data=task, seed=seed, block_size=block_size, attention=attention,
                    stop_accuracy=stop_accuracy, lr=2e-3 if attention == "full" else 6e-3)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    # The name holds a hash of all settings: other settings or defaults make another warm start.
    everything = json.dumps(vars(parse_args(flags)), sort_keys=True)
    name = f"warm-start-{hashlib.sha256(everything.encode()).hexdigest()[:8]}"
    checkpoint = os.path.join("runs", name, "checkpoint")
    # All processes look for the checkpoint at the same moment, before anyone makes it.
    parallel.barrier()
    if os.path.isdir(checkpoint):
        parallel.say(f"warm start: reusing {checkpoint}")
        return checkpoint
    parallel.say(f"warm start: fine-tuning a tiny model on the work of a careless pupil -> {checkpoint}")
    # On the device of the run that this one is for.
    return main([*flags, f"--name={name}", f"--device={parallel.CHOSEN['device'] or 'cpu'}", "--overwrite"])


if __name__ == "__main__":
    runs.run_command(main)
