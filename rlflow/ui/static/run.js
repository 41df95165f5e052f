// One run: its curves, what it wrote, what it said, its recipe, and its model to talk to.

import { get, post } from "./api.js";
import { chatView } from "./chat.js";
import { curvesView } from "./curves.js";
import { episodesView } from "./episodes_view.js";
import { ago, badge, button, duration, notice, progress, runLink, stepOf } from "./format.js";
import { logBox } from "./log.js";

const TABS = ["curves", "episodes", "logs", "recipe", "chat"];
const OUTPUT = "output";

export function showRun(view, run, parameters, context) {
  const state = { run, data: null };
  const head = element("div", { className: "head" });
  const said = element("div", { role: "status" });
  const tabs = element("div", { className: "tabs" });
  tabs.setAttribute("role", "tablist");
  const host = element("div", { className: "tab" });
  view.append(head, said, tabs, host);
  document.title = `${run} · rlflow`;

  const chosen = TABS.find((tab) => parameters.has(tab)) ?? TABS[0];
  tabs.replaceChildren(
    ...TABS.map((tab) => {
      const link = element("a", { href: runLink(run, tab), textContent: tab, className: tab === chosen ? "chosen" : "" });
      link.setAttribute("role", "tab");
      link.setAttribute("aria-selected", tab === chosen);
      return link;
    }),
  );
  const make = { curves: curvesView, episodes: episodesView, logs: logsView, recipe: recipeView, chat: chatView }[chosen];
  const tab = make(host, state, context);

  const act = async (path, body, text) => {
    try {
      await post(path, body);
      notice(said, text, "plain");
    } catch (error) {
      notice(said, error.message);
    }
  };
  const more = element("input", { placeholder: "run.steps=300", spellcheck: false, className: "more" });
  more.setAttribute("aria-label", "Overrides to resume with, key=value, separated by spaces");
  const resume = () =>
    act("/api/resume", { run, overrides: more.value.split(/\s+/).filter(Boolean) }, "It is being started: it goes on from its newest checkpoint.");
  const stop = button("Stop", () => act("/api/stop", { run }, "Asked to stop: it writes a checkpoint at the end of its step."), "danger");
  const actions = element("span", { className: "actions" });
  const again = [more, button("Resume", resume)];
  let shownState = "";

  const drawHead = () => {
    const { card, command } = state.data;
    const facts = [card.algorithm, card.model, stepOf(card) && `step ${stepOf(card)}`];
    if (card.eta_s !== null) facts.push(`${duration(card.eta_s)} left`);
    facts.push(card.updated ? `last step ${ago(card.updated)}` : "");
    const shown = facts.filter(Boolean).map((fact) => element("span", { textContent: fact }));
    if (card.state !== shownState) {
      notice(said, ""); // what was asked for has come about
      actions.replaceChildren(...(card.can_stop ? [stop] : []), ...(card.can_resume ? again : []));
      shownState = card.state;
    }
    const title = element("h1", { className: "small" }, run === "." ? "this directory" : run, " ", badge(card.state));
    const parts = [element("div", { className: "title" }, title, actions), element("p", { className: "facts" }, ...shown), progress(card)];
    if (card.message) parts.push(element("p", { className: `notice ${card.state === "failed" ? "bad" : "plain"}`, textContent: card.message }));
    if (command) parts.push(element("p", { className: "quiet command" }, element("a", { href: `#/command/${command.id}`, textContent: command.command })));
    if (command && ![null, 0, 3].includes(command.exit_code)) {
      const link = element("a", { href: `#/command/${command.id}`, textContent: "what it printed" });
      parts.push(element("p", { className: "notice bad" }, `The newest command ended with exit code ${command.exit_code}: `, link));
    }
    if (!head.contains(document.activeElement)) head.replaceChildren(...parts);
    document.title = `${card.state === "running" && card.steps ? `${Math.floor((100 * card.step) / card.steps)}% ` : ""}${run} · rlflow`;
  };

  context.poll(async () => {
    try {
      state.data = await get("/api/run", { run });
    } catch (error) {
      if (error.status) notice(said, error.message);
      throw error;
    }
    document.getElementById("directory").textContent = state.data.directory;
    drawHead();
    await tab.update();
    return ["running", "starting"].includes(state.data.card.state) ? 2 : 8;
  });
}

function logsView(host, state) {
  const names = element("select");
  names.setAttribute("aria-label", "Log");
  const log = logBox();
  host.append(element("div", { className: "bar" }, names), log.box);
  const show = () =>
    names.value && log.show(names.value === OUTPUT ? { command: state.data.command.id } : { run: state.run, name: names.value });
  names.addEventListener("change", show);
  return {
    async update() {
      const { logs, command } = state.data;
      const wanted = [...(command ? [OUTPUT] : []), ...logs];
      const shown = [...names.options].map((option) => option.value);
      if (wanted.join() !== shown.join()) {
        const before = names.value;
        names.replaceChildren(...wanted.map((name) => element("option", { value: name, textContent: name === OUTPUT ? "what the command printed" : name })));
        names.value = wanted.includes(before) ? before : wanted.includes("run.log") ? "run.log" : wanted[0] ?? "";
        if (names.value !== before) return show();
      }
      await log.ask();
    },
  };
}

function recipeView(host, state) {
  const text = element("pre", { className: "recipe card" });
  host.append(element("p", { className: "quiet", textContent: "Every key of the recipe that the newest steps were trained under; secrets are ***." }), text);
  return {
    async update() {
      const recipe = state.data.recipe || "The run has not written its recipe yet.";
      if (text.textContent !== recipe) text.textContent = recipe;
    },
  };
}
