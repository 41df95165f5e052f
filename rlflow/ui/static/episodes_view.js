// What the policy wrote, step by step: the report's browser of episodes, fed by the server.

import { get } from "./api.js";

export function episodesView(host, state, { onLeave }) {
  const tooltip = new Tooltip();
  onLeave(() => tooltip.box.remove());
  const follow = element("input", { type: "checkbox" });
  const empty = element("p", { className: "empty quiet", textContent: "No rollouts are kept yet. Runs keep those of every run.log_rollouts_every-th step; runs without rollouts, SFT say, have none." });
  const said = element("div", { role: "status" });
  const box = element("div");
  host.append(element("div", { className: "bar", hidden: true }, element("label", {}, follow, " go to the newest step")), said, empty, box);
  let browser = null;

  const load = async (rollout) => {
    try {
      const page = await get("/api/episodes", { run: state.run, step: rollout.step });
      [rollout.kept, rollout.total] = [page.episodes.length, page.total];
      said.replaceChildren();
      return page;
    } catch (error) {
      said.replaceChildren(element("p", { className: "notice bad", textContent: error.message }));
      return { prompts: [], episodes: [], has_texts: true, total: 0 };
    }
  };
  const rolloutOf = (step) => {
    const rollout = { step, total: 0, kept: 0, has_tokens: true };
    rollout.chunk = rollout;
    return rollout;
  };

  return {
    async update() {
      const steps = state.data.summary.rollout_steps;
      empty.hidden = steps.length > 0;
      host.firstChild.hidden = !steps.length;
      if (!steps.length) return;
      if (!browser) {
        browser = new Episodes(box, { name: state.run, rollouts: steps.map(rolloutOf) }, load, tooltip);
        return;
      }
      if (steps.join() === browser.kept.map(({ step }) => step).join()) return;
      const step = browser.kept[browser.at].step;
      browser.kept = steps.map((one) => browser.kept.find((known) => known.step === one) ?? rolloutOf(one));
      browser.slider.max = steps.length - 1;
      const at = follow.checked ? steps.length - 1 : Math.max(0, steps.indexOf(step));
      if (browser.kept[at].step !== step) await browser.choose(at);
      else [browser.at, browser.slider.value] = [at, at];
    },
  };
}
