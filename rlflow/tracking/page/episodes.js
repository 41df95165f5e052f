"use strict";
// The browser of a stage's rollouts: a step is chosen, its episodes are filtered and sorted, one is read.

const ROWS_AT_A_TIME = 100;
const ANSWER_COLUMNS = ["solution", "answer", "ground_truth", "reference", "response", "target", "label"];
const DARKEST_LOGPROB = -5; // nats; anything less likely looks the same
const SORTS = {
  "as trained": () => 0,
  "reward, lowest first": (one) => one.reward ?? Infinity,
  "reward, highest first": (one) => -(one.reward ?? -Infinity),
  "advantage, lowest first": (one) => one.advantage ?? Infinity,
  "advantage, highest first": (one) => -(one.advantage ?? -Infinity),
  "longest first": (one) => -one.num_tokens,
  "shortest first": (one) => one.num_tokens,
  "least likely first": (one) => one.meanLogprob ?? Infinity,
};
const COMPARISONS = {
  "<": (a, b) => a < b,
  "≤": (a, b) => a <= b,
  "=": (a, b) => a === b,
  "≥": (a, b) => a >= b,
  ">": (a, b) => a > b,
};

class Episodes {
  /**
   * @param host where it is put
   * @param stage its name, and rollouts: [{step, total, kept, has_tokens, chunk}], chunk null where it was left out
   * @param load (chunk) => promise of what `page_data.episodes` gives
   */
  constructor(host, stage, load, tooltip) {
    [this.stage, this.load, this.tooltip] = [stage, load, tooltip];
    this.kept = stage.rollouts.filter((one) => one.chunk !== null);
    [this.page, this.shown, this.chosen, this.color, this.limit] = [null, [], null, "logprob", ROWS_AT_A_TIME];
    this.build(host);
    this.choose(this.kept.length - 1);
  }

  build(host) {
    const control = (name, properties, ...children) => {
      const made = element(name, properties, ...children);
      made.addEventListener("input", () => this.filter());
      return made;
    };
    const options = (names) => names.map((name) => element("option", { textContent: name, value: name }));
    this.slider = element("input", { type: "range", min: 0, max: this.kept.length - 1, ariaLabel: "step" });
    this.slider.addEventListener("input", () => this.choose(+this.slider.value));
    const turn = (label, by, what) => {
      const button = element("button", { type: "button", textContent: label, ariaLabel: what });
      button.addEventListener("click", () => this.choose(this.at + by));
      return button;
    };
    this.stepName = element("b", { className: "step" });
    this.search = control("input", { type: "search", placeholder: "text in prompt or completion", ariaLabel: "text" });
    this.finish = control("select", { ariaLabel: "how it ended" });
    this.measure = control("select", { ariaLabel: "number" });
    this.comparison = control("select", { ariaLabel: "comparison" }, ...options(Object.keys(COMPARISONS)));
    this.bound = control("input", { type: "number", step: "any", placeholder: "any", ariaLabel: "bound" });
    this.sort = control("select", { ariaLabel: "order" }, ...options(Object.keys(SORTS)));
    this.count = element("span", { className: "quiet" });
    this.note = element("p", { className: "quiet" });
    this.table = element("div", { className: "episodes" });
    this.table.addEventListener("keydown", (event) => this.walk(event));
    this.detail = element("article", { className: "card episode" });
    this.detail.addEventListener("pointermove", (event) => this.pointAtToken(event));
    this.detail.addEventListener("pointerleave", () => this.tooltip.hide());
    host.append(
      element("div", { className: "controls" }, turn("◂", -1, "step before"), this.slider, turn("▸", 1, "next step"), this.stepName),
      element("div", { className: "controls" }, this.search, this.finish, this.measure, this.comparison, this.bound, this.sort, this.count),
      this.note,
      element("div", { className: "browser" }, this.table, this.detail),
    );
  }

  async choose(at) {
    if (at < 0 || at >= this.kept.length) return;
    this.at = at;
    const wanted = this.kept[at];
    this.slider.value = at;
    this.stepName.textContent = `step ${wanted.step}`;
    const page = await this.load(wanted.chunk);
    if (this.kept[this.at] !== wanted) return; // another was chosen while this one was unpacked
    this.page = page;
    for (const one of page.episodes) one.meanLogprob = mean(one.logprobs);
    const names = (values) => [...new Set(values)].sort();
    const finishes = names(page.episodes.map((one) => one.finish_reason));
    const states = names(page.episodes.map((one) => one.state));
    fill(this.finish, ["any end", ...finishes, ...states.filter((state) => state !== "trained"), "a reward failed"]);
    const rewards = names(page.episodes.flatMap((one) => Object.keys(one.rewards))).map((name) => `reward/${name}`);
    fill(this.measure, ["reward", ...rewards, "advantage", "num_tokens"]);
    this.note.textContent = this.remarks(wanted, page).join(" ");
    this.filter();
  }

