"""plumbing/show.py - a trace, to look at."""

import json

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
