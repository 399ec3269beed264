"""sft.py - how the starting model is made.

Supervised fine-tuning of a block diffusion model masks some tokens of every block. The model predicts them
from the rest of the block and the clean blocks before it. The rows are those of TraceRL, made by
rollout.build_rows. Three things differ: the views are random, what fills the last block behind eos is trained
as well, and the loss is just minus the log-likelihood.

    response, K = 4    1 0 1 ;   1 9 1 ;   ...
    views              1 ? ? ;   ? ? ? ?   ...

There is one view per block. It masks k of the block's 4 tokens, k uniform in 1 to 4, and the loss is minus
the log-probability of these. An autoregressive checkpoint predicts the NEXT token at each position.
Fine-tuning teaches it to predict the token AT the position, where a mask stands in the input. Its attention
becomes block-wise, and an unused row of its embedding becomes the mask token. Nothing else changes. (This is
the recipe of SDAR, arXiv 2510.06303.)

    python sft.py --stop_accuracy 0.4     # a tiny model on additions, as in assets/: two minutes
    torchrun --nproc_per_node=8 sft.py --model Qwen/Qwen3-4B --data solutions.jsonl --name qwen3-block

In the loop of this file a step is one update. Read in this order: to_examples, noise_views, sft_loss,
train_step, train.

Left out:
  1. a loss on the prompt: only the response is masked and predicted;
  2. packing on a CPU: there every example is padded to the longest one of its micro-batch.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch

import rollout
from eval_math import Examinee, Problem, load_prompts
from plumbing import data, flags, machine, packing, parallel, runs, tiny
from plumbing.flags import Settings, setting
from plumbing.prompts import Prompting, encode_prompts, encode_solutions
from plumbing.tasks import EMBEDDED
from rollout import Decoding, Rollout, mix

# ------------------------------------------------------------------------------------------------------------
# Examples, views, loss.


def to_examples(problems, tokenizer, config, max_new_tokens):
    """Worked problems -> list[Rollout], the record from which rows are made.

    Responses of more than max_new_tokens tokens, eos included, are left out. The end of the last block is
    filled, and the filling is trained, too. In decoding the model draws these tokens itself, and it sees them
    while it draws others. With full attention the whole canvas is filled, as LLaDA was trained.
    """
    if not config.eos_ids:
        raise ValueError("this checkpoint names no eos token: without one a response cannot end")
    eos = config.eos_ids[0]  # the one to teach; in decoding any of them ends a response
    # LLaDA was trained on canvases that are filled with its <|endoftext|>, which is its padding token.
    filler = config.pad_id if config.is_full and config.pad_id in config.eos_ids else eos
    lacking = [p.problem for p in problems if not p.solution]
    if lacking:
        raise ValueError(f"no solution to learn from: {str(lacking[0])[:80]!r}. Name a column of the data "
                         f"{' or '.join(data.COLUMNS['solution'])}")
    # Text is made into tokens once, here. From here on the record is token ids.
    solutions = encode_solutions(problems, tokenizer, config)
    examples = []
    for p, solution in zip(problems, solutions):
        response = solution + [eos]
        # Without a step map, the solution counts as written from left to right, one token a step. Only
        # --views trace reads the step map.
        steps = list(p.step_map or range(1, len(response)))
        if len(steps) != len(response) - 1:
            raise ValueError(f"{len(steps)} steps in the step map of {len(response) - 1} tokens: "
                             f"{str(p.problem)[:80]!r}")
        if len(response) > max_new_tokens:  # it could not be decoded in that room either
            continue
        num_tokens = len(response)
        # With K = 4, a prompt of 9 tokens and a response of 6 (with eos) make 15. One more fills the block.
        missing = -(len(p.tokens) + num_tokens) % config.block_size
        if config.is_full:
            missing = max_new_tokens - num_tokens
        response += [filler] * missing
        # eos and the filling get the last steps. If the solution took steps 1 to 5, they are steps 6 and 7.
        last = max(steps, default=0)
        steps += range(last + 1, last + 2 + missing)
        # Full attention: every forward of the decoder sees the whole canvas, so the example must, too.
        canvas = len(response) if config.is_full else 0
        examples.append(Rollout(p.tokens, response, num_tokens, steps, canvas=canvas))
    return examples


def noise_views(block, rng):
    """One view per block, or with full attention per response.

    The block has c response tokens. k of them are masked, and k is uniform in 1 to c.

    A fair coin for each token would be worse: a block of 4 would be wholly masked only once in 16 times. But
    every block is wholly masked when its decoding begins. (`--views random` of tracerl.py is another
    function, rollout.random_views. It does toss coins, but first it draws for each block how likely a mask
    is.)
    """
    masked = sorted(rng.sample(block, rng.randint(1, len(block))))  # of block [4, 5, 6, 7] perhaps [5, 6]
    return [(masked, masked)]  # what is masked is what is predicted


VIEWS = dict(random=noise_views, trace=rollout.trace_views)  # --views


def sft_loss(logp, masked_share, normalizer, is_weighted):
    """Minus the log-likelihood of the masked tokens, divided by the normaliser of the whole update.

    logp, masked_share: float32 (n,), of one micro-batch. is_weighted: each log-probability is divided by t,
    the masked fraction of its block. At a given t a token is masked with probability t, so on average every
    response token counts once. Take minus the sum of log-probability / t over the masked tokens. Averaged
    over random masks, it is the diffusion bound: an upper bound on minus the log-likelihood of the response.

    With weights, the normaliser is the number of response tokens. Without (the authors' choice) it is the
    number of masked tokens.
    """
    # In the block 1 ? ? ; two of four tokens are masked, t = .5. With weights each of them counts twice: for
    # itself, and for one that is not masked this time.
    return -(logp / masked_share if is_weighted else logp).sum() / normalizer


def train_step(learner, examples, views, is_weighted, compute):
    """One update on a batch of examples, the same for any number of processes -> loss, gradient norm."""
    model = learner.model
    # Every process has the same batch, and lays out its part of it as rows.
    built = rollout.build_rows(parallel.deal(examples), model.config, views)
    parts, num_masked = packing.dealt_batches(built, compute, model)
    # One number for the whole update, counted over all processes before any forward. A mean per micro-batch
    # would make the gradient depend on how the batch was cut.
    normalizer = sum(len(r.response) for r in examples) if is_weighted else max(num_masked, 1)
    total = torch.zeros((), device=model.device)
    for part in parts:
        # One forward of [clean text | view | view | ...], and log-probabilities of the masked tokens: (n,).
        logp, _ = rollout.forward_rows(model, part, compute)
        loss = sft_loss(logp, part.targets.masked_share, normalizer, is_weighted)
        loss.backward()  # gradients of the parts add up
        total += loss.detach()
    stepped = parallel.optimizer_step(learner)  # a gradient with NaN or inf is skipped
    return sum(parallel.gather([float(total)])), stepped["gradient_norm"]


# ------------------------------------------------------------------------------------------------------------
# The loop.


@dataclass
class Recipe(Settings):
    """The numbers of fine-tuning."""

    seed: int = setting(0, "random seed of weights, data order and masks")
    steps: int = setting(1000, "maximum number of updates", tiny=2700, low=1, may_change=True)
    batch_size: int = setting(64, "examples per update", low=1)
    lr: float = setting(1e-5, "peak learning rate of AdamW", tiny=6e-3, above=0)
    warmup: int = setting(30, "how many first updates raise the learning rate", low=1)
    cooldown: int = setting(200, "how many last updates lower the learning rate", low=1)
    weight_decay: float = setting(0.0, "weight decay of AdamW, on matrices only", tiny=0.2, low=0)
    weighted: bool = setting(False, "weight each masked token by 1 / masked fraction (the diffusion bound)")
    views: str = setting("random", "what is masked. random: some tokens of every block; trace: as the data's "
                         "step map says, or else left to right; or file.py:function")
    stop_accuracy: float = setting(None, "start the cooldown at this accuracy on --dev_data", low=0, high=1)
    eval_every: int = setting(100, "updates between evaluations on --dev_data", low=1, may_change=True)

    def __post_init__(self):
        """ValueError for numbers out of range, an unknown --views, and --weighted with views of the trace."""
        super().__post_init__()
        self.function = flags.load_function(self.views, VIEWS, "--views")
        if self.weighted and self.views == "trace":
            raise ValueError("--weighted needs random views: in a trace all tokens count once anyhow")


def learning_rate(step, recipe, decay_start):
    """The rate rises during the warm-up, stays level, and from decay_start on falls to a tenth.

    The last updates, at a small rate, average out the noise of masks and batches. Take warmup 30, cooldown
    200 and decay_start 500. The rate is full from step 29 to 499, .55 of that at step 599, and a tenth at
    step 699, the last.
    """
    cooled = max(0, step - decay_start + 1) / recipe.cooldown  # 0 before the cooldown, 1 at its end
    return recipe.lr * min((step + 1) / recipe.warmup, 1 - 0.9 * min(1.0, cooled))


def draw_batch(examples, step, recipe):
    """The examples of an update. Every epoch has its own order, every example a seed for its masks."""
    # 130 examples in batches of 64 are two updates an epoch. Two examples are left over. They wait for
    # another epoch, which has another order.
    epoch, turn = divmod(step, len(examples) // recipe.batch_size)
    order = parallel.shuffled(len(examples), mix(recipe.seed, epoch))
    chosen = order[turn * recipe.batch_size:(turn + 1) * recipe.batch_size]
    # Another epoch masks other tokens. A resumed run masks what the uninterrupted one would have masked.
    return [dataclasses.replace(examples[i], seed=mix(recipe.seed, step, number))
            for number, i in enumerate(chosen)]


def train(learner, examples, evaluate_dev, compute, recipe, run):
    """The loop. It ends after recipe.steps updates. Once stop_accuracy is reached, only the cooldown follows.

    Order and masks follow from the step, the learning rate from the step and `decay_start`. So a run resumes
    from any checkpoint.
    """
    end = max(1, recipe.steps - recipe.cooldown)  # the rate begins to fall here at the latest
    for number in run.steps(recipe.steps, "sft"):  # 1, 2, ..., or from where a resumed run stands
        step = number - 1  # counted from 0, as draw_batch and learning_rate do
        decay_start = min(run.progress.get("decay_start", end), end)
        if step >= decay_start + recipe.cooldown:
            run.progress["step"] = step
            break
        lr = learning_rate(step, recipe, decay_start)  # a function of the step, so a resumed run has it, too
        parallel.set_learning_rate(learner.optimizer, lr)
        batch = draw_batch(examples, step, recipe)
        # The same batch on every process. `train_step` deals it out.
        loss, norm = train_step(learner, batch, recipe.function, recipe.weighted, compute)
        line = dict(step=number, loss=loss, gradient_norm=norm, lr=lr)  # one line of metrics.jsonl
        if evaluate_dev is not None and number % recipe.eval_every == 0:
            # Accuracy by decoding, not the loss: a loss can still fall when the answers are already right.
            line["accuracy"] = evaluate_dev()["accuracy"]
            # A start that is too good leaves reinforcement learning nothing to do. The skill comes suddenly,
            # and at another time for each seed. So --stop_accuracy starts the cooldown at an accuracy, and
            # not after a number of updates.
            is_reached = recipe.stop_accuracy is not None and line["accuracy"] >= recipe.stop_accuracy
            if is_reached and "decay_start" not in run.progress:
                run.progress["decay_start"] = number
        run.write(line)
        if number % recipe.eval_every == 0 or number == recipe.steps:
            accuracy = f", development accuracy {line['accuracy']:.3f}" if "accuracy" in line else ""
            parallel.say(f"sft: update {number}, loss {loss:.3f}{accuracy}")
        save_every = run.settings["save_every"]
        if save_every and number % save_every == 0 and number < recipe.steps:  # (`main` saves the last state)
            run.save([learner])  # weights and moments; all else follows from run.progress


# ------------------------------------------------------------------------------------------------------------
# Set-up. The method ends here.


@dataclass
class Lesson:
    """The flags that say what is learnt: from which checkpoint, and from which worked problems."""

    model: str = setting(None, "start from this checkpoint folder or hub id; None: a new tiny model")
    data: str = setting(None, "arithmetic, sudoku, or a file or hub id. Columns: problem and solution, or "
                        "prompt and response, or messages; step_map, if there is one", tiny="arithmetic")
    dev_data: str = setting(None, "problems with answers for --eval_every")
    name: str = setting("sft", "name of the folder under runs/", may_change=True)
    max_new_tokens: int = setting(2000, "longer responses are skipped, and their number is printed. Full "
                                  "attention: the response positions that every forward sees", tiny=20, low=1)
    slip: float = setting(0.6, "arithmetic, sudoku: how often the simulated pupil slips", low=0, high=1)


GROUPS = {"lesson": Lesson, "recipe": Recipe, "prompts": Prompting, "machine": machine.Training,
          "run": runs.RunSettings}


def parse_args(argv=None):
    """The flags of sft.py."""
    parser = flags.make_parser("Supervised fine-tuning of a block diffusion model.", GROUPS,
                               machine.is_tiny(flags.peek(argv, "--model")))
    args = runs.parse(parser, GROUPS, argv)
    if args.data is None:  # only with --model: the tiny model has data by default
        parser.error(f"--model {args.model} needs --data. (Folders of tiny models need none: is this one?)")
    if args.dev_data is None and args.data in EMBEDDED:  # problems that are in no training set
        args.dev_data = f"{args.data}-dev"
    if args.stop_accuracy is not None and args.dev_data is None:
        parser.error("--stop_accuracy needs --dev_data")
    return args


def load_examples(tokenizer, config, args, prompting):
    """The training data, by the flags -> list[Rollout]. ValueError if they are fewer than a batch."""
    if args.data in EMBEDDED:  # worked out by a pupil who slips
        problems = [Problem(**row) for row in EMBEDDED[args.data]("train", 20000, args.seed, args.slip)]
        problems, _ = encode_prompts(problems, tokenizer, prompting)
    else:
        problems = load_prompts(args.data, tokenizer, prompting, needs_answer=False)
        for p in problems:
            if p.step_map is None:  # GSM8K's "#### 72" becomes \\boxed{72}, which is what a reward looks for
                p.solution = data.boxed_solution(p.solution)
    examples = to_examples(problems, tokenizer, config, args.max_new_tokens)
    # An update needs a whole batch.
    if len(examples) < args.batch_size:
        raise ValueError(f"{len(examples)} examples with at most {args.max_new_tokens} tokens are fewer "
                         f"than a batch of {args.batch_size}: lower --batch_size or raise --max_new_tokens")
    boxless = sum("\\boxed" not in p.solution for p in problems)  # a reward looks for the box
    parallel.say(f"sft: {len(examples)} examples; skipped {len(problems) - len(examples)} long responses; "
                 f"{boxless} solutions have no \\boxed{{}}")
    return examples


def main(argv=None):
    """Trains and saves runs/<name>/checkpoint -> its path."""
    args = parse_args(argv)
    recipe, prompting = (flags.read_flags(group, args) for group in (Recipe, Prompting))
    machine.start(args)
    with runs.Run(args.name, vars(args), args.resume, GROUPS) as run:
        if args.model is None:  # random weights: the tiny model is made from nothing
            model, tokenizer = tiny.new_model(args)
        else:
            model, _, tokenizer = machine.load_to_train(machine.start_path(args), args)
        run.tokenizer = tokenizer
        compute = machine.choose_compute(args, model)
        examples = load_examples(tokenizer, model.config, args, prompting)
        evaluate_dev = None
        if args.dev_data:  # 200 problems are enough to see when a skill comes
            examinee = Examinee(model, tokenizer, Decoding(max_new_tokens=args.max_new_tokens), compute)
            dev = load_prompts(args.dev_data, tokenizer, prompting)[:200]
            evaluate_dev = functools.partial(examinee.evaluate, dev, seed=args.seed)
        # The other settings of the tiny model were chosen with these betas of AdamW. tracerl.py has others.
        learner = parallel.make_learner(model, args.lr, (0.9, 0.98), args.weight_decay)
        # Settings, model and data have passed their checks. From here on the folder is written to.
        run.begin([learner])
        run.check_data([(r.prompt, r.response, r.step_map) for r in examples], "the examples of --data")
        train(learner, examples, evaluate_dev, compute, recipe, run)
        run.save([learner])
        path = run.save_model(model)
    parallel.say(f"sft: the model is in {path}")
    return path


if __name__ == "__main__":
    runs.run_command(main)
