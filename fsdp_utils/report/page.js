"use strict";
const tip = document.getElementById("tip");
const boxes = [...document.querySelectorAll("input[data-run]")];
const names = boxes.map((box) => box.closest("label").textContent);
const shows = (run) => boxes[run].checked;

for (const box of boxes) {
  box.addEventListener("change", () => {
    // of every eighth run the colours are the same: those of this one are found by their place
    for (const part of document.querySelectorAll(`main [data-of="${box.dataset.run}"]`)) {
      part.style.display = box.checked ? "" : "none";
    }
  });
}

// the point whose step is nearest
function nearest(points, step) {
  let low = 0;
  let high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle;
    else high = middle;
  }
  return step - points[low][0] <= points[high][0] - step ? points[low] : points[high];
}

function line(run, [step, value], what) {
  const row = document.createElement("div");
  const key = document.querySelector(`.legend label:nth-child(${run + 1}) svg`).cloneNode(true);
  row.append(key, `${names[run]}: ${what}${value} at step ${step}`);
  return row;
}

function show(event, figure, data) {
  const svg = figure.querySelector("svg");
  const box = svg.getBoundingClientRect();
  const [low, high, start, stop] = data.axis;
  const place = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
  const clamped = Math.min(Math.max(place, start), stop);
  const step = low + ((clamped - start) / (stop - start)) * (high - low);
  const rows = [];
  for (const [what, curves] of [["", data.curves], ["validation ", data.marks]]) {
    for (const [run, points] of curves) {
      if (shows(run)) rows.push(line(run, nearest(points, step), what));
    }
  }
  tip.replaceChildren(...rows);
  tip.hidden = rows.length === 0;
  const left = event.clientX + 16 + tip.offsetWidth > innerWidth ? event.clientX - 16 - tip.offsetWidth : event.clientX + 16;
  tip.style.left = `${Math.max(left, 4)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 4)}px`;
  const pointer = figure.querySelector(".pointer");
  pointer.setAttribute("x1", clamped);
  pointer.setAttribute("x2", clamped);
  pointer.classList.add("shown");
}

for (const figure of document.querySelectorAll("figure.panel")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const svg = figure.querySelector("svg");
  svg.addEventListener("pointermove", (event) => show(event, figure, data));
  svg.addEventListener("pointerleave", () => {
    tip.hidden = true;
    figure.querySelector(".pointer").classList.remove("shown");
  });
}
