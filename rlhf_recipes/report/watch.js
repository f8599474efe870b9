// --- A page that grows: parts of a new one take the place of those that have changed ---

const PARTS = "#top, #contents, main > section";
const written = new Map(partsOf(document)); // as the server wrote them: scripts change them
let version = "";

function partsOf(page) { return [...page.querySelectorAll(PARTS)].map(part => [part.id, part.outerHTML]); }

history.replaceState(null, "", location.pathname + location.hash); // without the token: the cookie stands for it

const changes = new EventSource("changes");
changes.addEventListener("message", ({data}) => data === version ? say("") : load(data));
changes.addEventListener("problem", ({data}) => say(data));
changes.addEventListener("error", () => say("The server does not answer."));

let drawn = new Date();

function say(problem) {
  const shown = document.getElementById("grows");
  const time = `${problem ? "This is how it was" : "As it was"} at ${drawn.toLocaleTimeString()}`;
  shown.textContent = problem ? `${problem} ${time}.` : `${time}; it grows by itself.`;
  shown.classList.toggle("stopped", problem !== "");
}

// The answer is parsed by the browser as a document of its own: no string becomes markup here, and no script in it runs.
function load(wanted) {
  const request = new XMLHttpRequest();
  request.open("GET", "./");
  request.responseType = "document";
  request.addEventListener("load", () => {
    if (request.status !== 200) return;
    [version, drawn] = [wanted, new Date()];
    exchange(request.response);
    say("");
  });
  request.send();
}

function exchange(page) {
  const place = placeOf();
  const fresh = new Map(partsOf(page));
  const main = document.querySelector("main");
  document.title = page.title;
  for (const id of written.keys()) if (!fresh.has(id)) document.getElementById(id).remove();
  let before = null;
  for (const [id, html] of fresh) {
    let part = document.getElementById(id);
    if (html !== written.get(id)) {
      const next = document.adoptNode(page.getElementById(id));
      const state = part && stateOf(part);
      if (part) part.replaceWith(next);
      else main.append(next);
      if (state) restore(next, state);
      part = next;
    }
    if (part.parentNode === main && part.previousElementSibling !== before) main.insertBefore(part, before ? before.nextSibling : main.firstChild);
    if (part.parentNode === main) before = part;
  }
  written.clear();
  fresh.forEach((html, id) => written.set(id, html));
  followReading();
  if (scrollY > 0) scrollBy(0, place());
}

// What the reader has opened, chosen and typed in a part.
function stateOf(part) {
  const active = part.contains(document.activeElement) ? document.activeElement : null;
  return {
    open: [...part.querySelectorAll("details[open] > summary")].map(summary => summary.textContent),
    fields: new Map([...part.querySelectorAll("[name]")].map(field => [keyOf(field), valueOf(field)])),
    prompts: part.querySelectorAll("#rows > .prompt").length,
    active: active && (active.name ? keyOf(active) : active.hash),
    selection: active?.type === "search" && [active.selectionStart, active.selectionEnd],
    across: part.querySelector("ol")?.scrollLeft,
  };
}

function keyOf(field) { return `${field.name} ${field.type === "checkbox" ? field.parentNode.textContent : ""}`; }

function valueOf(field) {
  if (field.type === "checkbox") return field.checked;
  return field.selectedOptions ? field.selectedOptions[0]?.textContent : field.value;
}

function restore(part, {open, fields, prompts, active, selection, across}) {
  for (const summary of part.querySelectorAll("details > summary")) summary.parentNode.open = open.includes(summary.textContent);
  for (const field of part.querySelectorAll("[name]")) {
    const value = fields.get(keyOf(field));
    if (value === undefined) continue;
    if (field.type === "checkbox") field.checked = value;
    else if (!field.options) field.value = value;
    else for (const option of field.options) if (option.textContent === value) option.selected = true;
  }
  if (prompts) showAnswers(prompts);
  else if (part.querySelector("#answers-data")) showAnswers();
  if (across) part.querySelector("ol").scrollLeft = across;
  const field = active && [...part.querySelectorAll("[name], a")].find(one => (one.name ? keyOf(one) : one.hash) === active);
  field?.focus({preventScroll: true});
  if (selection) field?.setSelectionRange(...selection);
}

// How far what is being read will have moved, once parts have changed.
function placeOf() {
  const read = [...document.querySelectorAll("main > section, .prompt")].findLast(one => one.getBoundingClientRect().top < 100);
  const find = () => !read ? null : read.id ? document.getElementById(read.id) : document.querySelector(`[data-number="${read.dataset.number}"]`);
  const top = read?.getBoundingClientRect().top;
  return () => (find()?.getBoundingClientRect().top ?? top ?? 0) - (top ?? 0);
}
