// An image, and which of its patches are one token behind each block: drawn, and asked about.

const SMALL = 160; // pixels of a side below which an image is shown pixel by pixel
const LARGEST = 1024; // pixels of a side that are kept for drawing

// What the network sees of an image, as runtime/preprocess.py cuts it: the same crop, in the image's own pixels.
export function networkView(image, input) {
  const [, height, width] = input.size;
  const target = [width, height].map((side) => Math.floor(side / input.crop_pct));
  const ratios = [image.width / target[0], image.height / target[1]];
  const same = { center: Math.min(...ratios), border: Math.max(...ratios) }[input.crop_mode];
  const [across, down] = same === undefined ? ratios : [same, same]; // image pixels per pixel of the network
  const cut = [width * across, height * down];
  const scale = Math.min(1, LARGEST / Math.max(...cut));
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = cut.map((side) => Math.max(1, Math.round(side * scale)));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const fill = input.crop_mode === "border" ? input.mean.map((share) => Math.round(255 * share)) : [0, 0, 0];
  context.fillStyle = `rgb(${fill.join(" ")})`;
  context.fillRect(0, 0, canvas.width, canvas.height);
  const left = (image.width - cut[0]) / 2, top = (image.height - cut[1]) / 2;
  context.imageSmoothingQuality = "high";
  context.drawImage(image, -left * scale, -top * scale, image.width * scale, image.height * scale);
  return canvas;
}

export class Picture {
  // view: a canvas, or null where the browser cannot show the image; trace: what /api/merges answers
  constructor(view, trace) {
    this.view = view;
    this.trace = trace;
    [this.down, this.across] = trace.grid;
    const patches = Array.from({ length: this.down * this.across }, (_, patch) => patch);
    this.steps = [{ block: null, groups: patches }];
    for (const { block, groups } of trace.blocks) this.steps.push({ block, groups: groups.flat() });
    this.means = view && this.#patchMeans();
    this.#colour();
  }

  get pixelated() {
    return this.view !== null && Math.max(this.view.width, this.view.height) <= SMALL;
  }

  members(step, patch) {
    const { groups } = this.steps[step];
    return groups.flatMap((group, other) => (group === groups[patch] ? [other] : []));
  }

  counts(step) {
    const { sizes } = this.steps[step];
    const joined = sizes.filter((size) => size > 1);
    return { tokens: sizes.length, joined: joined.length, patches: joined.reduce((sum, size) => sum + size, 0) };
  }