  remarks(wanted, page) {
    const said = [];
    if (wanted.kept < wanted.total) said.push(`The first ${wanted.kept} of ${wanted.total} rollouts of this step are in this page.`);
    if (!wanted.has_tokens) said.push("Tokens and logprobs of this step are not in this page.");
    else if (!page.has_texts) said.push("No tokenizer was found on this machine: tokens are shown as ids.");
    return said;
  }

  filter() {
    if (!this.page) return;
    const text = this.search.value.toLowerCase();
    const measure = this.measure.value;
    const bound = this.bound.value === "" ? null : +this.bound.value;
    const holds = COMPARISONS[this.comparison.value];
    const end = this.finish.value;
    this.shown = this.page.episodes.filter((one) => {
      const prompt = this.page.prompts[one.prompt];
      const value = measure.startsWith("reward/") ? one.rewards[measure.slice(7)] : one[measure];
      return (
        (!text || one.completion.toLowerCase().includes(text) || prompt.text.toLowerCase().includes(text)) &&
        (end === "any end" || [one.finish_reason, one.state].includes(end) || (end === "a reward failed" && one.error)) &&
        (bound === null || (value !== null && value !== undefined && holds(value, bound)))
      );
    });
    const key = SORTS[this.sort.value];
    this.shown.sort((a, b) => key(a) - key(b) || a.row - b.row);
    this.count.textContent = `${this.shown.length} of ${this.page.episodes.length}`;
    this.limit = ROWS_AT_A_TIME;
    this.list();
    this.read(this.shown.includes(this.chosen) ? this.chosen : this.shown[0]);
  }

