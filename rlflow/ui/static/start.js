// Start a recipe: choose a file, edit it, set keys, see what `rlflow plan` says, start.

import { get, post } from "./api.js";
import { button, notice } from "./format.js";

const DRAFT = "rlflow-start";

export function showStart(view, parameters) {
  const files = element("select", { id: "file" });
  const gutter = element("pre", { className: "gutter" });
  gutter.setAttribute("aria-hidden", "true");
  const area = element("textarea", { id: "text", spellcheck: false, wrap: "off", rows: 26 });
  const overrides = element("textarea", { id: "overrides", rows: 3, spellcheck: false, placeholder: "run.steps=20" });
  const saveAs = element("input", { id: "save-as", spellcheck: false });
  const saveRow = element("div", { className: "field", hidden: true }, label("save-as", "Keep the edited recipe as"), saveAs);
  const resume = element("input", { type: "checkbox", id: "resume" });
  const said = element("div", { role: "alert" });
  const problems = element("ol", { className: "problems" });
  const plan = element("pre", { className: "plan", hidden: true });
  const check = button("Check", () => call(false));
  const start = button("Start", () => call(true), "primary");
  let [original, wrongLines, isBusy] = ["", new Set(), false];

  view.append(
    element("h1", { className: "small", textContent: "Start a run" }),
    element("div", { className: "field" }, label("file", "Recipe"), files),
    element("div", { className: "field" }, label("text", "What it says"), element("div", { className: "editor" }, gutter, area)),
    element("div", { className: "field" }, label("overrides", "Overrides, key=value, one a line"), overrides),
    saveRow,
    element("div", { className: "bar" }, check, start, element("label", {}, resume, " go on from its newest checkpoint")),
    said,
    problems,
    plan,
  );

  const drawGutter = () => {
    const lines = area.value.split("\n").length;
    const numbers = Array.from({ length: lines }, (_, i) => {
      const number = element("span", { textContent: `${i + 1}\n` });
      if (wrongLines.has(i + 1)) number.className = "wrong";
      return number;
    });
    gutter.replaceChildren(...numbers);
    gutter.scrollTop = area.scrollTop;
  };
  const edited = () => {
    const isEdited = area.value !== original;
    if (isEdited && saveRow.hidden) saveAs.value = nameFor(files.value);
    saveRow.hidden = !isEdited;
    drawGutter();
  };
  const goTo = (line) => {
    const before = area.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
    const after = area.value.indexOf("\n", before);
    area.focus();
    area.setSelectionRange(before, after < 0 ? area.value.length : after);
    area.scrollTop = Math.max(0, (line - 6) * parseFloat(getComputedStyle(area).lineHeight));
  };
  const choose = async () => {
    if (!files.value) return;
    try {
      original = (await get("/api/recipe", { file: files.value })).text;
      area.value = original;
      [wrongLines, saveRow.hidden] = [new Set(), true];
      notice(said, "");
      problems.replaceChildren();
      plan.hidden = true;
      drawGutter();
    } catch (error) {
      notice(said, error.message);
    }
  };
  const showVerdict = (verdict) => {
    wrongLines = new Set(verdict.problems.map(([line]) => line));
    problems.replaceChildren(
      ...verdict.problems.map(([line, text]) => {
        const where = line === null ? "" : button(`line ${line}`, () => goTo(line), "link");
        return element("li", {}, where, line === null ? text : `: ${text}`);
      }),
    );
    plan.textContent = verdict.plan;
    plan.hidden = !verdict.plan;
    drawGutter();
    const number = verdict.problems.length;
    if (verdict.is_right) notice(said, "Nothing is wrong with it.", "good");
    else notice(said, number === 1 ? "One thing is wrong with it:" : `${number} things are wrong with it:`);
  };
  const call = async (isStart) => {
    if (isBusy) return;
    [isBusy, check.disabled, start.disabled] = [true, true, true];
    notice(said, isStart ? "Starting…" : "Checking…", "plain");
    const lines = overrides.value.split("\n").map((line) => line.trim()).filter(Boolean);
    const body = { file: files.value, text: area.value, overrides: lines };
    try {
      if (isStart) {
        const { command } = await post("/api/start", { ...body, save_as: saveAs.value.trim(), resume: resume.checked });
        sessionStorage.removeItem(DRAFT);
        location.hash = `#/command/${command.id}`;
      } else {
        showVerdict(await post("/api/check", body));
      }
    } catch (error) {
      if (error.data?.problems) showVerdict(error.data);
      else notice(said, error.message);
    } finally {
      [isBusy, check.disabled, start.disabled] = [false, false, false];
    }
  };

  files.addEventListener("change", choose);
  area.addEventListener("input", edited);
  area.addEventListener("scroll", () => (gutter.scrollTop = area.scrollTop));
  // What was typed is still there when one comes back from another view, or loads the page again.
  const keep = () => sessionStorage.setItem(DRAFT, JSON.stringify({ file: files.value, text: area.value, overrides: overrides.value }));
  for (const field of [area, overrides]) field.addEventListener("input", keep);
  const restore = () => {
    const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
    if (draft?.file !== files.value) return;
    [area.value, overrides.value] = [draft.text, draft.overrides];
    edited();
  };

  get("/api/recipes").then(async (data) => {
    const option = (file, text) => element("option", { value: file, textContent: text });
    const group = (label, ...options) => element("optgroup", { label }, ...options);
    if (data.files.length) files.append(group("of recipes/", ...data.files.map((file) => option(file, file))));
    if (data.packaged.length) files.append(group("come with rlflow", ...data.packaged.map((file) => option(file, file.split("/").pop()))));
    const isQuickstart = (file) => file.endsWith("/quickstart.yaml");
    const all = [...data.files, ...data.packaged];
    const wanted = parameters.get("file") ?? data.files.find(isQuickstart) ?? data.files[0] ?? all.find(isQuickstart);
    if (all.includes(wanted)) files.value = wanted;
    const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
    if (!parameters.has("file") && all.includes(draft?.file)) files.value = draft.file;
    await choose();
    restore();
  }, (error) => notice(said, error.message));
}

function label(id, text) {
  return element("label", { htmlFor: id, textContent: text });
}

/** A name for an edited recipe that is not taken yet, as far as the clock can tell. */
function nameFor(file) {
  const stem = file.split("/").pop().replace(/\.ya?ml$/, "");
  const now = new Date();
  const two = (number) => String(number).padStart(2, "0");
  return `${stem}-${two(now.getMonth() + 1)}${two(now.getDate())}-${two(now.getHours())}${two(now.getMinutes())}${two(now.getSeconds())}.yaml`;
}
