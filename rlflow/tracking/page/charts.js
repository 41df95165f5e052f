"use strict";
// Line charts and stacked bars in SVG. All charts of a page share a cursor: the step under the pointer is marked in each,
// and legends show the values of that step. Text is only ever set as text.

const SVG = "http://www.w3.org/2000/svg";
const COLORS = 8;
const FRAME = { height: 190, left: 46, right: 10, top: 8, bottom: 22 };
const SMOOTHED_FROM = 20; // points
const DOTS_UP_TO = 25; // points
const MOST_POINTS = 1000; // a line of more is drawn through means of neighbours
const MOST_BARS = 120;

/** An element with properties and children; a child that is text becomes a text node. */
function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function svgElement(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (parent) parent.append(made);
  return made;
}

/** Four significant places at most; a value that is missing is a dash. */
function formatNumber(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size >= 1e5 || (size > 0 && size < 1e-4)) return value.toExponential(1).replace("e+", "e");
  if (size >= 100 || Number.isInteger(value)) return value.toFixed(0);
  return value.toFixed(size >= 10 ? 2 : size >= 0.01 ? 3 : 4);
}

/** Round numbers (1, 2 or 5 times a power of ten apart) within a range, about so many. */
function ticksWithin(low, high, about) {
  const rough = (high - low) / about;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i <= Math.floor(high / step + 1e-9); i++) found.push(i * step);
  return found;
}

/** Numbers of an axis with as many decimals as their distance needs. */
function tickLabels(values) {
  const largest = Math.max(...values.map(Math.abs));
  const step = values.length > 1 ? values[1] - values[0] : largest;
  if (largest >= 1e4) {
    const [size, suffix] = [[1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([unit]) => largest >= unit);
    return values.map((value) => (value === 0 ? "0" : `${+(value / size).toPrecision(3)}${suffix}`));
  }
  if (largest > 0 && largest < 1e-3) return values.map((value) => (value === 0 ? "0" : value.toExponential(1)));
  const decimals = step > 0 ? Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) : 0;
  return values.map((value) => value.toFixed(decimals));
}

/** A range of some width around the values, from 0 when they come near it. */
function rangeOf(low, high) {
  if (low === high) {
    const room = Math.abs(low) * 0.5 || 0.5;
    return [low - room, high + room];
  }
  const room = (high - low) * 0.06;
  return [low >= 0 && low < 0.4 * high ? 0 : low - room, high + room];
}

/** At most so many points: means over equal numbers of neighbours; the first and the last point stay. */
function thinned(points, most) {
  if (points.length <= most) return points;
  const size = (points.length - 2) / (most - 2);
  const kept = [points[0]];
  for (let i = 0; i < most - 2; i++) {
    const part = points.slice(1 + Math.round(i * size), 1 + Math.round((i + 1) * size));
    if (part.length) kept.push([0, 1].map((axis) => part.reduce((sum, point) => sum + point[axis], 0) / part.length));
  }
  return [...kept, points[points.length - 1]];
}

/** Means over `reach` neighbours on either side, so that trends do not lag; over fewer near the ends. */
function smoothed(points, reach) {
  const sums = [0];
  for (const [, y] of points) sums.push(sums[sums.length - 1] + y);
  return points.map(([x], i) => {
    const near = Math.max(reach >> 1, Math.min(reach, i, points.length - 1 - i));
    const [from, to] = [Math.max(0, i - near), Math.min(points.length, i + near + 1)];
    return [x, (sums[to] - sums[from]) / (to - from)];
  });
}

/** Whether a line goes up and down much further than from its lowest to its highest point. */
function isNoisy(points) {
  let [travelled, low, high] = [0, Infinity, -Infinity];
  points.forEach(([, y], i) => {
    travelled += i ? Math.abs(y - points[i - 1][1]) : 0;
    [low, high] = [Math.min(low, y), Math.max(high, y)];
  });
  return travelled > 3 * (high - low);
}

