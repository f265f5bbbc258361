// Requests to the server that this page came from.

const DEADLINE_MS = 60_000;

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: the server did not answer
  }
}

// JSON of /api/PATH; `params` become the query, without those that are null, undefined or "".
// An array gives its key several times. `signal` (AbortSignal) may end the request.
export async function get(path, params = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) {
    for (const part of Array.isArray(value) ? value : [value]) {
      if (part !== null && part !== undefined && part !== "") query.append(name, part);
    }
  }
  const text = query.toString();
  const deadline = AbortSignal.timeout(DEADLINE_MS);
  let reply;
  try {
    reply = await fetch(`/api/${path.replace(/^\/(api\/)?/, "")}${text ? `?${text}` : ""}`, {
      signal: signal ? AbortSignal.any([signal, deadline]) : deadline,
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError(0, "the server does not answer: has megatron-vespo view ended?");
  }
  let value;
  try {
    value = await reply.json();
  } catch {
    throw new ApiError(reply.status, `the server answered ${reply.status} without JSON`);
  }
  if (!reply.ok) throw new ApiError(reply.status, value.error ?? `status ${reply.status}`);
  return value;
}
