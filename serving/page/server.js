// Questions to the server, and what went wrong in words for whoever looks at the page.

export class Problem extends Error {}

export async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer. Is it still running?");
  }
  const text = await response.text();
  let content = {};
  try {
    content = JSON.parse(text);
  } catch {
    content = { error: text.slice(0, 200) };
  }
  if (!response.ok) throw new Problem(sentence(response, content.error || response.statusText));
  return content;
}

function sentence(response, words) {
  const wait = response.headers.get("Retry-After");
  if (response.status === 429 || response.status === 503) {
    return `The server is busy (${words}). ${wait ? `Try again in ${wait} s.` : "Try again in a moment."}`;
  }
  if (response.status === 413) return `This file is too large: ${words}.`;
  if (response.status === 504) return `This took the server too long: ${words}.`;
  if (response.status >= 500) return `Something is wrong with the server: ${words}.`;
  return `This cannot be used: ${words}.`;
}
