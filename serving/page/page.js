// The page: an image and a degree in, the answer and what merged out. State lives in one object; every change draws again.

import { drawFrontier, drawTokens, milliseconds, percent } from "./charts.js";
import { Picture, networkView } from "./picture.js";
import { Problem, request } from "./server.js";

const POLL_MS = 1500, SETTLE_MS = 120, PLAY_MS = 800;
const of = (id) => document.getElementById(id);
const state = { family: null, file: null, view: null, auto: true, degree: null, answer: null, picture: null, step: 0,
  style: "groups", marked: null, asking: null, traces: new Map(), playing: null };

// --- the server

async function poll() {
  if (!document.hidden) {
    try {
      const family = await request("api/family");
      const changed = JSON.stringify({ ...family, adaptive: 0 }) !== JSON.stringify({ ...state.family, adaptive: 0 });
      state.family = family;
      if (changed) familyChanged();
      showServer("alive");
    } catch (error) {
      if (!(error instanceof Problem)) throw error;
      showServer("gone");
    }
  }
  setTimeout(poll, POLL_MS);
}

// Asks for the answer and then for what merged at the degree that answered. A newer question ends an older one.
async function ask() {
  if (!state.file || !state.family) return;
  state.asking?.abort();
  const asking = (state.asking = new AbortController());
  const { file } = state;
  document.body.classList.add("asking");
  try {
    const query = state.auto ? "" : `?degree=${state.degree}`;
    const options = { method: "POST", body: file, signal: asking.signal, headers: { "Content-Type": "application/octet-stream" } };
    state.answer = await request(`api/predict${query}`, options);
    hideProblem();
    showAnswer();
    showDegree();
    const { degree } = state.answer;
    if (!state.traces.has(degree)) state.traces.set(degree, await request(`api/merges?degree=${degree}`, options));
    const shown = state.picture?.steps.length;
    state.picture = new Picture(state.view, state.traces.get(degree));
    const last = state.picture.steps.length - 1;
    if (shown === undefined || state.step > last || shown !== last + 1) state.step = last;
    showPicture();
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof Problem)) throw error;
    showProblem(error.message);
  } finally {
    if (state.asking === asking) document.body.classList.remove("asking");
  }
}

// --- the image

async function take(file) {
  state.file = file;
  state.traces.clear();
  state.answer = state.picture = state.marked = null;
  state.view = null;
  // as the server decodes it: without turning it as its camera was held. It may read formats that this browser does
  // not, and it says what is wrong with a file that is no image.
  const image = await createImageBitmap(file, { imageOrientation: "none" }).catch(() => null);
  if (state.file !== file || !state.family) return; // another one came meanwhile; or it is taken again with the family
  state.view = image && networkView(image, state.family.input);
  showDegree();
  showThumb(file.name);
  showAnswer();
  showPicture();
  await ask();
}

function showThumb(name) {
  const thumb = of("thumb");
  thumb.hidden = state.view === null;
  if (state.view) {
    const { width, height } = state.view, scale = Math.min(1, 192 / Math.max(width, height));
    thumb.width = Math.max(1, Math.round(width * scale));
    thumb.height = Math.max(1, Math.round(height * scale));
    thumb.classList.toggle("pixelated", Math.max(width, height) <= 160);
    thumb.getContext("2d").drawImage(state.view, 0, 0, thumb.width, thumb.height);
  }
  of("zone-title").textContent = name || "Pasted image";
  of("zone-hint").textContent = "drop, paste or choose another";
}

