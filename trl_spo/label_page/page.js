// The page asks the server for what to show, and sends clicks. It keeps nothing: what it shows is what the server said last.
// `element` and `server` come from Gradio. Texts are set as text, never as HTML.
const find = (id) => element.querySelector("#" + id);
const root = element.querySelector(".spo");
const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", ArrowDown: "tie", 0: "tie", s: "skip", S: "skip",
  u: "undo", U: "undo", Backspace: "undo",
};
const RETRY_MS = 700;
let shown = null; // the last answer of the server
let timer = null;

function annotator() {
  return find("annotator").value.trim();
}

function say(text, failed) {
  find("message").textContent = text || "";
  find("message").classList.toggle("failed", Boolean(failed));
}

function loadPicture(image, source) {
  return new Promise((resolve) => {
    image.onload = () => {
      find("pair").classList.toggle("small", image.naturalWidth < 200);
      root.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
      resolve();
    };
    image.onerror = resolve;
    image.src = source;
  });
}

async function show(answer) {
  shown = answer;
  clearTimeout(timer);
  find("prompt").textContent = answer.prompt;
  find("ask").textContent = answer.ask;
  find("count").textContent = answer.count;
  find("bar").style.width = answer.percent + "%";
  find("undo").disabled = !answer.can_undo;
  element.querySelectorAll(".picture").forEach((picture) => picture.classList.remove("chosen"));
  element.querySelectorAll("nav [data-choice]").forEach((button) => { button.disabled = answer.state !== "pair"; });
  say(answer.message, answer.failed);
  if (answer.state === "pair") {
    await Promise.all([loadPicture(find("left"), answer.left), loadPicture(find("right"), answer.right)]);
    answer.next.forEach((source) => { new Image().src = source; });
  } else if (answer.state === "waiting") {
    timer = setTimeout(refresh, RETRY_MS);
  }
  root.dataset.state = answer.state;
}

// One request at a time: what is pressed while an answer is on its way is dropped.
async function ask(request) {
  if (root.dataset.state === "busy") return;
  const before = root.dataset.state;
  root.dataset.state = "busy";
  try {
    const answer = await request();
    if (!answer || !answer.state) throw new Error("no answer");
    await show(answer);
  } catch (error) {
    root.dataset.state = before;
    element.querySelectorAll(".picture").forEach((picture) => picture.classList.remove("chosen"));
    say("The program does not answer, so this was not saved. Is it still running? Start it again and go on here.", true);
    if (before === "loading" || before === "waiting") timer = setTimeout(refresh, 3 * RETRY_MS);
  }
}

function refresh() {
  return ask(() => server.show([annotator()]));
}

function decide(choice) {
  if (!shown || (choice !== "undo" && shown.state !== "pair")) return;
  if (root.dataset.state !== "busy" && (choice === "left" || choice === "right")) {
    element.querySelector('.picture[data-choice="' + choice + '"]').classList.add("chosen");
  }
  ask(() => server.click([annotator(), shown.task, choice]));
}

element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-choice], #undo");
  if (!button || !element.contains(button)) return;
  button.blur(); // otherwise a key would press it again
  decide(button.dataset.choice || "undo");
});

document.addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT") {
    if (event.key === "Enter") event.target.blur();
    return;
  }
  const choice = KEYS[event.key];
  if (!choice || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (!event.repeat) decide(choice); // a key that is held down is one click
});

// The name is part of the address, so that every tab and every bookmark has its own.
const address = new URL(window.location);
find("annotator").value = address.searchParams.get("annotator") || root.dataset.annotator || DEFAULT_ANNOTATOR;
find("annotator").addEventListener("change", () => {
  address.searchParams.set("annotator", annotator());
  window.history.replaceState(null, "", address);
  refresh();
});
refresh();
