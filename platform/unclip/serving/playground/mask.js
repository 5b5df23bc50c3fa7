/** Painting what shall be drawn anew, by mouse, finger, pen or keyboard. */

import { byId } from "./dom.js";

const LARGEST = 1024;
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Strokes on top of the middle square of a picture. Positions and widths are shares of its side. */
export class Painter {
  constructor() {
    this.photo = byId("photo");
    this.mask = byId("mask");
    this.strokesOn = this.mask.getContext("2d", { willReadFrequently: true });
    this.brush = byId("brush");
    this.width = byId("brush-size");
    this.strokes = [];
    this.at = [0.5, 0.5];
    this.erasing = false;
    this.stroke = null;
    byId("paint").onclick = () => this.use(false);
    byId("erase").onclick = () => this.use(true);
    byId("undo").onclick = () => this.drop(this.strokes.length - 1);
    byId("clear").onclick = () => this.drop(0);
    this.width.oninput = () => this.place();
    this.mask.onpointerdown = (event) => this.press(event);
    this.mask.onpointermove = (event) => this.move(this.under(event));
    this.mask.onpointerup = this.mask.onpointercancel = () => this.finish();
    this.mask.onkeydown = (event) => this.key(event);
    this.mask.onkeyup = (event) => event.key === " " && this.finish();
    this.mask.onblur = () => this.finish();
  }

  /** Begins with a picture, an ImageBitmap, or with none. */
  open(bitmap) {
    byId("painter").hidden = !bitmap;
    this.strokes = [];
    this.stroke = null;
    if (!bitmap) return;
    const { width, height } = bitmap;
    const side = Math.min(width, height);
    const size = Math.min(side, LARGEST);
    for (const canvas of [this.photo, this.mask]) canvas.width = canvas.height = size;
    const context = this.photo.getContext("2d");
    context.fillStyle = "white";
    context.fillRect(0, 0, size, size);
    context.drawImage(bitmap, (width - side) / 2, (height - side) / 2, side, side, 0, 0, size, size);
    this.place();
  }

  use(erasing) {
    this.erasing = erasing;
    byId("paint").ariaPressed = String(!erasing);
    byId("erase").ariaPressed = String(erasing);
  }

  under(event) {
    const { left, top, width, height } = this.mask.getBoundingClientRect();
    return [(event.clientX - left) / width, (event.clientY - top) / height];
  }

  press(event) {
    event.preventDefault();
    this.mask.focus({ preventScroll: true });
    this.mask.setPointerCapture(event.pointerId);
    this.begin(this.under(event));
  }

  begin(at) {
    this.at = at;
    this.stroke = { erasing: this.erasing, width: this.width.value / 100, points: [at] };
    this.strokes.push(this.stroke);
    this.draw();
    this.place();
  }

  move(at) {
    this.at = at.map((share) => Math.min(Math.max(share, 0), 1));
    this.stroke?.points.push(this.at);
    if (this.stroke) this.draw();
    this.place();
  }

  finish() {
    if (!this.stroke) return;
    this.stroke = null;
    this.tell();
  }

  drop(length) {
    this.strokes.length = Math.max(length, 0);
    this.draw();
    this.tell();
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const step = event.shiftKey ? 0.1 : 0.02;
    const actions = {
      " ": () => this.stroke ?? this.begin(this.at),
      e: () => this.use(!this.erasing),
      z: () => this.drop(this.strokes.length - 1),
      "[": () => this.resize(-2),
      "]": () => this.resize(2),
    };
    const direction = MOVES[event.key];
    const act = direction ? () => this.move(this.at.map((share, axis) => share + step * direction[axis])) : actions[event.key.toLowerCase()];
    if (!act) return;
    event.preventDefault();
    act();
  }

  resize(change) {
    this.width.value = Number(this.width.value) + change;
    this.place();
  }

  place() {
    const [x, y] = this.at;
    Object.assign(this.brush.style, { left: `${100 * x}%`, top: `${100 * y}%`, width: `${this.width.value}%` });
  }

  draw() {
    const context = this.strokesOn;
    const { width: size } = this.mask;
    context.clearRect(0, 0, size, size);
    context.lineCap = context.lineJoin = "round";
    for (const { erasing, width, points } of this.strokes) {
      context.globalCompositeOperation = erasing ? "destination-out" : "source-over";
      context.strokeStyle = "#e0457b";
      context.lineWidth = width * size;
      context.beginPath();
      // A line without length is not drawn, not even its round ends: a dot needs some.
      context.moveTo(points[0][0] * size - 0.01, points[0][1] * size);
      for (const [x, y] of points) context.lineTo(x * size, y * size);
      context.stroke();
    }
  }

  /** Which pixels are painted, as the alpha of RGBA. */
  pixels() {
    const { width: size } = this.mask;
    return this.strokesOn.getImageData(0, 0, size, size);
  }

  /** Share of the picture that is painted. */
  painted() {
    const { data } = this.pixels();
    let count = 0;
    for (let i = 3; i < data.length; i += 4) count += data[i] >= 128;
    return (4 * count) / data.length;
  }

  tell() {
    byId("painted").textContent = `${Math.round(100 * this.painted())}% of the picture is painted.`;
  }

  /** The square picture, and a mask whose transparent pixels are to be drawn anew: what the API takes. */
  async files() {
    const pixels = this.pixels();
    for (let i = 3; i < pixels.data.length; i += 4) pixels.data[i] = pixels.data[i] >= 128 ? 0 : 255;
    const mask = new OffscreenCanvas(pixels.width, pixels.height);
    mask.getContext("2d").putImageData(pixels, 0, 0);
    const picture = new OffscreenCanvas(pixels.width, pixels.height);
    picture.getContext("2d").drawImage(this.photo, 0, 0);
    return [await pngFile("image", picture), await pngFile("mask", mask)];
  }
}

async function pngFile(name, canvas) {
  const blob = await canvas.convertToBlob({ type: "image/png" });
  return { name, file: new File([blob], `${name}.png`, { type: blob.type }) };
}
