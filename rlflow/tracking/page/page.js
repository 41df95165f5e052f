"use strict";
// Puts the page together from what is embedded in it: compressed JSON in chunks that are unpacked when they are looked at.

/** What a chunk holds: base64 of raw deflate of JSON. */
async function unpack(name) {
  const text = document.getElementById(`chunk-${name}`).textContent.trim();
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(stream).text());
}

class Page {
  constructor(data) {
    [this.data, this.tooltip] = [data, new Tooltip()];
    this.charts = new Charts(this.tooltip);
    this.main = document.querySelector("main");
    const smoothing = document.getElementById("smoothing");
    smoothing.addEventListener("input", () => this.charts.smooth(+smoothing.value));
    smoothing.value = this.charts.smoothing;
    this.tabs = document.getElementById("stages");
    data.stages.forEach((stage, i) => {
      const tab = element("button", { type: "button", textContent: stage.name });
      tab.addEventListener("click", () => this.show(i));
      this.tabs.append(tab);
    });
    this.tabs.hidden = data.stages.length < 2;
    this.show(data.stages.length - 1);
  }

  /** Shows one stage: of one run, or of several over each other. */
  show(index) {
    const { name, runs, differences } = this.data.stages[index];
    [...this.tabs.children].forEach((tab, i) => tab.classList.toggle("chosen", i === index));
    this.charts.clear();
    this.stage = element("div", { className: "stage" });
    this.main.replaceChildren(this.stage);
    if (runs.length > 1) this.compared(runs, differences);
    else this.one(runs[0]);
    for (const run of runs) if (run.phases.length) this.phases(run, runs.length > 1 ? `: ${run.run}` : "");
    if (runs.length === 1) this.account(runs[0]);
    this.episodes(runs, name);
    this.more(runs);
    for (const run of runs) this.recipe(run, runs.length > 1 ? ` of ${run.run}` : "");
  }

  section(title, ...children) {
    this.stage.append(element("h3", { textContent: title }), ...children);
  }

  one(run) {
    const facts = run.facts.map((fact) => element("span", { textContent: fact }));
    const tiles = run.tiles.map(([label, value, remark]) =>
      element("div", { className: "card tile" }, small(label), element("b", { textContent: value }), small(remark)),
    );
    const grid = element("div", { className: "charts" });
    this.stage.append(element("p", { className: "facts" }, ...facts), element("div", { className: "tiles" }, ...tiles), grid);
    for (const [title, keys] of run.panels) this.charts.addLines(grid, title, keys.map((key, i) => lineOf(run, key, key, i)));
  }

  compared(runs, differences) {
    const head = ["run", "algorithm", "steps", ...runs[0].tiles.map(([label]) => label)];
    const rows = runs.map((run, i) => {
      const name = element("td", {}, element("i", { className: "dot" }), run.run);
      name.firstChild.style.background = colorOf({ color: i });
      const values = runs[0].tiles.map(([label]) => run.tiles.find(([other]) => other === label)?.[1] ?? "-");
      const cells = [run.algorithm ?? "-", run.last_step, ...values];
      return element("tr", {}, name, ...cells.map((text) => element("td", { textContent: text })));
    });
    this.stage.append(tableOf(head, rows));
    const grid = element("div", { className: "charts" });
    this.stage.append(grid);
    for (const key of keysOf(runs, "panels")) this.charts.addLines(grid, key, linesOver(runs, key));
    const changed = differences.map(([key, values]) =>
      element("tr", {}, ...[key, ...values].map((text) => element("td", { textContent: text }))),
    );
    const same = element("p", { className: "quiet", textContent: "No key of their recipes differs." });
    this.section("What differs in their recipes", changed.length ? tableOf(["key", ...runs.map((run) => run.run)], changed) : same);
  }

  phases(run, whose) {
    const { steps, metrics } = run.metrics;
    const total = metrics["time/step_s"];
    const kept = steps.map((_, i) => i).filter((i) => steps[i] !== 0 && total[i] !== null);
    const known = run.phases.filter(({ key }) => key !== null);
    const rest = kept.map((i) => Math.max(0, total[i] - known.reduce((sum, { key }) => sum + (metrics[key][i] || 0), 0)));
    const parts = run.phases.map(({ name, key }, color) => ({ name, color, values: key === null ? rest : kept.map((i) => metrics[key][i]) }));
    this.section(`Where the time went${whose}`);
    this.charts.addBars(this.stage, "Seconds a step", kept.map((i) => steps[i]), parts, "s");
  }

