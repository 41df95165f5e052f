// All runs of the directory: how each stands, how far it is, when it will be done, how well it does.

import { get } from "./api.js";
import { ago, badge, duration, progress, runLink, sparkline, stepOf } from "./format.js";

const COLUMNS = ["Run", "State", "Step", "Left", "How well", "Algorithm", "Last step"];

export function showRuns(view, { poll }) {
  const filter = element("input", { type: "search", placeholder: "Filter by name, state, algorithm", className: "filter" });
  filter.setAttribute("aria-label", "Filter runs");
  const count = element("span", { className: "quiet" });
  const commands = element("div", { className: "commands" });
  const head = element("tr", {}, ...COLUMNS.map((name) => element("th", { textContent: name })));
  const body = element("tbody");
  const table = element("table", { className: "runs" }, element("thead", {}, head), body);
  const empty = element("p", { className: "empty quiet", hidden: true });
  view.append(commands, element("div", { className: "bar" }, filter, count), table, empty);

  const rows = new Map(); // run -> {shown: JSON of its card, row}
  let cards = [];

  const draw = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const isShown = (card) => {
      const text = `${card.run} ${card.state} ${card.algorithm} ${card.model}`.toLowerCase();
      return words.every((word) => text.includes(word));
    };
    const shown = cards.filter(isShown);
    for (const run of rows.keys()) if (!cards.some((card) => card.run === run)) rows.delete(run);
    for (const card of shown) {
      const told = JSON.stringify(card);
      if (rows.get(card.run)?.told !== told) rows.set(card.run, { told, row: rowOf(card) });
    }
    const wanted = shown.map((card) => rows.get(card.run).row);
    if (wanted.length !== body.children.length || wanted.some((row, i) => body.children[i] !== row)) {
      body.replaceChildren(...wanted);
    }
    for (const cell of body.querySelectorAll("[data-time]")) cell.textContent = ago(Number(cell.dataset.time));
    const atWork = cards.filter((card) => card.state === "running").length;
    count.textContent = `${shown.length} of ${cards.length} runs${atWork ? `, ${atWork} running` : ""}`;
    empty.hidden = shown.length > 0;
    empty.textContent = cards.length ? "No run is called so." : "There are no runs here yet: start one.";
    table.hidden = !shown.length;
  };
  filter.addEventListener("input", draw);

  poll(async () => {
    const data = await get("/api/runs");
    document.getElementById("directory").textContent = data.directory;
    cards = data.runs;
    draw();
    drawCommands(commands, data.commands, cards);
    return document.hidden ? 10 : 3;
  });
}

function rowOf(card) {
  const cell = (name, ...children) => {
    const made = element("td", { className: name }, ...children);
    return made;
  };
  const link = element("a", { href: runLink(card.run), textContent: card.run === "." ? "this directory" : card.run });
  const why = card.message ? element("small", { className: "why", textContent: card.message.split("\n")[0] }) : "";
  const time = element("span", { className: "quiet", textContent: ago(card.updated) });
  time.dataset.time = card.updated ?? "";
  const last = card.values.at(-1);
  const well = card.headline
    ? [sparkline(card.values), element("b", { textContent: formatNumber(last) }), element("small", { className: "quiet", textContent: card.headline })]
    : [];
  return element(
    "tr",
    { className: card.state },
    cell("name", link, element("small", { className: "quiet", textContent: card.model ?? "" }), why),
    cell("state", badge(card.state)),
    cell("step", element("span", { textContent: stepOf(card) }), progress(card)),
    cell("left", card.eta_s === null ? "" : duration(card.eta_s)),
    cell("well", element("div", {}, ...well)),
    cell("algorithm", card.algorithm ?? ""),
    cell("updated", time),
  );
}

/** Commands that have no run to show for themselves: about to start, or ended before they could. */
function drawCommands(host, commands, cards) {
  const known = new Set(cards.map((card) => card.run));
  const hasFailed = (command) => command.exit_code !== null && ![0, 3].includes(command.exit_code);
  const isRecent = (command) => Date.now() / 1000 - command.started < 3600;
  const alone = commands.filter(
    (command) => !command.runs.some((run) => known.has(run)) && (command.is_alive || (hasFailed(command) && isRecent(command))),
  );
  host.replaceChildren(
    ...alone.map((command) =>
      element(
        "p",
        { className: `notice ${command.is_alive ? "plain" : "bad"}` },
        command.is_alive ? "Starting: " : `Ended with exit code ${command.exit_code}: `,
        element("a", { href: `#/command/${command.id}`, textContent: command.command }),
      ),
    ),
  );
}
