// Talk to a run's model, or to a checkpoint's: it is loaded when asked for, and ended when nobody talks to it.

import { get, post, stream } from "./api.js";
import { button, notice } from "./format.js";

export function chatView(host, state, { onLeave }) {
  const which = element("select", { id: "which" });
  const load = button("Load the model", open, "primary");
  const status = element("span", { className: "quiet" });
  const said = element("div", { role: "status" });
  const system = element("textarea", { id: "system", rows: 2, placeholder: "none" });
  const temperature = number("temperature", 0, 2, 0.1);
  const longest = number("longest", 1, 32768, 1);
  const talk = element("div", { className: "talk" });
  talk.setAttribute("aria-live", "polite");
  const input = element("textarea", { id: "say", rows: 2, placeholder: "Say something; Enter sends, Shift+Enter starts a new line" });
  input.setAttribute("aria-label", "Message");
  const send = button("Send", say, "primary");
  const clear = button("Clear", () => {
    answering?.abort();
    messages = [];
    talk.replaceChildren();
  });
  const options = element(
    "details",
    {},
    element("summary", { textContent: "System prompt and sampling" }),
    element("div", { className: "options" }, ...field("system", "system prompt", system), ...field("temperature", "temperature", temperature), ...field("longest", "tokens at most", longest)),
  );
  const box = element("div", { className: "chat", hidden: true }, options, talk, element("div", { className: "say" }, input, send, clear));
  host.append(element("div", { className: "bar" }, which, load, status), said, box);
  let [messages, answering, current, choices] = [[], null, "closed", ""];
  onLeave(() => answering?.abort());

  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      say();
    }
  });

  async function open() {
    try {
      const checkpoint = which.value === "final" ? null : which.value;
      draw(await post("/api/chat/open", { run: state.run, checkpoint }));
    } catch (error) {
      notice(said, error.message);
    }
  }

  function draw(chat) {
    current = chat.state;
    const words = { closed: "", starting: "loading…", ready: `ready: ${chat.model}`, ended: "ended" };
    status.textContent = words[chat.state];
    notice(said, chat.state === "ended" || chat.state === "starting" ? chat.said.slice(-8).join("\n") : "", chat.state === "ended" ? "bad" : "plain");
    box.hidden = chat.state !== "ready" && !messages.length;
    load.disabled = chat.state === "starting";
    load.className = chat.state === "ready" ? "" : "primary";
    send.disabled = chat.state !== "ready";
  }

  async function say() {
    const text = input.value;
    if (answering || !text.trim() || current !== "ready") return;
    input.value = "";
    const asked = { role: "user", content: text };
    bubble("user").append(text);
    const answer = bubble("assistant");
    const thought = element("div", { className: "thought", hidden: true });
    const words = element("div");
    answer.append(thought, words);
    answering = new AbortController();
    send.textContent = "Stop";
    send.onclick = () => answering?.abort();
    const before = system.value.trim() ? [{ role: "system", content: system.value }] : [];
    try {
      const body = { run: state.run, messages: [...before, ...messages, asked], temperature: chosen(temperature), max_tokens: chosen(longest) };
      for await (const piece of pieces(await stream("/api/chat/completions", body, answering.signal))) {
        const { delta, finish_reason: reason } = piece.choices?.[0] ?? {};
        const thinking = delta?.reasoning_content ?? delta?.reasoning;
        if (thinking) thought.append(thinking);
        if (delta?.content) words.append(delta.content);
        thought.hidden = !thought.textContent;
        if (reason === "length") answer.append(element("small", { className: "quiet", textContent: "cut off at the most tokens" }));
        if (piece.error) throw new Error(piece.error.message ?? String(piece.error));
        talk.scrollTop = talk.scrollHeight;
      }
      messages.push(asked, { role: "assistant", content: words.textContent });
    } catch (error) {
      if (error.name === "AbortError") {
        if (words.textContent) messages.push(asked, { role: "assistant", content: words.textContent });
        answer.append(element("small", { className: "quiet", textContent: "stopped" }));
      } else {
        answer.append(element("p", { className: "notice bad", textContent: error.message }));
        input.value ||= text;
      }
    } finally {
      answering = null;
      send.textContent = "Send";
      send.onclick = say;
    }
  }

  function bubble(role) {
    const made = element("div", { className: `bubble ${role}` });
    talk.append(made);
    talk.scrollTop = talk.scrollHeight;
    return made;
  }

  return {
    async update() {
      const { checkpoints, has_final: hasFinal } = state.data;
      const steps = checkpoints.length ? ["latest", "best", ...[...checkpoints].reverse()] : [];
      const wanted = [...(hasFinal ? ["final"] : []), ...steps.map(String)];
      if (wanted.join() !== choices) {
        choices = wanted.join();
        const before = which.value;
        which.replaceChildren(...wanted.map((name) => element("option", { value: name, textContent: /^\d+$/.test(name) ? `checkpoint of step ${name}` : name === "final" ? "final model" : `${name} checkpoint` })));
        if (wanted.includes(before)) which.value = before;
      }
      if (!wanted.length) notice(said, "There is no model yet: the run has written no checkpoint.", "plain");
      load.hidden = which.hidden = !wanted.length;
      if (wanted.length && !answering) draw(await get("/api/chat", { run: state.run }));
    },
  };
}

/** The JSON objects of server-sent events. */
async function* pieces(reader) {
  let left = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (left + value).split("\n");
    left = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

/** A number that may be left to the server, which knows the run's own. */
function number(id, min, max, step) {
  return element("input", { type: "number", id, min, max, step, placeholder: "the run's" });
}

function chosen(input) {
  return input.value === "" ? null : Number(input.value);
}

function field(id, text, input) {
  return [element("label", { htmlFor: id, textContent: text }), input];
}