  /** First and last evaluations, and why rewards failed. */
  account(run) {
    if (run.evaluations.length) {
      const rows = run.evaluations.map(([metric, firstStep, first, lastStep, last]) => {
        const change = first === null || last === null ? "" : formatNumber(last - first);
        const cells = [valueAt(first, firstStep), valueAt(last, lastStep), change.startsWith("-") || !change ? change : `+${change}`];
        return element("tr", {}, element("td", { textContent: metric }), ...cells.map((cell) => element("td", { className: "num" }, cell)));
      });
      this.section("First and last evaluation", tableOf(["metric", "first", "last", "change"], rows));
    }
    if (run.failures.length) {
      const rows = run.failures.map((row) => element("tr", {}, ...row.map((text) => element("td", { textContent: text }))));
      this.section("Why rewards failed", tableOf(["cause", "rollouts"], rows));
    }
  }

  episodes(runs, name) {
    const having = runs.filter((run) => run.rollouts.some(({ chunk }) => chunk !== null));
    const notes = runs.flatMap((run) => run.notes.map((note) => (runs.length > 1 ? `${run.run}: ${note}` : note)));
    const said = notes.map((note) => element("p", { className: "quiet", textContent: note }));
    if (!having.length) return this.stage.append(...said);
    const host = element("div");
    const open = (run) => {
      host.replaceChildren();
      new Episodes(host, run, unpack, this.tooltip);
    };
    this.section("Rollouts", ...said);
    if (having.length > 1) {
      const choice = element("select", { ariaLabel: "run" });
      fill(choice, having.map((run) => run.run), (run) => `rollouts of ${run}`);
      choice.addEventListener("input", () => open(having[choice.selectedIndex]));
      this.stage.append(element("div", { className: "controls" }, choice));
    }
    this.stage.append(host);
    open(having[0]);
  }

  more(runs) {
    const keys = keysOf(runs, "more_panels");
    if (keys.length) {
      const grid = element("div", { className: "charts" });
      const details = this.details(`More metrics (${keys.length})`, grid);
      details.addEventListener("toggle", () => {
        if (!grid.childElementCount) for (const key of keys) this.charts.addLines(grid, key, runs.length > 1 ? linesOver(runs, key) : [lineOf(runs[0], key, key, 0)]);
      });
    }
    if (runs.length > 1) return;
    for (const [value, names] of runs[0].unchanging) {
      this.stage.append(element("p", { className: "quiet", textContent: `${value} at every step: ${names.join(", ")}` }));
    }
  }

  recipe(run, whose) {
    if (run.recipe_text) this.details(`Recipe${whose}, every key`, element("div", { className: "card" }, element("pre", { className: "recipe", textContent: run.recipe_text })));
  }

  details(title, ...children) {
    const details = element("details", {}, element("summary", { textContent: title }), ...children);
    this.stage.append(details);
    return details;
  }
}

function lineOf(run, key, name, color) {
  const values = run.metrics.metrics[key] ?? [];
  return { name, color, steps: run.metrics.steps, values, last: run.last[key] };
}

function linesOver(runs, key) {
  return runs.map((run, i) => ({ ...lineOf(run, key, run.run, i), color: i })).filter(({ values }) => values.length);
}

/** The metrics of any run's charts, each once. */
function keysOf(runs, panels) {
  return [...new Set(runs.flatMap((run) => run[panels].flatMap(([, keys]) => keys)))];
}

function tableOf(head, rows) {
  const cells = head.map((name) => element("th", { textContent: name }));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...cells)), element("tbody", {}, ...rows));
  return element("div", { className: "card table" }, table);
}

function valueAt(value, step) {
  return element("span", {}, value === null ? "null" : formatNumber(value), " ", small(`step ${step}`));
}

function small(text) {
  return element("small", { textContent: text });
}

async function open() {
  try {
    document.page = new Page(await unpack("main"));
  } catch (error) {
    document.querySelector("main").textContent = `This page cannot be shown: ${error}. It needs a browser of 2023 or later.`;
    throw error;
  } finally {
    document.documentElement.dataset.ready = Math.round(performance.now());
  }
}

open();
