"use strict";
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);

  // Light and dark: start from the reader's setting, then obey the button.
  const theme = byId("theme");
  let dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  const nameTheme = () => { theme.textContent = dark ? "Light" : "Dark"; };
  theme.hidden = false;
  nameTheme();
  theme.addEventListener("click", () => {
    dark = !dark;
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
    nameTheme();
  });

  // Curves: all charts show the values at one step.
  const charts = all(".chart").map((svg) => {
    const data = JSON.parse(svg.dataset.curves);
    const steps = [...new Set(data.curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
    return { svg, ...data, steps, cross: svg.querySelector(".cross"),
             readout: svg.parentElement.querySelector(".readout"),
             last: [...svg.parentElement.querySelector(".readout").childNodes] };
  });
  const hiddenRuns = new Set();
  let shownStep = null;

  const nearest = (steps, wanted) => {
    let best = 0;
    steps.forEach((step, place) => {
      if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = place;
    });
    return best;
  };

  const word = (text, value, style) => {
    const span = document.createElement("span");
    span.append(text);
    if (value !== undefined) {
      span.append(Object.assign(document.createElement("b"), { textContent: value, className: style }));
    }
    return span;
  };

  const showStep = (wanted) => {
    shownStep = wanted;
    for (const chart of charts) {
      const [low, high, start, end] = chart.x;
      const step = chart.steps[nearest(chart.steps, wanted)];
      const x = start + ((step - low) / (high - low)) * (end - start);
      chart.cross.setAttribute("x1", x);
      chart.cross.setAttribute("x2", x);
      chart.cross.setAttribute("visibility", "visible");
      const parts = [word(`step ${step}`)];
      for (const curve of chart.curves) {
        const place = nearest(curve.steps, step);
        const near = Math.abs(curve.steps[place] - step) * 20 <= high - low;
        if (hiddenRuns.has(curve.name) || !near) continue;
        const value = Number(curve.values[place].toPrecision(4));
        parts.push(word(`${curve.name} `, String(value), `s${curve.style}`));
      }
      chart.readout.replaceChildren(...parts);
    }
  };

  const clearStep = () => {
    shownStep = null;
    for (const chart of charts) {
      chart.cross.setAttribute("visibility", "hidden");
      chart.readout.replaceChildren(...chart.last);
    }
  };

  for (const chart of charts) {
    chart.svg.addEventListener("pointermove", (event) => {
      const box = chart.svg.getBoundingClientRect();
      const [low, high, start, end] = chart.x;
      const x = ((event.clientX - box.left) / box.width) * chart.svg.viewBox.baseVal.width;
      showStep(low + ((x - start) / (end - start)) * (high - low));
    });
    chart.svg.addEventListener("pointerleave", clearStep);
    chart.svg.addEventListener("blur", clearStep);
    chart.svg.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const last = chart.steps.length - 1;
      const place = shownStep === null ? (move > 0 ? -1 : last + 1) : nearest(chart.steps, shownStep);
      showStep(chart.steps[Math.min(last, Math.max(0, place + move))]);
    });
  }

  for (const button of all(".legend button")) {
    button.addEventListener("click", () => {
      const name = button.dataset.run;
      const shown = hiddenRuns.delete(name);
      if (!shown) hiddenRuns.add(name);
      button.setAttribute("aria-pressed", String(shown));
      for (const curve of all(".curve")) {
        if (curve.dataset.run === name) curve.style.display = shown ? "" : "none";
      }
      if (shownStep !== null) showStep(shownStep);
    });
  }

  // Completions: filter the rows that are there, a page at a time.
  const filters = byId("filters");
  if (!filters) return;
  const pageSize = 20;
  const rows = all("#rows > tr").map((row) => ({
    row, text: row.textContent.toLowerCase(),
    states: all("td:not(.gold)", row).map((cell) => (cell.dataset.state || "").split(" ")),
  }));
  let page = 0;

  const matches = ({ states, text }) => {
    const run = byId("run").value;
    const verdict = byId("verdict").value;
    const asked = run === "" ? states : [states[Number(run)]];
    return text.includes(byId("search").value.trim().toLowerCase()) &&
      (verdict === "" || asked.some((state) => state.includes(verdict)));
  };

  const showPage = () => {
    const found = rows.filter(matches);
    const pages = Math.max(1, Math.ceil(found.length / pageSize));
    page = Math.min(Math.max(page, 0), pages - 1);
    const onPage = new Set(found.slice(page * pageSize, (page + 1) * pageSize));
    for (const entry of rows) entry.row.hidden = !onPage.has(entry);
    byId("place").textContent = found.length
      ? `${page * pageSize + 1} to ${page * pageSize + onPage.size} of ${found.length}`
      : "No completion matches";
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
  };

  const turn = (pages) => { page += pages; showPage(); };
  filters.hidden = false;
  byId("pages").hidden = false;
  filters.addEventListener("submit", (event) => event.preventDefault());
  filters.addEventListener("input", () => { page = 0; showPage(); });
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  showPage();
})();