/** The index of the number nearest to `wanted` in an ascending list. */
function nearestIndex(sorted, wanted) {
  let [low, high] = [0, sorted.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1;
    else high = middle;
  }
  return low > 0 && wanted - sorted[low - 1] < sorted[low] - wanted ? low - 1 : low;
}

/** The one box that follows the pointer. */
class Tooltip {
  constructor() {
    this.box = element("div", { className: "tooltip", hidden: true });
    document.body.append(this.box);
  }

  /** Shows lines of [colour or null, name, value] under a heading, beside a place in the window. */
  show(x, y, heading, rows) {
    const cells = rows.map(([color, name, value]) => {
      const dot = element("i");
      dot.style.background = color || "none";
      return element("div", {}, dot, element("span", { textContent: name }), element("b", { textContent: value }));
    });
    this.box.replaceChildren(element("strong", { textContent: heading }), ...cells);
    this.box.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = this.box;
    const left = x + 14 + width < innerWidth ? x + 14 : Math.max(4, x - 14 - width);
    this.box.style.left = `${left}px`;
    this.box.style.top = `${Math.max(4, Math.min(y + 12, innerHeight - height - 4))}px`;
  }

  hide() {
    this.box.hidden = true;
  }
}

/** The charts of a page, their smoothing and their cursor. */
class Charts {
  constructor(tooltip) {
    [this.tooltip, this.smoothing, this.all] = [tooltip, 7, []];
    new ResizeObserver(() => this.redraw()).observe(document.body);
  }

  clear() {
    this.all = [];
  }

  /** A card with a line chart. Each line: {name, color (0 to 7), steps, values (null where there is none)}. */
  addLines(host, title, lines) {
    return this.add(host, new LineChart(this, title, lines));
  }

  /** A card with stacked bars. Each part: {name, color, values}, one value for each of `steps`. */
  addBars(host, title, steps, parts, unit) {
    return this.add(host, new BarChart(this, title, steps, parts, unit));
  }

  add(host, chart) {
    this.all.push(chart);
    host.append(chart.card);
    chart.draw();
    return chart;
  }

  smooth(percent) {
    this.smoothing = percent;
    this.redraw(true);
  }

  /** Draws again what has another width now; everything where `always`. */
  redraw(always = false) {
    for (const chart of this.all) if (always || chart.plot.clientWidth !== chart.width) chart.draw();
  }

  /** Marks a step in all charts; null takes the mark away. */
  cursor(step) {
    for (const chart of this.all) chart.mark(step);
    if (step === null) this.tooltip.hide();
  }
}

/** What both kinds have: a card with title, legend and plot; axes; the pointer and the arrow keys. */
class Chart {
  constructor(charts, title, lines) {
    [this.charts, this.lines, this.width, this.marked] = [charts, lines, 0, null];
    this.legend = lines.map((line) => {
      const dot = element("i");
      dot.style.background = colorOf(line);
      return { entry: element("span", {}, dot, line.name), value: element("b") };
    });
    for (const { entry, value } of this.legend) entry.append(value);
    this.plot = element("div", { className: "plot", tabIndex: 0 });
    this.plot.setAttribute("role", "img");
    this.plot.setAttribute("aria-label", `${title}: ${lines.map((line) => line.name).join(", ")}`);
    const legend = element("div", { className: "legend" }, ...this.legend.map(({ entry }) => entry));
    this.card = element("section", { className: "card chart" }, element("h4", { textContent: title }), legend, this.plot);
    this.plot.addEventListener("pointermove", (event) => this.point(event.clientX, event.clientY));
    this.plot.addEventListener("pointerleave", () => charts.cursor(null));
    this.plot.addEventListener("blur", () => charts.cursor(null));
    this.plot.addEventListener("keydown", (event) => this.walk(event));
  }

  x(step) {
    const [low, high] = this.xRange;
    return FRAME.left + ((step - low) / (high - low)) * (this.width - FRAME.left - FRAME.right);
  }

  y(value) {
    const [low, high] = this.yRange;
    return FRAME.height - FRAME.bottom - ((value - low) / (high - low)) * (FRAME.height - FRAME.top - FRAME.bottom);
  }

