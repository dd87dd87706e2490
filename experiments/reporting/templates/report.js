"use strict";
// Draws the plots, in the colours of the page, on screens and on paper.
(() => {
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    showSendToCloud: false,
    plotlyServerURL: "",
  };
  const plots = Array.from(document.querySelectorAll(".plot > div"));

  function colors() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const ink = color("--ink");
    const grid = color("--grid");
    return {
      "font.color": ink,
      "xaxis.gridcolor": grid,
      "xaxis.zerolinecolor": grid,
      "yaxis.gridcolor": grid,
      "yaxis.zerolinecolor": grid,
      "modebar.color": color("--quiet"),
      "modebar.activecolor": color("--accent"),
      "modebar.bgcolor": "rgba(0,0,0,0)",
      "hoverlabel.bgcolor": color("--raised"),
      "hoverlabel.font.color": ink,
      "paper": color("--paper"),
    };
  }

  function paint() {
    for (const plot of plots) {
      const found = colors();
      // The labels of values lie over lines.
      for (const [number, label] of (plot.layout.annotations || []).entries()) {
        if (label.name === "value") {
          found[`annotations[${number}].bgcolor`] = found["paper"];
        }
      }
      delete found["paper"];
      Plotly.relayout(plot, found);
    }
  }

  for (const plot of plots) {
    const name = plot.id.replace("plot-", "figure-");
    const figure = JSON.parse(document.getElementById(name).textContent);
    Plotly.newPlot(plot, figure.data, figure.layout, config);
  }
  paint();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  // On paper, plots are as wide as a page of A4 between its margins.
  matchMedia("print").addEventListener("change", (print) => {
    paint();
    for (const plot of plots) {
      Plotly.relayout(plot, print.matches ? { width: 660 } : { width: null, autosize: true });
    }
  });
})();
