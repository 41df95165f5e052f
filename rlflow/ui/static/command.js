// A command that was started here: what it prints, and the runs that it makes.

import { get, post } from "./api.js";
import { ago, button, notice, runLink } from "./format.js";
import { logBox } from "./log.js";

export function showCommand(view, id, { poll }) {
  const title = element("h1", { className: "small" });
  const facts = element("p", { className: "quiet" });
  const said = element("div");
  const log = logBox();
  const stop = button("Stop", async () => {
    try {
      await post("/api/stop", { command: id });
      notice(said, "Asked to stop.", "plain");
    } catch (error) {
      notice(said, error.message);
    }
  });
  view.append(title, facts, said, log.box);
  log.show({ command: id }).catch((error) => notice(said, error.message));
  poll(async () => {
    const command = (await get("/api/runs")).commands.find((one) => one.id === id);
    await log.ask();
    if (!command) return 10;
    title.textContent = command.command;
    const links = command.runs.map((run) => element("a", { href: runLink(run), textContent: run }));
    const state = command.is_alive ? "at work" : command.exit_code === null ? "ended" : `exit code ${command.exit_code}`;
    facts.replaceChildren(`started ${ago(command.started)}, ${state}. Runs: `, ...links.flatMap((link) => [link, " "]));
    if (command.is_alive) facts.append(stop);
    return command.is_alive ? 1.5 : 10;
  });
}