function listenForImages() {
  const input = of("file");
  of("choose").addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    if (input.files.length) take(input.files[0]);
    input.value = "";
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData?.files.length) take(event.clipboardData.files[0]);
  });
  let depth = 0;
  const veil = (change) => (of("veil").hidden = (depth = Math.max(0, depth + change)) === 0);
  const carriesFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragenter", (event) => carriesFile(event) && veil(1));
  document.addEventListener("dragleave", (event) => carriesFile(event) && veil(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    veil(-depth);
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}

// --- the degree

const degreeShown = () => (state.auto ? state.answer?.degree ?? state.family.adaptive.degree : state.degree);
const entryOf = (degree) => state.family.degrees.find((entry) => entry.degree === degree);

let settling;
function choose(degree) {
  state.auto = false;
  state.degree = degree;
  showDegree();
  clearTimeout(settling);
  settling = setTimeout(ask, SETTLE_MS);
}

function listenForDegrees() {
  of("slider").addEventListener("input", (event) => choose(state.family.degrees[event.target.value].degree));
  of("auto").addEventListener("change", (event) => {
    state.degree = degreeShown();
    state.auto = event.target.checked;
    showDegree();
    ask();
  });
}

function showDegree() {
  const degree = degreeShown(), entry = entryOf(degree), { degrees } = state.family;
  of("auto").checked = state.auto;
  of("degree").textContent = degree;
  of("degree-unit").textContent = degree === 0 ? "nothing is removed"
    : state.family.schedule === "constant" ? "tokens less in every block" : `tokens less, by the schedule ${state.family.schedule}`;
  const slider = of("slider");
  slider.max = degrees.length - 1;
  slider.value = degrees.findIndex((entry) => entry.degree === degree);
  slider.setAttribute("aria-valuetext", `degree ${degree}`);
  slider.classList.toggle("auto", state.auto);
  [...of("stops").children].forEach((stop, at) => stop.classList.toggle("now", degrees[at].degree === degree));
  of("speed").textContent = entry ? speedWords(entry) : "";
  drawFrontier(of("frontier"), degrees, degree, choose);
  if (entry) drawTokens(of("tokens"), entry.tokens, state.picture?.steps[state.step]?.block ?? null);
}

function speedWords(entry) {
  const first = state.family.degrees[0], time = milliseconds(entry.p50_ms);
  if (entry === first) return `${time} for one image, the least compressed of this family.`;
  const than = `degree ${first.degree} takes ${milliseconds(first.p50_ms)}`;
  if (!entry.pays) return `Does not pay on this machine: ${time}, where ${than}.`;
  const less = percent(1 - entry.gmacs / first.gmacs, 0);
  return `${(first.p50_ms / entry.p50_ms).toFixed(2)}\u00d7 as fast: ${time}, where ${than}; ${less} less to compute.`;
}

function familyChanged() {
  const { family } = state;
  const [, height, width] = family.input.size;
  document.title = `ToCom \u2013 ${family.model}`;
  of("model").textContent = [family.model, `${width} \u00d7 ${height}`, `${family.classes} classes`,
    `${family.backend} ${family.precision}`, family.source_degree === null ? null : `tuned at degree ${family.source_degree}`]
    .filter(Boolean).join("  \u00b7  ");
  if (family.reduction === "prune") {
    of("about-text").textContent = "A vision transformer cuts an image into patches, one token each. Those that matter least to "
      + "the answer are fused into one in every block, so that less is left to compute.";
  }
  of("merge-title").textContent = family.reduction === "prune" ? "What is pruned and fused" : "What becomes one token";
  of("stops").replaceChildren(...family.degrees.map(({ degree }) => {
    const stop = document.createElement("span");
    stop.textContent = degree;
    return stop;
  }));
  of("frontier-note").textContent = family.degrees.some((entry) => entry.top1 === null)
    ? "No accuracy was measured for this family." : "Press a point to choose it.";
  if (!entryOf(state.degree)) state.degree = family.degrees[0].degree;
  showDegree();
  if (state.file) take(state.file); // what the network sees of it may be another crop
}

function showServer(alive) {
  of("light").dataset.state = alive;
  of("alive").textContent = alive === "alive" ? "serving" : "no answer";
  if (alive !== "alive") return;
  const { adaptive } = state.family;
  of("load-degree").textContent = adaptive.enabled ? `degree ${adaptive.degree}` : `always degree ${adaptive.degree}`;
  of("queued").textContent = adaptive.queued === 1 ? "1 image" : `${adaptive.queued} images`;
  of("objective").textContent = adaptive.objective_ms === null ? "none" : `${adaptive.objective_ms} ms`;
  if (state.auto && !state.answer) showDegree();
}

// --- the answer

function showAnswer() {
  const { answer } = state;
  of("times").hidden = !answer;
  if (!answer) {
    const empty = document.createElement("li");
    empty.className = "empty";
    empty.textContent = state.file ? "\u2026" : "Waits for an image.";
    of("bars").replaceChildren(empty);
    return;
  }
  of("bars").replaceChildren(...answer.predictions.map((entry) => {
    const item = document.createElement("li"), name = document.createElement("span"), share = document.createElement("span");
    const track = document.createElement("span"), bar = document.createElement("span");
    name.className = "name";
    name.textContent = entry.name ?? `class ${entry.class}`;
    share.className = "share";
    share.textContent = percent(entry.probability);
    track.className = "track";
    bar.style.inlineSize = `${100 * entry.probability}%`;
    track.append(bar);
    item.append(name, share, track);
    return item;
  }));
  of("queue-ms").textContent = milliseconds(answer.queue_ms);
  of("engine-ms").textContent = milliseconds(answer.engine_ms);
  of("answered").textContent = `degree ${answer.degree}`;
}

// --- what merged

function showPicture() {
  const { picture } = state;
  document.body.classList.toggle("pictured", picture !== null);
  const step = of("step"), steps = picture ? picture.steps.length : 1;
  step.max = steps - 1;
  step.disabled = of("play").disabled = steps < 2;
  of("multiples").replaceChildren(...(picture && steps > 1 ? picture.steps.map(multiple) : []));
  if (!picture) {
    of("step-title").textContent = "Input";
    of("step-words").textContent = "";
    play(false);
    return;
  }
  [...of("multiples").children].forEach((button, at) => picture.draw(button.firstChild, at, state.style));
  showStep();
}

const stepName = ({ block }) => (block === null ? "Input" : `Block ${block + 1}`);

function multiple(step, at) {
  const button = document.createElement("button"), canvas = document.createElement("canvas"), words = document.createElement("span");
  button.type = "button";
  button.className = "multiple";
  words.textContent = stepName(step);
  const count = document.createElement("small");
  count.textContent = step.sizes.length;
  words.append(" ", count);
  button.append(canvas, words);
  button.setAttribute("aria-label", `${stepName(step)}: ${step.sizes.length} groups of patches`);
  button.addEventListener("click", () => toStep(at));
  return button;
}

function toStep(step) {
  state.step = step;
  showStep();
}

function showStep() {
  const { picture, step } = state, { block } = picture.steps[step], { tokens, joined, patches } = picture.counts(step);
  of("step").value = step;
  of("step").setAttribute("aria-valuetext", stepName(picture.steps[step]));
  of("step-title").textContent = block === null ? "Input" : `Behind block ${block + 1}`;
  const verb = picture.trace.reduction === "prune" ? "fused" : "merged";
  of("step-words").textContent = picture.steps.length === 1
    ? `Degree ${picture.trace.degree} merges nothing: each of the ${tokens} patches stays a token of its own.`
    : block === null ? `${tokens} patches, each a token of its own.`
      : `${tokens} tokens stand for ${picture.across * picture.down} patches: ${patches} of them ${verb} into ${joined}, ${tokens - joined} still alone.`;
  [...of("multiples").children].forEach((button, at) => button.setAttribute("aria-pressed", at === step));
  drawTokens(of("tokens"), picture.trace.tokens, block);
  drawStage();
}

function drawStage() {
  const { picture, step, style, marked } = state;
  picture.draw(of("stage"), step, style, marked);
  if (marked === null) {
    of("hovered").textContent = "Point at a patch, or move over them with the arrow keys, to see its token.";
    return;
  }
  const others = picture.members(step, marked).length - 1, row = Math.floor(marked / picture.across);
  const place = `Patch ${row + 1} down, ${(marked % picture.across) + 1} across`;
  of("hovered").textContent = others ? `${place}: one token with ${others} other${others === 1 ? "" : "s"}.` : `${place}: a token of its own.`;
}

function mark(patch) {
  if (!state.picture || patch === state.marked) return;
  state.marked = patch;
  drawStage();
}

function play(on) {
  clearInterval(state.playing);
  state.playing = null;
  if (on) {
    const steps = state.picture.steps.length;
    if (state.step === steps - 1) toStep(0);
    state.playing = setInterval(() => {
      toStep(Math.min(state.step + 1, steps - 1));
      if (state.step === steps - 1) play(false);
    }, PLAY_MS);
  }
  of("play").classList.toggle("playing", on);
  of("play").setAttribute("aria-label", on ? "Stop" : "Play through the blocks");
}

function listenForPictures() {
  const stage = of("stage");
  stage.addEventListener("pointermove", (event) => {
    if (!state.picture) return;
    const { left, top, width, height } = stage.getBoundingClientRect();
    const column = Math.floor(((event.clientX - left) / width) * state.picture.across);
    const row = Math.floor(((event.clientY - top) / height) * state.picture.down);
    const inside = column >= 0 && row >= 0 && column < state.picture.across && row < state.picture.down;
    mark(inside ? row * state.picture.across + column : null);
  });
  stage.addEventListener("pointerleave", () => mark(null));
  stage.addEventListener("blur", () => mark(null));
  stage.addEventListener("keydown", (event) => {
    const { picture } = state;
    const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!picture || !move) return;
    event.preventDefault();
    const from = state.marked ?? 0, within = (value, most) => Math.min(Math.max(value, 0), most - 1);
    const column = within((from % picture.across) + move[0], picture.across);
    mark(within(Math.floor(from / picture.across) + move[1], picture.down) * picture.across + column);
  });
  of("step").addEventListener("input", (event) => {
    play(false);
    toStep(Number(event.target.value));
  });
  of("play").addEventListener("click", () => play(state.playing === null));
  for (const choice of document.getElementsByName("view")) {
    choice.addEventListener("change", () => {
      state.style = choice.value;
      if (state.picture) showPicture();
    });
  }
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width === width) return; // what is drawn below may change the height
    width = contentRect.width;
    if (state.family) showDegree();
    if (state.picture) showPicture();
  }).observe(of("merging"));
}

// --- problems

function showProblem(words) {
  of("problem-text").textContent = words;
  of("problem").hidden = false;
  showAnswer();
}

function hideProblem() {
  of("problem").hidden = true;
}

of("retry").addEventListener("click", () => {
  hideProblem();
  ask();
});
of("dismiss").addEventListener("click", hideProblem);
listenForImages();
listenForDegrees();
listenForPictures();
poll();
