// Which view is shown, by the part of the address behind #, and how often it asks for news.

import { showCommand } from "./command.js";
import { showRun } from "./run.js";
import { showRuns } from "./runs.js";
import { showStart } from "./start.js";

const view = document.getElementById("view");
const offline = document.getElementById("offline");
let leave = () => {};

/** Calls `ask` now and again after the seconds that it returns, while its view is shown and the page is looked at. */
function poll(ask) {
  let timer = 0;
  let isOver = false;
  const next = async () => {
    clearTimeout(timer);
    if (isOver || document.hidden) return;
    let seconds = 5;
    try {
      seconds = (await ask()) ?? seconds;
      offline.hidden = true;
    } catch (error) {
      if (error instanceof TypeError || error.name === "TimeoutError") offline.hidden = false;
      else console.error(error);
    }
    if (!isOver) timer = setTimeout(next, 1000 * seconds);
  };
  document.addEventListener("visibilitychange", next);
  next();
  return () => {
    isOver = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", next);
  };
}

function route() {
  leave();
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [name, ...rest] = path.split("/").map(decodeURIComponent);
  const parameters = new URLSearchParams(query);
  const stops = [];
  const context = { poll: (ask) => stops.push(poll(ask)), onLeave: (action) => stops.push(action) };
  leave = () => stops.forEach((stop) => stop());
  view.replaceChildren();
  document.title = "rlflow";
  window.scrollTo(0, 0);
  if (name === "run") showRun(view, rest.join("/"), parameters, context);
  else if (name === "start") showStart(view, parameters, context);
  else if (name === "command") showCommand(view, rest[0], context);
  else showRuns(view, context);
}

window.addEventListener("hashchange", route);
route();
