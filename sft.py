"""sft.py - how the starting model is made.

Supervised fine-tuning of a block diffusion model: hide some tokens of every block, predict them from the rest
of the block and the clean blocks before it. The rows are those of TraceRL itself (rollout.build_rows), with
one random view per block in place of the views of a trace. From an autoregressive Qwen3 checkpoint this makes
a block diffusion model (SDAR's recipe).

    python sft.py                                        # the tiny model on embedded arithmetic, two minutes
    torchrun --nproc_per_node=8 sft.py --model Qwen/Qwen3-4B --data solutions.jsonl --run_name qwen3-block

Reading order: to_examples, sft_noise, sft_loss, train, main.
"""

import argparse
import functools
import hashlib
import json
import os

import torch

import eval_math
import model as lm
import rollout
from rollout import Rollout


def to_examples(problems, tokenizer, config, max_new_tokens):
    """Worked problems -> list[Rollout] with the response filled up with eos: to its block's end, or (full
    attention) to the end of the canvas. The filling is trained as well: in decoding it is context for the
    tokens before it."""
    if not config.eos_ids:
        raise ValueError("this checkpoint names no eos token: without one a response cannot end")
    eos, K, examples = config.eos_ids[0], config.block_size, []
    for p in problems:
        if not p.solution:
            raise ValueError(f"no solution to learn from: {str(p.problem)[:80]!r}")
        response = tokenizer(p.solution, add_special_tokens=False).input_ids + [eos]
        steps = list(p.step_map or range(1, len(response)))
        if len(steps) != len(response) - 1:
            raise ValueError(f"{len(steps)} steps in the step map of {len(response) - 1} tokens: "
                             f"{str(p.problem)[:80]!r}")
        if len(response) > max_new_tokens:
            continue
        room = 1 + (max_new_tokens - len(response) if config.is_full
                    else -(len(p.tokens) + len(response)) % K)
        response += [eos] * (room - 1)
        steps += range(max(steps) + 1, max(steps) + 1 + room)  # the end comes last
        examples.append(Rollout(p.tokens, response, len(response), steps,
                                canvas=len(response) if config.is_full else 0))
    return examples


