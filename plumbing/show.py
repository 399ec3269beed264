"""plumbing/show.py - what a person sees: the line of a step, its warnings, a page of traces."""

import json
from statistics import fmean

from plumbing import parallel


def summarize(updates, value_updates):
    """The figures of one RL step: means over the trained tokens of its updates, maxima, and counts."""
    line = {}
    if updates:
        # updates with more tokens count for more
        tokens = max(1, sum(u["trained_tokens"] for u in updates))
        for name in ("loss", "kl", "clip_fraction", "entropy", "gap"):
            line[name] = sum(u[name] * u["trained_tokens"] for u in updates) / tokens
        for name in ("ratio_max", "gap_max", "gradient_norm"):
            line[name] = max(u[name] for u in updates)
        line["trained_tokens"] = tokens
    if value_updates:
        line["value_loss"] = fmean(u["value_loss"] for u in value_updates)
    if updates or value_updates:
        line["skipped_updates"] = sum(u["skipped_updates"] for u in updates + value_updates)
    return line


def describe_line(line):
    """One line of the terminal per RL step; the README explains every name."""
    parts = [f"step {line['step']:3d}", f"reward {line['reward']:.3f}", f"kept {line['kept_groups']:d}",
             f"length {line['length']:.1f}", f"tokens/step {line['tokens_per_step']:.2f}"]
    if "ratio_max" in line:
        parts += [f"ratio max {line['ratio_max']:.2f}", f"clipped {line['clip_fraction']:.3f}",
                  f"KL {line['kl']:.4f}", f"entropy {line['entropy']:.3f}",
                  f"grad {line['gradient_norm']:.2f}", f"drift {line['drift_kl']:.4f}"]
    else:
        parts += ["value model only" if "value_loss" in line else "nothing to learn from: no update"]
    if "value_loss" in line:
        parts += [f"value loss {line['value_loss']:.4f}", f"explained {line['explained_variance']:.3f}"]
    parts += [f"gap {line['gap_max']:.1e}", f"rollout {line['rollout_seconds']:.1f}s",
              f"update {line['update_seconds']:.1f}s"]
    if line.get("skipped_updates"):
        parts.append(f"SKIPPED {line['skipped_updates']} updates")
    if "dev_accuracy" in line:
        parts.append(f"dev accuracy {line['dev_accuracy']:.3f}")
    return "  ".join(parts)


MAX_DRIFT = 0.1  # nats per token in one RL step
MAX_IDLE = 5  # steps in a row without an update


def warn(line, progress):
    """Says what a table of numbers hides: a policy that moves too far, or not at all."""
    if line.get("drift_kl", 0.0) > MAX_DRIFT:
        parallel.say(f"WARNING: step {line['step']} moved the policy by {line['drift_kl']:.2f} nats per "
                     f"token (largest ratio {line['drift_ratio_max']:.1f}): a collapse may follow. "
                     "Lower --lr")
    is_idle = "kl" not in line and "value_loss" not in line
    progress["idle_steps"] = progress.get("idle_steps", 0) + 1 if is_idle else 0
    if progress["idle_steps"] and progress["idle_steps"] % MAX_IDLE == 0:
        parallel.say(f"WARNING: no update in {progress['idle_steps']} steps: all responses to a prompt earn "
                     f"the same (mean reward {line['reward']:.2f}). Problems of another difficulty, a wider "
                     "--keep_range or a larger --group_size would help, if there is still something to learn")


def plus_minus(found):
    """An accuracy with its standard error, as text."""
    error = found["standard_error"]
    return f"{found['accuracy']:.3f} +- " + ("?" if error is None else f"{error:.3f}")


def print_table(before, after, num_problems):
    """Accuracies before and after training, and the means of a reward of one's own."""
    title = f"accuracy on {num_problems} test problems"
    parallel.say(f"\n{title:36s}{'before':>16s}{'after':>18s}")
    for name in before:
        parallel.say(f"  {name:34s}{plus_minus(before[name]):>16s}  {plus_minus(after[name]):>16s}")
    for name in before:
        if "reward" in before[name]:
            numbers = f"{before[name]['reward']:>16.3f}  {after[name]['reward']:>16.3f}"
            parallel.say(f"  mean of your reward, {name:13s}{numbers}")


# ------------------------------------------------------------------------------------------------------------
# A trace, to look at.

PAGE = """<!doctype html><meta charset="utf-8"><title>traces</title>
<style>body { font: 16px sans-serif; margin: 2em } pre { white-space: pre-wrap; line-height: 1.7 }
span { padding: 2px; border-radius: 3px } .untrained { opacity: 0.45 }</style>
<p>Colour: the denoising step that revealed a token. Point at it for its numbers; pale ones are not trained.
<br><input type="range" min="0" style="width: 30em"> <output></output></p><main></main><script>
const rollouts = DATA, slider = document.querySelector("input");
const last = rollouts.flatMap(r => r.tokens.map(t => t.step)).reduce((a, b) => Math.max(a, b), 0);
slider.max = last; slider.value = last;  // in this order: the first bounds the second
function element(name, text, title = "", style = "", kind = "") {
  return Object.assign(document.createElement(name), { textContent: text, title, style, className: kind });
}
function draw() {
  document.querySelector("output").value = "after step " + slider.value + " of " + last;
  document.querySelector("main").replaceChildren(...rollouts.map(r => {
    const pre = element("pre", `reward ${r.reward}\\n${r.prompt}`);
    pre.append(...r.tokens.map((t, place) => {
      const isShown = t.step <= slider.value, colour = `background: hsl(${300 * t.step / last} 75% 82%)`;
      const numbers = Object.entries(t).map(([name, x]) => name + " " + x).join("\\n");
      const [text, style] = isShown ? [t.text, colour] : ["\u2591", ""];
      return element("span", text, numbers, style, place < r.num_tokens ? "" : "untrained");
    }));
    return pre;
  }));
}
slider.oninput = draw; draw();
</script>"""


def write_page(rollouts, tokenizer, path):
    """Writes traces as one self-contained page: tokens by the step that revealed them, with their numbers."""
    shown = []
    for r in rollouts:
        columns = dict(step=r.step_map, confidence=r.confidence, logp=r.logp, advantage=r.advantage,
                       value=r.value_old, ratio=r.ratio)
        tokens = [{"text": tokenizer.decode([token])} for token in r.response]
        for name, column in columns.items():
            for token, number in zip(tokens, column):
                token[name] = round(number, 4)
        text = tokenizer.decode(r.prompt)
        shown.append(dict(prompt=text, reward=r.reward, num_tokens=r.num_tokens, tokens=tokens))
    with open(path, "w", encoding="utf-8") as file:  # no "<" of a model may end the script
        file.write(PAGE.replace("DATA", json.dumps(shown).replace("<", "\\u003c")))
