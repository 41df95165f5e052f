// Times and states in words.

export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return minutes < 48 * 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${Math.round(minutes / 1440)} days`;
}

export function ago(time) {
  if (!time) return "";
  const seconds = Math.max(0, Date.now() / 1000 - time);
  return seconds < 5 ? "now" : `${duration(seconds)} ago`;
}

export function stepOf({ step, steps }) {
  if (step === null || step === undefined) return "";
  return steps ? `${step} / ${steps}` : `${step}`;
}

/** A run's state as a coloured word. */
export function badge(state) {
  return element("span", { className: `badge ${state}`, textContent: state });
}

/** How far a run is, as a bar; none where its length is not known. */
export function progress({ step, steps, state }) {
  const bar = element("span", { className: `progress ${state}` });
  const done = element("i");
  const share = state === "finished" ? 1 : Math.min(1, (step ?? 0) / (steps || 1)); // some end before their last step
  done.style.width = `${100 * share}%`;
  if (steps) bar.append(done);
  return bar;
}

/** A small curve without axes. */
export function sparkline(values) {
  const [width, height] = [120, 26];
  const svg = svgElement("svg", { viewBox: `0 0 ${width} ${height}`, class: "spark", "aria-hidden": "true" });
  if (values.length < 2) return svg;
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (i) => 2 + (i * (width - 4)) / (values.length - 1);
  const y = (value) => height - 3 - ((value - low) / (high - low || 1)) * (height - 6);
  const d = `M${values.map((value, i) => `${x(i).toFixed(1)} ${y(value).toFixed(1)}`).join("L")}`;
  svgElement("path", { d, class: "line", stroke: "var(--s0)" }, svg);
  svgElement("circle", { cx: x(values.length - 1), cy: y(values.at(-1)), r: 2.2, fill: "var(--s0)" }, svg);
  return svg;
}

export function button(text, onclick, look = "") {
  return element("button", { type: "button", textContent: text, onclick, className: look });
}

/** A line that says how a call went. */
export function notice(host, text, look = "bad") {
  host.replaceChildren(...(text ? [element("p", { className: `notice ${look}`, textContent: text })] : []));
}

export const runLink = (run, tab = "") => `#/run/${run.split("/").map(encodeURIComponent).join("/")}${tab && `?${tab}`}`;