  /** A new picture with its grid. */
  begin() {
    const { width } = this;
    this.svg = svgElement("svg", { viewBox: `0 0 ${width} ${FRAME.height}`, width, height: FRAME.height });
    const heights = ticksWithin(...this.yRange, 4);
    tickLabels(heights).forEach((label, i) => {
      const y = this.y(heights[i]);
      svgElement("line", { x1: FRAME.left, x2: width - FRAME.right, y1: y, y2: y, class: "grid" }, this.svg);
      svgElement("text", { x: FRAME.left - 6, y: y + 3.5, "text-anchor": "end" }, this.svg).textContent = label;
    });
    for (const step of ticksWithin(...this.xRange, Math.max(2, width / 90)).filter(Number.isInteger)) {
      const place = { x: this.x(step), y: FRAME.height - 6, "text-anchor": "middle" };
      svgElement("text", place, this.svg).textContent = step;
    }
    const bottom = FRAME.height - FRAME.bottom;
    this.bar = svgElement("line", { y1: FRAME.top, y2: bottom, class: "cursor", visibility: "hidden" }, this.svg);
    this.dots = svgElement("g", {}, this.svg);
  }

  end() {
    this.svg.append(this.bar, this.dots);
    this.plot.replaceChildren(this.svg);
    this.mark(null);
  }

  point(clientX, clientY) {
    const share = (clientX - this.plot.getBoundingClientRect().left - FRAME.left) / (this.width - FRAME.left - FRAME.right);
    const [low, high] = this.xRange;
    this.show(this.steps[nearestIndex(this.steps, low + share * (high - low))], clientX, clientY);
  }

  walk(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const at = this.marked === null ? this.steps.length - 1 : nearestIndex(this.steps, this.marked) + moves[event.key];
    const step = this.steps[Math.max(0, Math.min(this.steps.length - 1, at))];
    const box = this.plot.getBoundingClientRect();
    this.show(step, box.left + this.x(step), box.top + 20);
  }

  show(step, clientX, clientY) {
    this.charts.cursor(step);
    const rows = this.lines.map((line, i) => [colorOf(line), line.name, formatNumber(this.valueAt(i, step)) + this.unit]);
    this.charts.tooltip.show(clientX, clientY, this.headingOf(step), rows);
  }

  headingOf(step) {
    return `step ${step}`;
  }

  mark(step) {
    this.marked = step;
    if (!this.svg) return;
    this.dots.replaceChildren();
    const [low, high] = this.xRange;
    const isIn = step !== null && step >= low && step <= high;
    this.bar.setAttribute("visibility", isIn ? "visible" : "hidden");
    if (isIn) for (const end of ["x1", "x2"]) this.bar.setAttribute(end, this.x(step));
    this.legend.forEach(({ value }, i) => {
      value.textContent = isIn ? formatNumber(this.valueAt(i, step)) : this.summary(i);
    });
    if (isIn) this.markLines(step);
  }

  markLines() {}
}

class LineChart extends Chart {
  constructor(charts, title, lines) {
    super(charts, title, lines);
    this.unit = "";
    this.points = lines.map(({ steps, values }) =>
      steps.map((step, i) => [step, values[i]]).filter(([, value]) => value !== null && value !== undefined),
    );
    this.stepsOf = this.points.map((points) => points.map(([step]) => step));
    this.steps = [...new Set(this.stepsOf.flat())].sort((a, b) => a - b);
    const ys = this.points.flat().map(([, y]) => y);
    const [first, last] = [this.steps[0] ?? 0, this.steps[this.steps.length - 1] ?? 1];
    this.xRange = first === last ? [first - 0.5, last + 0.5] : [first, last];
    const low = ys.reduce((a, b) => Math.min(a, b), Infinity);
    const high = ys.reduce((a, b) => Math.max(a, b), -Infinity);
    this.yRange = ys.length ? rangeOf(low, high) : [0, 1];
  }

