// A run's metrics over its steps, and where the time of each step went, kept up to date.

import { get } from "./api.js";

/** What was logged, metric by metric; grows with what is asked for since. */
class History {
  constructor(run) {
    this.run = run;
    this.forget();
    this.file = "";
  }

  forget() {
    [this.offset, this.steps, this.metrics] = [0, [], {}];
  }

  /** Asks for what is new. Returns whether there was something. */
  async ask() {
    const rows = await get("/api/metrics", { run: this.run, offset: this.offset, file: this.file });
    if (rows.is_anew) this.forget();
    [this.file, this.offset] = [rows.file, rows.offset];
    rows.steps.forEach((step, i) => this.add(step, rows.metrics, i));
    return rows.steps.length > 0;
  }

  /** A step that came before is replaced: the later line wins. */
  add(step, metrics, i) {
    const at = this.steps.at(-1) === step ? this.steps.length - 1 : this.steps.push(step) - 1;
    for (const [key, values] of Object.entries(metrics)) {
      if (values[i] === null && at < (this.metrics[key]?.length ?? 0)) continue;
      const known = (this.metrics[key] ??= []);
      while (known.length < at) known.push(null);
      known[at] = values[i];
    }
  }

  values(key) {
    const known = this.metrics[key] ?? [];
    return this.steps.map((_, i) => known[i] ?? null);
  }
}

export function curvesView(host, state, { onLeave }) {
  const tooltip = new Tooltip();
  const charts = new Charts(tooltip);
  onLeave(() => tooltip.box.remove());
  const history = new History(state.run);
  const tiles = element("div", { className: "tiles" });
  const smoothing = element("input", { type: "range", min: 0, max: 50, value: charts.smoothing, id: "smoothing" });
  smoothing.addEventListener("input", () => charts.smooth(Number(smoothing.value)));
  const filter = element("input", { type: "search", placeholder: "Filter metrics", className: "filter" });
  filter.setAttribute("aria-label", "Filter metrics");
  const main = element("div", { className: "charts" });
  const more = element("div", { className: "charts" });
  const moreTitle = element("summary");
  const details = element("details", {}, moreTitle, more);
  const unchanging = element("div");
  const label = element("label", { htmlFor: "smoothing", textContent: "smoothing" });
  host.append(tiles, element("div", { className: "bar" }, label, smoothing, filter), main, details, unchanging);
  const empty = element("p", { className: "empty quiet", textContent: "No step is done yet." });
  details.addEventListener("toggle", () => draw());
  filter.addEventListener("input", () => draw());

  const lines = (keys) => keys.map((name, i) => ({ name, color: i, steps: history.steps, values: history.values(name) }));
  const isWanted = (title, keys) => `${title} ${keys.join(" ")}`.toLowerCase().includes(filter.value.toLowerCase());

  const addPhases = (phases) => {
    const at = history.steps.flatMap((step, i) => (step > 0 ? [i] : []));
    if (!phases.length || !at.length) return;
    const whole = history.values("time/step_s");
    const known = phases.filter(({ key }) => key).map(({ key }) => history.values(key));
    const rest = whole.map((seconds, i) => Math.max(0, (seconds ?? 0) - known.reduce((sum, values) => sum + (values[i] ?? 0), 0)));
    const parts = phases.map(({ name, key }, i) => {
      const values = key ? history.values(key) : rest;
      return { name, color: i, values: at.map((row) => values[row]) };
    });
    charts.addBars(main, "Where the time went, seconds a step", at.map((row) => history.steps[row]), parts, "s");
  };

  let isStale = false;
  const draw = () => {
    isStale = false;
    const { summary } = state.data;
    const [top, shown] = [window.scrollY, details.open];
    charts.clear();
    main.style.minHeight = `${main.offsetHeight}px`; // what is below does not jump while charts are made again
    main.replaceChildren();
    more.replaceChildren();
    for (const [title, keys] of summary.panels) if (isWanted(title, keys)) charts.addLines(main, title, lines(keys));
    if (isWanted("phases time", [])) addPhases(summary.phases);
    if (shown) for (const [title, keys] of summary.more_panels) if (isWanted(title, keys)) charts.addLines(more, title, lines(keys));
    if (!history.steps.length) main.append(empty);
    main.style.minHeight = "";
    charts.redraw(); // the first ones were measured before those beside them were there
    moreTitle.textContent = `More metrics (${summary.more_panels.length})`;
    details.hidden = !summary.more_panels.length;
    window.scrollTo(window.scrollX, top);
    tiles.replaceChildren(
      ...summary.tiles.map(([name, number, remark]) =>
        element("div", { className: "card tile" }, element("small", { textContent: name }), element("b", { textContent: number }), element("small", { textContent: remark })),
      ),
    );
    unchanging.replaceChildren(
      ...summary.unchanging.map(([value, keys]) => element("p", { className: "quiet", textContent: `${value} at every step: ${keys.join(", ")}` })),
    );
  };

  return {
    async update() {
      const isNew = await history.ask();
      isStale ||= isNew;
      // A chart that somebody points at stays as it is meanwhile.
      const isRead = main.querySelector(".plot:hover, .plot:focus") !== null;
      if ((isStale && !isRead) || !main.children.length) draw();
    },
  };
}
