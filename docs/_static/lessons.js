// Moves the figures of the pages that teach. All numbers come with the page, from cnn.losses.
"use strict";

const DIGITS = new Intl.NumberFormat("en", { maximumFractionDigits: 4 });
const asText = (value) => DIGITS.format(value + 0).replace("-", "−").replace(/^−0$/, "0");

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
}

// The path of a horizontal arrow, as in loss_figures.py.
function arrow(start, end, y) {
  const head = Math.max(-7, Math.min(7, start - end));
  return `M${start} ${y}H${end}m${head} -5L${end} ${y}l${head} 5`;
}

function lossFigure(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const [left, top, width, height, x0, x1, y0, y1] = data.panel;
  const across = (x) => left + ((x - x0) / (x1 - x0)) * width;
  const up = (y) => top + ((y1 - y) / (y1 - y0)) * height;
  const slider = figure.querySelector("input[type=range]");
  const rows = [...figure.querySelectorAll("tbody tr")];
  const pulls = [...figure.querySelectorAll(".pull")];

  function show() {
    const key = figure.querySelector("input[type=radio]:checked").value;
    const moved = data.moved[key];
    const x = data.steps[slider.value];
    const numbers = data.points[key][slider.value];
    const classes = data.outputs.length;
    const [value, ...rest] = numbers;
    figure.dataset.along = key;
    set(figure.querySelector(".at"), { x1: across(x), x2: across(x) });
    set(figure.querySelector(".at-value"), { cx: across(x), cy: up(value) });
    set(figure.querySelector(".at-gradient"), { cx: across(x), cy: up(rest[moved]) });
    figure.querySelector("output.value").textContent = asText(value);
    slider.setAttribute("aria-valuetext", `output ${asText(x)}: loss ${asText(value)}`);
    for (let k = 0; k < classes; k += 1) {
      const output = k === moved ? x : data.outputs[k];
      const [gradient, probability] = [rest[k], rest[classes + k]];
      const cells = rows[k].cells;
      cells[1].textContent = asText(output);
      cells[3].textContent = asText(probability);
      cells[4].textContent = asText(gradient);
      const circle = pulls[k].querySelector("circle");
      const y = Number(circle.getAttribute("cy"));
      set(circle, { cx: across(output) });
      set(pulls[k].querySelector(".arrow"), {
        d: arrow(across(output), across(output - gradient), y),
      });
    }
  }

  slider.addEventListener("input", show);
  for (const choice of figure.querySelectorAll("input[type=radio]")) {
    choice.addEventListener("change", () => {
      const moved = data.moved[choice.value];
      slider.value = data.steps.indexOf(data.outputs[moved]);
      show();
    });
  }
  show();
}

function alikeFigure(figure) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const slider = figure.querySelector("input[type=range]");
  slider.addEventListener("input", () => {
    figure.querySelector("label output").textContent = `${(Number(slider.value) + 1) * 5} %`;
    for (const panel of figure.querySelectorAll("[data-loss]")) {
      const state = data[panel.dataset.loss][slider.value];
      set(panel.querySelector(".curve"), { d: state.curve });
      set(panel.querySelector(".best"), { d: state.best });
      panel.querySelector("output").textContent = state.text;
    }
  });
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("figure.loss").forEach(lossFigure);
  document.querySelectorAll("figure.alike").forEach(alikeFigure);
  document.querySelectorAll(".lesson .controls").forEach((each) => { each.hidden = false; });
});