  draw() {
    this.width = this.plot.clientWidth;
    if (!this.width) return;
    this.begin();
    this.points.forEach((all, i) => {
      const points = thinned(all, MOST_POINTS);
      const reach = Math.round((points.length * this.charts.smoothing) / 200);
      const isFaint = reach > 0 && points.length >= SMOOTHED_FROM && isNoisy(points);
      this.path(points, i, isFaint ? "line faint" : "line");
      if (isFaint) this.path(smoothed(points, reach), i, "line smooth");
      if (points.length <= DOTS_UP_TO) for (const [x, y] of points) this.dot(this.svg, x, y, i, 2.6);
    });
    this.end();
  }

  path(points, i, look) {
    if (!points.length) return;
    const d = `M${points.map(([x, y]) => `${this.x(x).toFixed(1)} ${this.y(y).toFixed(1)}`).join("L")}`;
    svgElement("path", { d, class: look, stroke: colorOf(this.lines[i]) }, this.svg);
  }

  dot(parent, x, y, i, r) {
    svgElement("circle", { cx: this.x(x), cy: this.y(y), r, fill: colorOf(this.lines[i]) }, parent);
  }

  /** The value at a step; null where the line has none. */
  valueAt(i, step) {
    const steps = this.stepsOf[i];
    const at = nearestIndex(steps, step);
    return steps.length && steps[at] === step ? this.points[i][at][1] : null;
  }

  summary(i) {
    const values = this.lines[i].values;
    return values.length ? formatNumber(this.lines[i].last ?? this.points[i].at(-1)?.[1]) : "";
  }

  markLines(step) {
    this.lines.forEach((_, i) => {
      const value = this.valueAt(i, step);
      if (value !== null) this.dot(this.dots, step, value, i, 3.4);
    });
  }
}

class BarChart extends Chart {
  constructor(charts, title, steps, parts, unit) {
    super(charts, title, parts);
    this.unit = ` ${unit}`;
    const number = Math.min(steps.length, MOST_BARS);
    const edges = Array.from({ length: number + 1 }, (_, i) => Math.round((i * steps.length) / number));
    this.bars = edges.slice(0, -1).map((from, i) => {
      const to = edges[i + 1];
      const means = parts.map(({ values }) => values.slice(from, to).reduce((sum, v) => sum + (v || 0), 0) / (to - from));
      return { first: steps[from], last: steps[to - 1], means };
    });
    this.steps = this.bars.map(({ first, last }) => (first + last) / 2);
    this.totals = parts.map(({ values }) => values.reduce((sum, value) => sum + (value || 0), 0));
    const highest = Math.max(...this.bars.map(({ means }) => means.reduce((a, b) => a + b, 0)));
    [this.xRange, this.yRange] = [[steps[0] - 0.5, steps[steps.length - 1] + 0.5], [0, highest * 1.05 || 1]];
  }

  draw() {
    this.width = this.plot.clientWidth;
    if (!this.width) return;
    this.begin();
    for (const { first, last, means } of this.bars) {
      const [left, right] = [this.x(first - 0.5), this.x(last + 0.5)];
      const gap = Math.min(1.5, (right - left) * 0.1);
      let base = 0;
      means.forEach((value, i) => {
        const [top, bottom] = [this.y(base + value), this.y(base)];
        base += value;
        const place = { x: left + gap, y: top, width: right - left - 2 * gap, height: bottom - top };
        svgElement("rect", { ...place, fill: colorOf(this.lines[i]) }, this.svg);
      });
    }
    this.end();
  }

  barAt(step) {
    return this.bars[nearestIndex(this.steps, step)];
  }

  valueAt(i, step) {
    return this.barAt(step).means[i];
  }

  headingOf(step) {
    const { first, last, means } = this.barAt(step);
    const total = formatNumber(means.reduce((a, b) => a + b, 0));
    return first === last ? `step ${first}: ${total}${this.unit}` : `steps ${first} to ${last}, mean: ${total}${this.unit}`;
  }

  summary(i) {
    const all = this.totals.reduce((a, b) => a + b, 0);
    return `${Math.round((100 * this.totals[i]) / (all || 1))}%`;
  }
}

function colorOf(line) {
  return `var(--s${line.color % COLORS})`;
}
