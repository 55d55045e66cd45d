"use strict";

const $ = (id) => document.getElementById(id);
const KEYS = { ArrowLeft: "left", ArrowRight: "right", ArrowUp: "tie", ArrowDown: "skip", t: "tie", s: "skip" };
const SWIPE = 50; // pixels
let annotator = localStorage.getItem("spo-annotator");
let state = null;
let busy = false;
let timer = 0;

async function ask(path, more = {}) {
  if (busy) return;
  busy = true;
  clearTimeout(timer);
  try {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ annotator, ...more }),
    });
    const found = answer.headers.get("Content-Type")?.startsWith("application/json")
      ? await answer.json()
      : { error: (await answer.text()).trim() };
    if (answer.ok || answer.status === 409) {
      state = { ...state, ...found };
      await show();
    } else {
      $("message").textContent = found.error;
      $("leave").textContent ||= "Use another name";
    }
  } catch {
    $("message").textContent = "The server does not answer. Is the command still running?";
  }
  busy = false;
}

async function show() {
  document.title = state.title;
  $("title").textContent = state.title;
  $("question").textContent = state.question;
  $("leave").textContent = state.annotator;
  $("leave").title = "Use another name";
  $("bar").max = Math.max(1, state.total);
  $("bar").value = state.done;
  const agreed = state.repeated ? ` \u00b7 ${state.same} of ${state.repeated} repeated pairs chosen alike` : "";
  $("progress").textContent = `${state.done} of ${state.total} pairs \u00b7 ${state.mine} by you${agreed}`;
  $("undo").disabled = !state.can_undo;
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = !state.turn;
  $("message").textContent = message();
  if (state.turn) {
    await Promise.all(["left", "right"].map(load));
    $("prompt").textContent = state.prompt;
  }
  $("task").hidden = !state.turn;
  document.body.dataset.turn = state.turn ?? "";
  if (state.waiting) timer = setTimeout(() => ask("/state"), 1000);
}

function message() {
  if (state.turn) return "";
  if (state.error) return `No more pictures: ${state.error}`;
  return state.waiting ? "The next pictures are being made." : "That was the last pair. Thank you!";
}

async function load(side) {
  const image = $(side).querySelector("img");
  image.src = `/picture/${state[side]}`;
  await image.decode().catch(() => {}); // both pictures and the prompt change together
  image.classList.toggle("pixels", image.naturalWidth <= 128);
}

function choose(choice) {
  if (state?.turn) ask("/choose", { turn: state.turn, choice });
}

function start() {
  $("who").hidden = Boolean(annotator);
  $("work").hidden = !annotator;
  if (annotator) ask("/state");
  else $("name").focus();
}

$("who").addEventListener("submit", (event) => {
  event.preventDefault();
  annotator = $("name").value.trim();
  localStorage.setItem("spo-annotator", annotator);
  start();
});

$("leave").addEventListener("click", () => {
  annotator = null;
  localStorage.removeItem("spo-annotator");
  start();
});

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}

$("undo").addEventListener("click", () => ask("/undo"));

document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || $("work").hidden) return;
  if (KEYS[event.key]) choose(KEYS[event.key]);
  else if (event.key === "u" || event.key === "Backspace") ask("/undo");
  else return;
  event.preventDefault();
});

let from = null;

$("pictures").addEventListener("touchstart", (event) => {
  from = event.touches.length === 1 ? event.touches[0] : null; // two fingers zoom
});

$("pictures").addEventListener("touchend", (event) => {
  if (!from) return;
  const x = event.changedTouches[0].clientX - from.clientX;
  const y = event.changedTouches[0].clientY - from.clientY;
  from = null;
  if (Math.max(Math.abs(x), Math.abs(y)) < SWIPE) return; // a tap, which is a click
  event.preventDefault();
  if (Math.abs(x) > Math.abs(y)) choose(x < 0 ? "left" : "right");
  else choose(y < 0 ? "tie" : "skip");
});

start();