def sft_noise(is_response, span, generator):
    """Hides tokens at random: in each span (block, or the row) k of its c response tokens, k uniform in 1..c.

    is_response bool (N, L) -> is_masked bool (N, L), weight float32 (N, L): 1 / t with t = k / c the masked
    share, the factor that makes the sum over masked tokens an unbiased diffusion bound (METHOD: SFT).
    """
    N, L = is_response.shape
    cells = is_response.view(N, L // span, span)
    count = cells.sum(-1, keepdim=True)
    k = 1 + (torch.rand(count.shape, generator=generator) * count).long().clamp(max=(count - 1).clamp(min=0))
    chance = torch.rand(cells.shape, generator=generator).masked_fill(~cells, 2.0)
    is_masked = (chance.argsort(-1).argsort(-1) < k) & cells
    return is_masked.view(N, L), (count / k).expand_as(cells).reshape(N, L)


def sft_loss(logp, weight, normalizer):
    """Minus the weighted log-likelihood of masked tokens, all (N,), over the whole update's normaliser."""
    return -(weight * logp).sum() / normalizer


def sft_rows(examples, config, generator):
    """Random views of a batch -> (Rows, weight (N, L) by rollout and absolute position)."""
    tokens, steps, lengths = rollout.canvases(examples, config)
    prompts = torch.tensor([len(r.prompt) for r in examples])
    is_masked, weight = sft_noise(
        steps > 0, tokens.shape[1] if config.is_full else config.block_size, generator)
    return rollout.build_rows(
        tokens, lengths, prompts, is_masked[:, None], is_masked[:, None], config), weight


def train_step(model, optimizer, examples, seed, is_weighted, max_tokens, follows_trace=False):
    """One update on a batch of examples, the same for any number of processes -> (loss, gradient norm).

    follows_trace: the views of each example's step map, every token a target once, in place of random views.
    """
    if follows_trace:
        rows, weight = rollout.trace_rows(examples, model.config), None
    else:
        rows, weight = sft_rows(examples, model.config, torch.Generator().manual_seed(seed))
    is_weighted = is_weighted and not follows_trace
    normalizer = sum(len(r.response) for r in examples) if is_weighted else len(rows.target)
    prompts, total = torch.tensor([len(r.prompt) for r in examples], device=model.device), 0.0
    weight = weight.to(model.device) if is_weighted else None
    for part in rollout.micro_batches(rows, max_tokens, model.device, is_shared=True):
        logp, _ = rollout.forward_rows(model, part)
        scale = weight[part.owner, part.place + prompts[part.owner]] if is_weighted else torch.ones_like(logp)
        loss = sft_loss(logp, scale, normalizer)
        loss.backward()
        total += float(loss.detach())
    norm, _ = lm.optimizer_step(model, optimizer, 1.0)
    return lm.over_processes(sum, total)[0], norm


def learning_rate(step, peak, warmup, cooldown, decay_start):
    """Up over `warmup` steps, level, from decay_start (if set) down to a tenth over `cooldown` steps."""
    down = 1.0 if decay_start is None else 1 - 0.9 * min(1.0, (step - decay_start + 1) / cooldown)
    return peak * min((step + 1) / warmup, down)


@functools.lru_cache(maxsize=2)
def shuffled(number, seed):
    """A seeded permutation of range(number)."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()


def train(model, tokenizer, examples, dev_problems, args, log):
    """The loop. Stops after args.steps, or earlier: once accuracy on the development problems reaches
    args.stop_accuracy, the learning rate goes down over args.cooldown steps and training ends.

    Order, masks and learning rate are functions of the step, so a run resumes from any checkpoint."""
    optimizer = lm.make_optimizer(model, args.lr, (0.9, 0.98), args.weight_decay)
    trainers, size, line = [(model, optimizer)], args.batch_size, {}
    progress = args.resume and log.restore(trainers) or dict(step=0, decay_start=None)
    bar = lm.progress(range(progress["step"], args.steps), "sft")
    for step in bar:
        decay_start = progress["decay_start"]
        if decay_start is not None and step >= decay_start + args.cooldown:
            break
        epoch, turn = divmod(step, len(examples) // size)
        order = shuffled(len(examples), args.seed * 1_000_003 + epoch)
        batch = [examples[i] for i in order[turn * size:(turn + 1) * size]]
        lr = learning_rate(step, args.lr, args.warmup, args.cooldown, decay_start)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss, norm = train_step(model, optimizer, batch, args.seed * 1_000_003 + step, args.weighted,
                                args.micro_tokens, args.objective == "trace")
        line = dict(step=step + 1, loss=loss, gradient_norm=norm, lr=lr)
        if dev_problems and (step + 1) % args.eval_every == 0:
            line["accuracy"] = eval_math.evaluate(
                model, tokenizer, dev_problems, max_new_tokens=args.max_new_tokens,
                eos_ids=model.config.eos_ids, seed=args.seed)["accuracy"]
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{line['accuracy']:.3f}")
        is_reached = args.stop_accuracy is not None and line.get("accuracy", 0) >= args.stop_accuracy
        if decay_start is None and (is_reached or step + 1 >= args.steps - args.cooldown):
            progress["decay_start"] = step + 1
            if args.stop_accuracy is not None and not is_reached:
                lm.say(f"sft: accuracy did not reach {args.stop_accuracy} in {step + 1} updates; "
                       "going on from here")
        log.write(line)
        progress["step"] = step + 1
        if args.save_every and (step + 1) % args.save_every == 0:
            log.save_checkpoint(tokenizer, trainers, progress, args.keep_checkpoints)
    bar.close()
    if "accuracy" in line:
        lm.say(f"sft: {progress['step']} updates; accuracy on {len(dev_problems)} development problems "
               f"{line['accuracy']:.3f}")


def add_common_flags(flag):
    """The flags that sft.py and tracerl.py share: the model, its prompts, and what fits where."""
    flag("--seed", int, 0, 0, "of weights and warm start, data order, masks and rollouts")
    flag("--attention", str, "block", "block", "of the tiny model", choices=("block", "full"))
    flag("--block_size", int, None, None, "K; None is the checkpoint's own, 4 for the tiny model")
    flag("--max_prompt_tokens", int, 784, 784, "longer prompts are skipped and counted")
    flag("--prompt_style", str, "chat", "chat", "how the chat template is used",
         choices=eval_math.PROMPT_STYLES)
    flag("--instruction", str, eval_math.INSTRUCTION, eval_math.INSTRUCTION,
         "text after each problem; empty for data with whole prompts")
    flag("--system", str, None, None, "a system message before each problem")
    flag("--micro_tokens", int, 4096, 16384, "tokens of one forward and backward")
    flag("--dtype", str, "float32", "bfloat16" if torch.cuda.is_available() else "float32",
         "what layers compute in; weights, optimizer states, gradients and losses are float32 anyhow",
         choices=("float32", "bfloat16"))
    flag("--recompute", bool, False, False, "keep one activation per layer and compute the others again "
         "in the backward pass: slower by a third, fits far longer rows")
    flag("--lora_rank", int, 0, 0, "train adapters of this rank beside a frozen trunk; 0 trains everything")
    flag("--resume", bool, False, False,
         "go on with the run of this name from its newest checkpoint, or from the start")


def parse_args(argv=None):
    """The flags of sft.py. Two defaults: of the tiny model, and with --model of a real checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1], allow_abbrev=False)
    flag = functools.partial(lm.add_flag, parser)
    flag("--model", str, None, None, "checkpoint folder or hub id; without it, a new tiny model")
    flag("--data", str, "arithmetic", None, "embedded arithmetic, or a file or hub id "
         "with problem and solution, prompt and response, or messages; optionally step_map")
    flag("--objective", str, "random", "random",
         "views: random masks in every block (full attention: in the response), or the step map of the data "
         "(left to right where there is none)", choices=("random", "trace"))
    flag("--weighted", bool, False, False,
         "weight each masked token by 1 / masked share (the diffusion bound)")
    flag("--run", str, "sft", "sft", "name of the folder under runs/ (with torchrun: --run_name)",
         "--run_name")
    flag("--steps", int, 2700, 1000, "most updates")
    flag("--batch_size", int, 64, 64, "examples per update")
    flag("--lr", float, 6e-3, 1e-5, "peak learning rate of AdamW")
    flag("--warmup", int, 30, 30, "updates of rising learning rate")
    flag("--cooldown", int, 200, 200, "updates of falling learning rate at the end")
    flag("--weight_decay", float, 0.2, 0.0, "of AdamW, on matrices")
    flag("--stop_accuracy", float, None, None,
         "embedded data: start the cooldown at this accuracy on development problems")
    flag("--eval_every", int, 100, 100, "embedded data: updates between evaluations on development problems")
    flag("--slip", float, 0.6, 0.6, "embedded data: how often the pupil forgets a carry")
    flag("--max_new_tokens", int, 20, 2000,
         "longer responses are skipped and counted; full attention: length of the canvas")
    flag("--save_every", int, 0, 200, "updates between checkpoints to resume from; 0 is none")
    flag("--keep_checkpoints", int, 2, 2, "the newest ones to keep")
    add_common_flags(flag)
    args = lm.fill_defaults(parser, argv)
    if args.data is None:
        parser.error("--model needs --data")
    if args.model is None and (args.lora_rank or args.recompute):
        parser.error("--lora_rank and --recompute need --model: the tiny model is trained whole")
    for name in ("steps", "batch_size", "lr", "warmup", "cooldown", "eval_every", "max_new_tokens",
                 "max_prompt_tokens", "micro_tokens"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(args, name)}")
    if args.stop_accuracy is not None and args.data != "arithmetic":
        parser.error("--stop_accuracy needs the development problems of the embedded data")
    return args