  list() {
    const head = ["reward", "adv.", "tokens", "prompt"].map((name) => element("th", { textContent: name }));
    const rows = this.shown.slice(0, this.limit).map((one) => {
      const cells = [formatNumber(one.reward), formatNumber(one.advantage), one.num_tokens];
      const marks = [one.error && "failed", one.finish_reason !== "stop" && one.finish_reason, one.state !== "trained" && one.state];
      const said = marks.filter(Boolean).map((mark) => element("em", { textContent: mark }));
      const row = element(
        "tr",
        { tabIndex: 0 },
        ...cells.map((text) => element("td", { className: "num", textContent: text })),
        element("td", {}, ...said, element("span", { textContent: this.page.prompts[one.prompt].text.slice(0, 80) })),
      );
      row.addEventListener("click", () => this.read(one));
      row.episode = one;
      return row;
    });
    this.rows = rows;
    this.table.replaceChildren(element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)));
    if (this.shown.length > this.limit) {
      const more = element("button", { type: "button", textContent: `${this.shown.length - this.limit} more` });
      more.addEventListener("click", () => {
        this.limit += 10 * ROWS_AT_A_TIME;
        this.list();
        this.read(this.chosen);
      });
      this.table.append(more);
    }
  }

  walk(event) {
    const at = this.rows.findIndex((row) => row.episode === this.chosen);
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, Enter: this.rows.indexOf(document.activeElement) }[event.key];
    if (next === undefined || !this.rows[next]) return;
    event.preventDefault();
    this.rows[next].focus();
    this.read(this.rows[next].episode);
  }

  read(one) {
    this.chosen = one ?? null;
    for (const row of this.rows) row.classList.toggle("chosen", row.episode === one);
    if (!one) {
      this.detail.replaceChildren(element("p", { className: "quiet", textContent: "No rollout of this step is so." }));
      return;
    }
    const prompt = this.page.prompts[one.prompt];
    this.detail.replaceChildren(
      ...this.facts(one, prompt),
      ...(one.error ? [element("p", { className: "error", textContent: one.error })] : []),
      this.siblings(one),
      element("div", { className: "beside" }, this.texts(one, prompt), this.columns(one, prompt)),
    );
  }

  facts(one, prompt) {
    const versions = one.versions ? [...new Set(one.versions.map(([version]) => version))].filter((v) => v >= 0) : [one.version];
    const facts = [
      prompt.id,
      prompt.epoch ? `epoch ${prompt.epoch}` : "",
      `sample ${one.sample}`,
      `${one.num_tokens} tokens`,
      `ended by ${one.finish_reason}`,
      one.state,
      `policy version ${versions.join(", ")}`,
    ];
    const numbers = [["reward", one.reward], ["advantage", one.advantage]];
    for (const [name, value] of Object.entries(one.rewards)) numbers.push([name, value]);
    const shown = numbers.map(([name, value], i) => {
      const missing = i && name !== "advantage" ? (one.error.includes(`${name}:`) ? "failed" : "abstained") : "none";
      const figure = element("b", { textContent: value === null ? missing : formatNumber(value) });
      return element("span", { className: i ? "" : "main" }, name, figure);
    });
    return [
      element("div", { className: "numbers" }, ...shown),
      element("p", { className: "facts" }, ...facts.filter(Boolean).map((fact) => element("span", { textContent: fact }))),
    ];
  }

  /** The rollouts of the same prompt: its group. */
  siblings(one) {
    const group = this.page.episodes.filter((other) => other.prompt === one.prompt);
    const buttons = group.map((other) => {
      const button = element("button", { type: "button", textContent: formatNumber(other.reward) });
      button.classList.toggle("chosen", other === one);
      button.addEventListener("click", () => this.read(other));
      return button;
    });
    return element("div", { className: "siblings" }, element("span", { className: "quiet", textContent: "rewards of its group" }), ...buttons);
  }

  texts(one, prompt) {
    const pictures = (prompt.images ?? []).map((source) => {
      const picture = element("img", { className: "picture", src: source, alt: "a picture of the prompt" });
      picture.addEventListener("load", () => picture.classList.toggle("small", picture.naturalWidth < 96));
      return picture;
    });
    const messages = prompt.messages.map((message) => {
      const seen = pictures.splice(0, message.images ?? 0);
      const text = typeof message.content === "string" ? message.content : JSON.stringify(message, null, 1);
      return [element("h5", { textContent: message.role }), element("pre", { className: "prompt", textContent: text }), ...seen];
    });
    const completion = element("pre", { className: "completion" });
    if (prompt.opened) completion.append(element("span", { className: "opened", textContent: prompt.opened }));
    const heading = element("h5", { textContent: "completion" });
    if (one.tokens) heading.append(this.colorChoice());
    else if (this.kept[this.at].has_tokens) heading.append(" (its tokens are not in this page)");
    if (one.tokens && this.color !== "nothing") completion.append(...this.coloredTokens(one));
    else completion.append(one.completion);
    const left = prompt.images_left_out ? [element("p", { className: "quiet", textContent: `${prompt.images_left_out} pictures are not in this page` })] : [];
    return element("div", {}, ...messages.flat(), ...left, heading, completion);
  }

  colorChoice() {
    const choice = element("select", { ariaLabel: "colour" });
    fill(choice, ["logprob", "version", "nothing"], (name) => `colour by ${name}`);
    choice.value = this.color;
    choice.addEventListener("input", () => {
      this.color = choice.value;
      this.read(this.chosen);
    });
    const scale = element("span", { className: "scale", hidden: this.color !== "logprob" });
    scale.append("likely", element("i"), `logprob ${DARKEST_LOGPROB}`);
    return element("span", { className: "choice" }, choice, scale);
  }

  coloredTokens(one) {
    const versions = one.versions.flatMap(([version, times]) => Array(times).fill(version));
    const known = [...new Set(versions)].filter((version) => version >= 0);
    return one.tokens.map((text, i) => {
      const span = element("span", { textContent: text });
      span.token = { text, logprob: one.logprobs[i], version: versions[i] };
      if (versions[i] < 0) span.className = "foreign";
      else if (this.color === "version") span.style.background = `color-mix(in srgb, var(--s${known.indexOf(versions[i]) % COLORS}) 30%, transparent)`;
      else {
        const share = Math.min(1, (one.logprobs[i] ?? 0) / DARKEST_LOGPROB);
        if (share > 0.02) span.style.background = `color-mix(in srgb, var(--heat) ${Math.round(share * 75)}%, transparent)`;
      }
      return span;
    });
  }

  pointAtToken(event) {
    const token = event.target.token;
    if (!token) return this.tooltip.hide();
    const rows = [[null, "policy version", token.version]];
    if (token.version < 0) rows[0] = [null, "not of the policy", ""];
    else if (token.logprob !== null) {
      rows.unshift([null, "logprob", formatNumber(token.logprob)], [null, "probability", `${formatNumber(100 * Math.exp(token.logprob))}%`]);
    }
    this.tooltip.show(event.clientX, event.clientY, JSON.stringify(token.text), rows);
  }

  /** What rewards saw beside the completion, the right answer first. */
  columns(one, prompt) {
    const rank = (name) => (ANSWER_COLUMNS.includes(name) ? ANSWER_COLUMNS.indexOf(name) : ANSWER_COLUMNS.length);
    const names = Object.keys(prompt.columns).sort((a, b) => rank(a) - rank(b));
    const shown = names.map((name) => {
      const value = prompt.columns[name];
      const heading = prompt.inexact_columns.includes(name) ? `${name} (not whole, or not as rewards saw it)` : name;
      const text = typeof value === "string" ? value : JSON.stringify(value, null, 1);
      return [element("h5", { textContent: heading }), element("pre", { className: "answer", textContent: text })];
    });
    const nothing = element("p", { className: "quiet", textContent: "This rollout's row had no other columns, or they were not kept." });
    return element("aside", {}, ...(shown.length ? shown.flat() : [nothing]));
  }
}

/** Gives a choice its options and keeps what was chosen, where it is still among them. */
function fill(select, names, label = (name) => name) {
  const before = select.value;
  select.replaceChildren(...names.map((name) => element("option", { value: name, textContent: label(name) })));
  if (names.includes(before)) select.value = before;
}

function mean(values) {
  const known = (values || []).filter((value) => value !== null);
  return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
}