  // A group keeps the colour of the largest of those that it was made of, so that it can be followed through the blocks.
  #colour() {
    let next = 0;
    this.steps.forEach((step, at) => {
      step.sizes = [];
      for (const group of step.groups) step.sizes[group] = (step.sizes[group] ?? 0) + 1;
      step.hues = step.sizes.map(() => null);
      const before = at && this.steps[at - 1];
      const largest = step.sizes.map(() => 1);
      step.groups.forEach((group, patch) => {
        const size = at ? before.sizes[before.groups[patch]] : 1;
        if (size > largest[group]) {
          largest[group] = size;
          step.hues[group] = before.hues[before.groups[patch]];
        }
      });
      step.groups.forEach((group) => {
        if (step.sizes[group] > 1 && step.hues[group] === null) step.hues[group] = (250 + 137.508 * next++) % 360;
      });
    });
  }

  #patchMeans() {
    const { width, height } = this.view;
    const { data } = this.view.getContext("2d").getImageData(0, 0, width, height);
    const sums = Array.from({ length: this.down * this.across }, () => [0, 0, 0, 0]);
    for (let y = 0; y < height; y++) {
      const row = Math.min(this.down - 1, Math.floor((y * this.down) / height));
      for (let x = 0; x < width; x++) {
        const sum = sums[row * this.across + Math.min(this.across - 1, Math.floor((x * this.across) / width))];
        for (let c = 0; c < 3; c++) sum[c] += data[4 * (y * width + x) + c];
        sum[3]++;
      }
    }
    return sums.map((sum) => sum.slice(0, 3).map((total) => total / Math.max(1, sum[3])));
  }

  // style: "groups", "mean" or "plain"; marked: a patch whose group stands out, or null
  draw(canvas, step, style, marked = null) {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    const height = Math.max(1, Math.round((canvas.clientWidth * ratio * this.#height()) / this.#width()));
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = !this.pixelated;
    pen.imageSmoothingQuality = "high";
    if (this.view) pen.drawImage(this.view, 0, 0, width, height);
    else this.#blank(pen, width, height);
    const line = Math.max(1, Math.min(3, width / this.across / 14));
    if (style === "mean" && this.means) this.#fillMeans(pen, step, width, height);
    if (style === "groups") this.#fillGroups(pen, step, width, height);
    this.#outline(pen, step, width, height, line, style);
    if (marked !== null) this.#mark(pen, step, width, height, line, marked);
  }

  #width() {
    return this.view ? this.view.width : this.across;
  }

  #height() {
    return this.view ? this.view.height : this.down;
  }

  #blank(pen, width, height) {
    pen.fillStyle = "#8b95a1";
    pen.fillRect(0, 0, width, height);
  }

  #cell(patch, width, height) {
    const column = patch % this.across, row = Math.floor(patch / this.across);
    const left = Math.round((column * width) / this.across), right = Math.round(((column + 1) * width) / this.across);
    const top = Math.round((row * height) / this.down), bottom = Math.round(((row + 1) * height) / this.down);
    return { column, row, left, right, top, bottom };
  }

  #fill(pen, patch, width, height, inset = 0) {
    const { left, right, top, bottom } = this.#cell(patch, width, height);
    pen.fillRect(left + inset, top + inset, right - left - 2 * inset, bottom - top - 2 * inset);
  }

  #fillMeans(pen, step, width, height) {
    const { groups, sizes } = this.steps[step];
    const sums = sizes.map(() => [0, 0, 0]);
    groups.forEach((group, patch) => this.means[patch].forEach((value, c) => (sums[group][c] += value)));
    groups.forEach((group, patch) => {
      pen.fillStyle = `rgb(${sums[group].map((sum) => Math.round(sum / sizes[group])).join(" ")})`;
      this.#fill(pen, patch, width, height);
    });
  }

  #fillGroups(pen, step, width, height) {
    const { groups, hues } = this.steps[step];
    groups.forEach((group, patch) => {
      if (hues[group] === null) return;
      pen.fillStyle = `oklch(0.68 0.15 ${hues[group]} / 0.5)`;
      this.#fill(pen, patch, width, height);
    });
  }

  // Lines where two neighbours are not one token; in the colour of the group where it has one.
  #outline(pen, step, width, height, line, style) {
    const { groups, hues } = this.steps[step];
    groups.forEach((group, patch) => {
      const coloured = hues[group] !== null && style !== "mean";
      pen.fillStyle = coloured ? `oklch(${style === "plain" ? 0.78 : 0.62} 0.16 ${hues[group]})` : "rgb(128 138 150 / 0.35)";
      this.#edges(pen, step, patch, width, height, coloured ? 1.3 * line : Math.max(1, line / 2));
    });
  }

  #edges(pen, step, patch, width, height, line) {
    const { groups } = this.steps[step];
    const { column, row, left, right, top, bottom } = this.#cell(patch, width, height);
    const differs = (inside, other) => !inside || groups[other] !== groups[patch];
    if (differs(column > 0, patch - 1)) pen.fillRect(left, top, line, bottom - top);
    if (differs(column < this.across - 1, patch + 1)) pen.fillRect(right - line, top, line, bottom - top);
    if (differs(row > 0, patch - this.across)) pen.fillRect(left, top, right - left, line);
    if (differs(row < this.down - 1, patch + this.across)) pen.fillRect(left, bottom - line, right - left, line);
  }

  #mark(pen, step, width, height, line, marked) {
    const { groups } = this.steps[step];
    groups.forEach((group, patch) => {
      if (group === groups[marked]) {
        pen.fillStyle = "rgb(255 255 255 / 0.95)";
        this.#edges(pen, step, patch, width, height, 2.2 * line);
      } else {
        pen.fillStyle = "rgb(12 18 26 / 0.62)";
        this.#fill(pen, patch, width, height);
      }
    });
    const { left, right, top, bottom } = this.#cell(marked, width, height);
    pen.fillStyle = "#fff";
    pen.beginPath();
    pen.arc((left + right) / 2, (top + bottom) / 2, Math.max(2, 2 * line), 0, 2 * Math.PI);
    pen.fill();
  }
}