def main(argv=None):
    """Trains and saves runs/<run>/checkpoint -> its path."""
    args = parse_args(argv)
    lm.start_processes(args.model is None, args.dtype == "bfloat16")
    folder = os.path.join("runs", args.run)
    if args.model is None:
        model, tokenizer = lm.tiny_model(args.seed, args.block_size or 4, args.attention), lm.tiny_tokenizer()
        model.to(lm.default_device())
    else:
        model, tokenizer = lm.load_to_train(args)
    if tokenizer is None:
        raise ValueError(f"{args.model} has no tokenizer: examples cannot be encoded")
    is_embedded = args.data == "arithmetic"
    if is_embedded:
        problems = eval_math.arithmetic("train", 20000, args.seed, args.slip)
    else:
        problems = eval_math.load_problems(args.data, needs_answer=False)
    problems, num_long = eval_math.encode_prompts(
        problems, tokenizer, args.max_prompt_tokens, args.instruction, args.prompt_style, args.system)
    examples = to_examples(problems, tokenizer, model.config, args.max_new_tokens)
    if len(examples) < args.batch_size:
        raise ValueError(f"{len(examples)} examples with at most {args.max_new_tokens} tokens are fewer "
                         f"than a batch of {args.batch_size}: lower --batch_size or raise --max_new_tokens")
    dev_problems = []
    if is_embedded:
        dev_problems, _ = eval_math.encode_prompts(
            eval_math.arithmetic("dev", 200), tokenizer, args.max_prompt_tokens)
    lm.say(f"sft: {len(examples)} examples; skipped {num_long} long prompts, "
           f"{len(problems) - len(examples)} long responses")
    settings = {name: value for name, value in vars(args).items() if name != "resume"}
    log = lm.RunLog(folder, settings, is_resumed=args.resume)
    lm.shard(model, model.layers, getattr(torch, args.dtype))
    train(model, tokenizer, examples, dev_problems, args, log)
    checkpoint = os.path.join(folder, "checkpoint")
    lm.save_checkpoint(model, tokenizer, checkpoint)
    lm.barrier()
    return checkpoint


def warm_start(seed, block_size=4, attention="block"):
    """The embedded default's starting model -> checkpoint folder; made once for each seed and setting."""
    # full attention learns this more slowly, and at 6e-3 not from every seed
    stop_accuracy, lr = (0.4, 6e-3) if attention == "block" else (0.2, 2e-3)
    settings = dict(seed=seed, block_size=block_size, attention=attention, stop_accuracy=stop_accuracy, lr=lr)
    flags = [f"--{name}={value}" for name, value in settings.items()]
    everything = json.dumps(vars(parse_args(flags)), sort_keys=True)
    name = f"warm-start-{hashlib.sha256(everything.encode()).hexdigest()[:8]}"
    checkpoint = os.path.join("runs", name, "checkpoint")
    lm.barrier()
    if os.path.isdir(checkpoint):
        lm.say(f"warm start: reusing {checkpoint}")
        return checkpoint
    lm.say(f"warm start: fine-tuning a tiny model on the work of a pupil who forgets carries -> {checkpoint}")
    return main([*flags, f"--run={name}"])


if __name__ == "__main__":
    main()
    lm.end_processes()
