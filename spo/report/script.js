"use strict";

const cards = [...document.querySelectorAll(".card")];
const filter = document.getElementById("filter");
const sampler = document.getElementById("sampler"); // only there if pictures are of several
const zoom = document.getElementById("zoom");
const places = new Map(cards.map((card, place) => [card, place]));
let open = -1;

function visible() {
  return cards.filter((card) => !card.hidden);
}

function choose() {
  const wanted = filter.value.trim().toLowerCase();
  const ofSampler = cards.filter((card) => !sampler || card.dataset.sampler === sampler.value);
  for (const card of cards) {
    const has = card.querySelector(".prompt").textContent.toLowerCase().includes(wanted);
    card.hidden = !has || !ofSampler.includes(card);
  }
  const left = visible().length;
  document.getElementById("count").textContent = `${left} of ${ofSampler.length}`;
  document.getElementById("nothing").hidden = left > 0;
}

filter.addEventListener("input", choose);
sampler?.addEventListener("change", choose);

document.getElementById("order").addEventListener("change", (event) => {
  const sign = Number(event.target.value);
  const gain = (card) => Number(card.dataset.gain ?? 0);
  const sorted = [...document.querySelectorAll(".card")].sort((a, b) =>
    sign ? sign * (gain(a) - gain(b)) : places.get(a) - places.get(b),
  );
  cards.splice(0, cards.length, ...sorted);
  document.querySelector(".gallery").append(...cards);
});

function show(index) {
  const shown = visible();
  open = (index + shown.length) % shown.length;
  const card = shown[open];
  document.getElementById("zoom-prompt").textContent = card.querySelector(".prompt").textContent;
  document.getElementById("zoom-pictures").replaceChildren(
    ...[...card.querySelectorAll(".picture")].map((picture) => picture.cloneNode(true)),
  );
}

for (const card of cards) {
  card.querySelector(".open").addEventListener("click", () => {
    show(visible().indexOf(card));
    zoom.showModal();
  });
}

for (const button of zoom.querySelectorAll("[data-step]")) {
  button.addEventListener("click", () => show(open + Number(button.dataset.step)));
}

document.getElementById("close").addEventListener("click", () => zoom.close());

zoom.addEventListener("click", (event) => {
  if (event.target === zoom) zoom.close(); // the backdrop
});

zoom.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(open - 1);
  if (event.key === "ArrowRight") show(open + 1);
});

zoom.addEventListener("close", () => {
  visible()[open]?.querySelector(".open").focus();
});
