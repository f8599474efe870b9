// --- Contents: which section is read ---

let watcher;

function followReading() {
  const links = [...document.querySelectorAll("nav a")];
  watcher?.disconnect();
  watcher = new IntersectionObserver(entries => {
    for (const {isIntersecting, target} of entries) {
      if (!isIntersecting) continue;
      for (const link of links) {
        if (link.hash === `#${target.id}`) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  }, {rootMargin: "-15% 0px -80% 0px"});
  document.querySelectorAll("main > section").forEach(section => watcher.observe(section));
}

// --- Answers side by side ---

const AT_ONCE = 20; // prompts; more come at a button, so that a page of thousands opens at once and prints on some sheets

// Show the answers as the form says, so many prompts or a few more.
function showAnswers(atLeast = 1) {
  const stored = document.getElementById("answers-data");
  if (stored) answersOf(JSON.parse(stored.textContent), document.getElementById("controls"), atLeast);
}

function answersOf({models, judges, rows}, form, atLeast) {
  const list = document.getElementById("rows"), more = document.getElementById("more");
  const found = document.getElementById("found");
  const field = name => form.elements[name];
  rows.forEach((row, place) => { row.number = place + 1; row.said = searchable(row); });
  let chosen = [], shown = 0;

  // How much better the one model's answer is than the other's, by the chosen judge; undefined where one has no score.
  function gain(row) {
    if (!field("judge")) return undefined;
    const [ours, theirs] = ["model", "against"].map(name => row.answers[field(name).value]?.scores[field("judge").value]);
    return ours === undefined || theirs === undefined ? undefined : ours - theirs;
  }

  function choose() {
    const words = field("search").value.toLowerCase(), show = field("show")?.value ?? "all";
    const wanted = {all: () => true, win: by => by > 0, loss: by => by < 0, tie: by => by === 0}[show];
    chosen = rows.filter(row => row.said.includes(words) && wanted(gain(row)));
    const column = Number(field("model")?.value ?? models.length - 1);
    const key = {
      asked: () => 0,
      gain,
      loss: row => { const by = gain(row); return by === undefined ? by : -by; },
      longest: row => row.answers[column]?.tokens,
      kl: row => row.answers[column]?.kl,
    }[field("order").value];
    const keys = new Map(chosen.map(row => [row, key(row) ?? -Infinity]));
    chosen.sort((one, other) => keys.get(other) - keys.get(one) || one.number - other.number);
    list.replaceChildren();
    shown = 0;
    grow();
  }

  function grow() {
    const columns = [...form.querySelectorAll("[name=column]:checked")].map(box => Number(box.value));
    const next = chosen.slice(shown, shown + AT_ONCE);
    const every = form.querySelector("[name=column]") ? columns : models.map((_, column) => column);
    list.append(...next.map(row => prompt(row, every)));
    shown += next.length;
    more.hidden = shown === chosen.length;
    found.textContent = `${chosen.length.toLocaleString("en")} of ${rows.length.toLocaleString("en")} prompts match; ${shown.toLocaleString("en")} are shown.`;
  }

  function prompt(row, columns) {
    const turns = Array.isArray(row.prompt) ? row.prompt.flatMap(turn => [element("p", "role", turn.role), text(turn.content)]) : [text(row.prompt)];
    const by = gain(row);
    const difference = by === undefined ? "" : ` · ${models[field("model").value]} ${signed(by)} ${field("judge").value}`;
    const head = element("header", "", element("div", "asked", ...turns), element("small", "", `${row.number}${difference}`));
    const made = element("article", "prompt", head, element("div", "answers", ...columns.map(column => answer(row, column, by))));
    made.dataset.number = row.number;
    return made;
  }

  function answer(row, column, by) {
    const given = row.answers[column], title = element("h4", "", models[column]);
    if (!given) return element("section", "answer", title, element("p", "measures", "no answer"));
    if (by && String(column) === field("model").value) title.append(element("span", by > 0 ? "sign" : "sign worse", by > 0 ? "better" : "worse"));
    const measures = judges.filter(judge => judge in given.scores).map(judge => `${judge} ${decimal(given.scores[judge])}`);
    measures.push(`${given.tokens} tokens`);
    if (given.kl !== undefined) measures.push(`KL ${decimal(given.kl)}`);
    if (!given.ended) measures.push("cut off");
    return element("section", "answer", title, text(given.text.replace(/^ /, "")), element("p", "measures", ...measures.map(measure => element("span", "", measure))));
  }

  form.addEventListener("input", choose);
  form.addEventListener("submit", event => event.preventDefault());
  more.addEventListener("click", grow);
  form.hidden = false;
  choose();
  while (shown < Math.min(atLeast, chosen.length)) grow();
}

document.addEventListener("keydown", event => {
  const search = document.querySelector("#controls [name=search]");
  if (!search || event.key !== "/" || event.ctrlKey || event.metaKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  event.preventDefault();
  search.focus();
});

function searchable(row) {
  const asked = Array.isArray(row.prompt) ? row.prompt.map(turn => turn.content) : [row.prompt];
  return [...asked, ...row.answers.map(given => given ? given.text : "")].join("\n").toLowerCase();
}

function decimal(value) { return value.toFixed(2).replace("-", "\u2212"); }
function signed(value) { return value > 0 ? `+${decimal(value)}` : decimal(value); }

followReading();
showAnswers();
