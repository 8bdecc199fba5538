/** Paints one tile of the map. The look is all here; widths and distances are pixels of a picture 8192 wide. */
import { createCanvas } from '@napi-rs/canvas';
import type { Canvas, CanvasGradient, SKRSContext2D } from '@napi-rs/canvas';
import { BLEED, UNIT } from './scene.ts';
import type { Layer, LayerKind, TileScene } from './scene.ts';

const PAPER = '#f6f1e5';
const OCEAN_MIDDLE = '#c3dde6';
const OCEAN_EDGE = '#93bccd';
const GRATICULE = 'rgba(61, 110, 133, 0.26)';
const LAND = '#e9e2cf';
const BORDER = 'rgba(94, 72, 62, 0.78)';
const COAST = '#47707f';
const RIM = '#55798a';

/** Fill and, for the band along the inside of a country's border, a deeper tone of it. One pair per colour number. */
const COUNTRY_COLORS: readonly { readonly fill: string; readonly edge: string }[] = [
  { fill: '#e9c998', edge: '#cc9d55' },
  { fill: '#c9d6a3', edge: '#9bb066' },
  { fill: '#e7b9a0', edge: '#ce8862' },
  { fill: '#c5bdd6', edge: '#9a8cb9' },
  { fill: '#aed0bd', edge: '#74a88c' },
  { fill: '#f1e8b6', edge: '#cfbd68' },
];
const ICE = { fill: '#f7f8f5', edge: '#d3e0e2' };

/** Bands of lighter water along the coast, widest first. */
const SHALLOWS: readonly { readonly width: number; readonly alpha: number }[] = [
  { width: 64, alpha: 0.1 },
  { width: 46, alpha: 0.12 },
  { width: 30, alpha: 0.15 },
  { width: 17, alpha: 0.2 },
  { width: 8, alpha: 0.3 },
];

const OVERLAY_FILL = 'rgba(196, 42, 74, 0.34)';
const OVERLAY_LINE = '#b3123f';
const OVERLAY_HALO = 'rgba(255, 250, 240, 0.85)';

/**
 * Paints a tile in steps, so that the caller can report progress and stop in between. The generator yields after each
 * step and returns the canvas.
 */
export function* paintTile(scene: TileScene): Generator<string, Canvas> {
  const { width, height } = scene.tile;
  const canvas = createCanvas(width + 2 * BLEED, height + 2 * BLEED);
  const brush = new Brush(canvas.getContext('2d'), scene);
  const of = (kind: LayerKind): Layer[] => scene.layers.filter((layer) => layer.kind === kind);

  brush.background();
  for (const layer of of('sphere')) brush.ocean(layer);
  yield 'ocean';
  for (const layer of of('shallows')) brush.shallows(layer);
  yield 'shallows';
  for (const layer of of('graticule')) brush.line(layer, GRATICULE, 1.5);
  for (const layer of of('land')) brush.area(layer, LAND);
  yield 'land';
  for (const layer of of('country')) brush.country(layer);
  yield 'countries';
  for (const layer of of('border')) brush.line(layer, BORDER, 1.5);
  for (const layer of of('coast')) brush.line(layer, COAST, 1.7);
  for (const layer of of('sphere')) brush.line(layer, RIM, 4, true);
  yield 'lines';
  for (const layer of of('overlay-area')) {
    brush.area(layer, OVERLAY_FILL);
    brush.line(layer, OVERLAY_LINE, 4, true);
  }
  for (const layer of of('overlay-line')) {
    brush.line(layer, OVERLAY_HALO, 13);
    brush.line(layer, OVERLAY_LINE, 7);
  }
  for (const layer of of('overlay-point')) brush.points(layer);
  yield 'overlay';
  const tile = createCanvas(width, height);
  tile.getContext('2d').drawImage(canvas, -BLEED, -BLEED);
  return tile;
}

/** A drawing context in the coordinates of a scene. */
class Brush {
  readonly #context: SKRSContext2D;
  readonly #scene: TileScene;
  /** Picture pixels per style pixel, but lines never thinner than can be seen. */
  readonly #scale: number;

  constructor(context: SKRSContext2D, scene: TileScene) {
    this.#context = context;
    this.#scene = scene;
    this.#scale = Math.max(scene.scale, 0.12);
    context.lineJoin = 'round';
    context.lineCap = 'round';
    context.translate(BLEED, BLEED);
  }

  background(): void {
    const { width, height } = this.#scene.tile;
    this.#context.fillStyle = PAPER;
    this.#context.fillRect(-BLEED, -BLEED, width + 2 * BLEED, height + 2 * BLEED);
  }

  ocean(layer: Layer): void {
    this.#trace(layer, true);
    this.#context.fillStyle = this.#oceanGradient();
    this.#context.fill('evenodd');
  }

  area(layer: Layer, fill: string): void {
    this.#trace(layer, true);
    this.#context.fillStyle = fill;
    this.#context.fill('evenodd');
  }

  line(layer: Layer, color: string, width: number, closed = false): void {
    this.#trace(layer, closed);
    this.#stroke(color, width);
  }

  shallows(layer: Layer): void {
    this.#trace(layer, false);
    for (const { width, alpha } of SHALLOWS) this.#stroke(`rgba(236, 247, 248, ${alpha})`, width);
  }

  country(layer: Layer): void {
    const { fill, edge } =
      layer.color === 'ice' ? ICE : (COUNTRY_COLORS[layer.color ?? 0] ?? { fill: LAND, edge: BORDER });
    const context = this.#context;
    this.#trace(layer, true);
    context.fillStyle = fill;
    context.fill('evenodd');
    context.save();
    context.clip('evenodd');
    context.globalAlpha = 0.25;
    for (const width of [28, 20, 13, 7]) this.#stroke(edge, width);
    context.restore();
  }

  points(layer: Layer): void {
    const context = this.#context;
    const radius = Math.max(11 * this.#scale, 2.5);
    for (const [x = 0, y = 0] of layer.paths) {
      context.beginPath();
      context.arc(x / UNIT, y / UNIT, radius, 0, 2 * Math.PI);
      context.fillStyle = OVERLAY_LINE;
      context.fill();
      this.#stroke(OVERLAY_HALO, 4);
    }
  }

  #trace({ paths }: Layer, closed: boolean): void {
    const context = this.#context;
    context.beginPath();
    for (const path of paths) {
      for (let index = 0; index < path.length; index += 2) {
        const [x, y] = [path[index]! / UNIT, path[index + 1]! / UNIT];
        if (index === 0) context.moveTo(x, y);
        else context.lineTo(x, y);
      }
      if (closed) context.closePath();
    }
  }

  #stroke(color: string, width: number): void {
    this.#context.strokeStyle = color;
    this.#context.lineWidth = Math.max(width * this.#scale, 0.4);
    this.#context.stroke();
  }

  /** Lighter in the middle of the picture; in the picture's coordinates, so it goes on across tiles. */
  #oceanGradient(): CanvasGradient {
    const { picture, tile } = this.#scene;
    const [x, y] = [picture.width / 2 - tile.x, picture.height * 0.46 - tile.y];
    const gradient = this.#context.createRadialGradient(
      x,
      y,
      picture.width * 0.08,
      x,
      y,
      picture.width * 0.56,
    );
    gradient.addColorStop(0, OCEAN_MIDDLE);
    gradient.addColorStop(1, OCEAN_EDGE);
    return gradient;
  }
}
