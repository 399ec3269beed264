// Runs the script of a trace.html with a stand-in for the page's elements, works its controls, and says what it saw.
const page = require("fs").readFileSync(process.argv[2], "utf8");
class Element {
  constructor() { Object.assign(this, { children: [], style: {}, value: "", textContent: "", className: "" }); }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
}
const found = Object.fromEntries(["button", "input", "output", "select", "small", "main"].map(name => [name, new Element()]));
found.select.value = "step";
globalThis.document = { querySelector: name => found[name], createElement: () => new Element() };
const timers = [];
globalThis.setInterval = f => timers.push(f);
globalThis.clearInterval = number => { timers[number - 1] = null; };
eval(page.split("<script>")[1].split("</script>")[0]);

const all = element => [element, ...element.children.flatMap(all)];
const tokens = () => all(found.main).filter(e => e.className.split(" ").includes("token"));
const hidden = () => tokens().filter(e => e.textContent === "\u2591").length;
const out = { tokens: tokens().length, hidden_at_start: hidden(),
              blocks: all(found.main).filter(e => e.className === "block").length,
              rewards: all(found.main).filter(e => e.className === "prompt").map(e => e.textContent.split(/ +/)[1]) };
found.input.value = 1;
found.input.oninput();
out.hidden_at_1 = hidden();
found.button.onclick();
out.playing = found.button.textContent;
for (let i = 0; i < 1000 && timers.at(-1); i++) timers.at(-1)();
Object.assign(out, { played: found.button.textContent, hidden_at_end: hidden(), output: found.output.value });
found.select.value = "advantage";
found.select.onchange();
out.by_advantage = tokens()[0].style.background;
console.log(JSON.stringify(out));
