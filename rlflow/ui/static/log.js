// A log that grows: its end first, then what comes.

import { get } from "./api.js";

const MOST_CHARACTERS = 1_000_000;

/** A box that shows a log. `ask()` fetches what is new; `show(parameters)` turns to another log. */
export function logBox() {
  const text = element("pre", { className: "log", tabIndex: 0 });
  const follow = element("input", { type: "checkbox", checked: true, id: "follow" });
  const size = element("span", { className: "quiet" });
  const bar = element("div", { className: "bar" }, element("label", {}, follow, " follow"), size);
  let [parameters, offset] = [null, -1];

  const ask = async () => {
    if (!parameters) return;
    const asked = parameters;
    const part = await get("/api/log", { ...asked, offset });
    if (asked !== parameters) return; // another log was chosen meanwhile
    if (offset < 0 || part.start !== offset) text.textContent = part.start > 0 ? "[… earlier lines left out]\n" : "";
    if (part.text) text.append(part.text);
    if (text.textContent.length > MOST_CHARACTERS) text.textContent = text.textContent.slice(-MOST_CHARACTERS / 2);
    offset = part.end;
    size.textContent = `${part.size.toLocaleString()} bytes`;
    if (follow.checked && part.text) text.scrollTop = text.scrollHeight;
    if (part.end < part.size && part.text) await ask();
  };
  const show = async (wanted) => {
    [parameters, offset] = [wanted, -1];
    text.textContent = "";
    await ask();
  };
  return { box: element("div", { className: "log-box" }, bar, text), ask, show };
}
