// Calls to the server. Every call that changes something has a header that another site's page cannot set.

/** What the server said against a call; `data` is its whole answer. */
export class Refused extends Error {
  constructor(status, data) {
    super(data?.error ?? `the server answered ${status}`);
    [this.status, this.data] = [status, data];
  }
}

export async function get(path, parameters = {}) {
  const query = new URLSearchParams(parameters).toString();
  return answered(await fetch(query ? `${path}?${query}` : path, { signal: AbortSignal.timeout(60_000) }));
}

export async function post(path, body, signal) {
  return answered(await send(path, body, signal));
}

/** A call whose answer is read as it comes. */
export async function stream(path, body, signal) {
  const response = await send(path, body, signal);
  if (!response.ok) await answered(response);
  return response.body.pipeThrough(new TextDecoderStream()).getReader();
}

function send(path, body, signal) {
  const headers = { "Content-Type": "application/json", "X-Rlflow": "1" };
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

async function answered(response) {
  const data = await response.json().catch(() => null);
  if (response.status === 401 && location.pathname !== "/login") location.href = "/login";
  if (!response.ok) throw new Refused(response.status, data);
  return data;
}
