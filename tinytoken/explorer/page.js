"use strict";
// The page asks an engine, ask(request) -> reply, as tinytoken/explorer/look.py says. `form` tells which:
//   {"form": "native"}   this page's server
//   {"form": "pyodide", "pyodide": address, "archive": file, "examples": file}   Python in this browser;
//   until it is there, or where it cannot be had, the recorded examples
const form = JSON.parse(document.getElementById("form").textContent);
const at = id => document.getElementById(id);
const NAMES = {vit: "ViT", dynamicvit: "DynamicViT", lookupvit: "LookupViT"};
const COLOURS = {red: "#e13c37", orange: "#f09128", yellow: "#ebd741", green: "#55b44b", teal: "#3cb9be",
  blue: "#466ed7", purple: "#9655c3", pink: "#eb82af", dark: "#232323"};
const SIDE = 256, MOST = 16 << 20;
let setup, reply, ask, recorded = null, source = {scene: 0}, colour = COLOURS.red;
let pixels = new Uint8Array(0), cursor = {x: 16, y: 16}, running = false, again = false;
const figures = {};

// Engines

async function native(request) {
  return reading(await fetch("ask", {method: "POST", body: JSON.stringify(request)}));
}

async function reading(answer) {
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

async function fromRecorded(request) {
  if (request.want === "setup") return recorded.setup;
  const {models, ...scene} = recorded.scenes[request.scene];
  return {...scene, models: {vit: models.vit, dynamicvit: models.dynamicvit[request.keep.toFixed(2)],
    lookupvit: models.lookupvit[`${request.grid}x${request.grid}`]}};
}

const WORKER = `
let explorer;
async function start({pyodide, archive}) {
  const {loadPyodide} = await import(pyodide + "pyodide.mjs");
  const python = await loadPyodide({indexURL: pyodide});
  await python.loadPackage("numpy", {messageCallback: () => {}});
  const answer = await fetch(archive);
  if (!answer.ok) throw new Error(archive + ": " + answer.status);
  python.unpackArchive(await answer.arrayBuffer(), "zip", {extractDir: "/tinytoken"});
  explorer = python.runPython("import sys; sys.path.insert(0, '/tinytoken')\\n"
    + "import tqdm; tqdm.tqdm.monitor_interval = 0  # a thread, which a browser lacks\\n"
    + "from tinytoken.explorer.look import Explorer\\nExplorer()");
}
onmessage = async ({data: {number, start: places, request}}) => {
  try {
    if (places) { await start(places); postMessage({number}); }
    else postMessage({number, reply: explorer.answer(request)});
  } catch (error) {
    const lines = String(error.message || error).trim().split("\\n");
    const named = lines.findLast(line => /^[\\w.]*(Error|Exception)\\b/.test(line));
    postMessage({number, error: named || lines[0]});
  }
};`;

async function pyodide() {
  const code = URL.createObjectURL(new Blob([WORKER], {type: "text/javascript"}));
  const worker = new Worker(code, {type: "module"});
  const waiting = new Map();
  worker.onmessage = ({data}) => {
    const {resolve, reject} = waiting.get(data.number);
    waiting.delete(data.number);
    if (data.error) reject(new Error(data.error)); else resolve(data.reply);
  };
  worker.onerror = event => waiting.forEach(({reject}) => reject(new Error(event.message || "no worker")));
  const send = message => new Promise((resolve, reject) => {
    const number = (send.number = (send.number || 0) + 1);
    waiting.set(number, {resolve, reject});
    worker.postMessage({number, ...message});
  });
  const whole = address => new URL(address, location.href).href;
  await send({start: {pyodide: whole(form.pyodide), archive: whole(form.archive)}});
  return async request => JSON.parse(await send({request: JSON.stringify(request)}));
}

// Asking: one question at a time, and of those that come meanwhile only the last

async function refresh() {
  again = true;
  if (running) return;
  running = true;
  document.body.dataset.busy = "true";
  while (again) {
    again = false;
    const began = performance.now();
    try {
      const found = await ask(question());
      reply = found;
      draw();
      at("error").hidden = true;
    } catch (error) {
      say(error);
    }
    document.body.dataset.milliseconds = (performance.now() - began).toFixed(1);
  }
  running = false;
  document.body.dataset.busy = "false";
  caption();
}

function question() {
  const token = Number(at("token").value);
  return {...source, keep: setup.keeps[at("keep").value], grid: Number(at("grid").value),
    block: Number(at("block").value), token: token === 0 ? null : token - 1};
}

function say(error) {
  at("error").textContent = `That did not work: ${error.message || error}`;
  at("error").hidden = false;
}

// Drawing what came back

function draw() {
  pixels = Uint8Array.from(atob(reply.pixels), letter => letter.charCodeAt(0));
  showPicture();
  const seen = reply.models, dynamic = seen.dynamicvit, lookup = seen.lookupvit, names = setup.classes;
  const total = setup.grid[0] * setup.grid[1], counts = dynamic.stages.map(stage => stage.kept.length);
  tell("keep", `${setup.keeps[at("keep").value].toFixed(2)} (of ${total}: ${counts.join(", ")})`);
  tell("grid", `${lookup.grid.join(" × ")} = ${lookup.grid[0] * lookup.grid[1]}`);
  tell("block", `${at("block").value} of ${setup.depth}`);
  at("token").max = lookup.grid[0] * lookup.grid[1];
  tell("token", `number ${lookup.token + 1}${at("token").value === "0" ? ", the most peaked one" : ""}`);
  look("vit-attention", {weights: seen.vit.attention}, "attention over all patches");
  dynamic.stages.forEach((stage, i) => look(`dynamicvit-stage${i}`, {kept: stage.kept},
    `before block ${stage.before}: ${stage.kept.length} of ${total} kept` + (stage.object === undefined ? ""
      : `; ${percent(stage.object, 0)} of them object (of all: ${percent(dynamic.object, 0)})`)));
  look("dynamicvit-attention", {weights: dynamic.attention}, "attention over what is left");
  look("lookupvit-all", {weights: lookup.attention}, "where all compressed tokens look");
  look("lookupvit-one", {weights: lookup.token_attention}, `where token ${lookup.token + 1} looks`);
  for (const [name, model] of Object.entries(seen)) {
    const best = model.probabilities.indexOf(Math.max(...model.probabilities)), put = facts(name);
    put("answer", `${names[best]}, ${percent(model.probabilities[best])}`);
    const part = (model.macs / seen.vit.macs).toFixed(2);
    put("macs", `${(model.macs / 1e6).toFixed(2)} M (${part} of the ViT's)`);
    put("time", recorded ? "not recorded" : `${(1000 * model.seconds).toFixed(1)} ms`);
    put("accuracy", model.accuracy === null ? "not measured" : percent(model.accuracy));
  }
  table(names, Object.values(seen).map(model => model.probabilities));
}

const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;
const facts = name => (key, text) => { at(`${name}-${key}`).textContent = text; };

function tell(name, text) {
  at(`${name}-text`).textContent = text;
  at(name).setAttribute("aria-valuetext", text);
}

function caption() {
  if (!reply) return;
  const label = reply.label === null ? "Your picture."
    : `Scene ${source.scene}: ${setup.classes[reply.label]}.`;
  const unlike = reply.unlike.length ? ` Unlike the pictures that the models know (${reply.unlike[0]}): the `
    + "classes may mean nothing." : "";
  const step = recorded ? "" : ` Answered in ${Math.round(document.body.dataset.milliseconds)} ms.`;
  at("caption").textContent = label + unlike + step;
}

function paintPicture(canvas, side) {
  const small = new OffscreenCanvas(setup.size, setup.size), there = small.getContext("2d");
  const data = there.createImageData(setup.size, setup.size);
  for (let i = 0; i < setup.size ** 2; i++) data.data.set([...pixels.subarray(3 * i, 3 * i + 3), 255], 4 * i);
  there.putImageData(data, 0, 0);
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, side, side);
  return context;
}

function showPicture() {
  const context = paintPicture(at("picture"), SIDE), cell = SIDE / setup.size;
  if (document.activeElement !== at("picture")) return;
  context.lineWidth = 2;
  for (const [style, inset] of [["#000", 0], ["#fff", 2]]) {
    context.strokeStyle = style;
    const [x, y] = [cursor.x, cursor.y].map(along => along * cell - 2 + inset), side = cell + 4 - 2 * inset;
    context.strokeRect(x, y, side, side);
  }
}

function look(name, {kept = null, weights = null}, text) {
  const {canvas, words} = figures[name], context = paintPicture(canvas, SIDE);
  const [rows, columns] = setup.grid, wide = SIDE / columns, high = SIDE / rows;
  const most = weights && Math.max(...weights.filter(weight => weight !== null));
  for (let place = 0; place < rows * columns; place++) {
    const box = [place % columns * wide, Math.floor(place / columns) * high, wide, high];
    const gone = kept ? !kept.includes(place) : weights[place] === null;
    if (gone) hatch(context, ...box);
    else if (weights) {
      context.fillStyle = "rgb(0 0 0 / 40%)";
      context.fillRect(...box);
      context.fillStyle = `rgb(255 221 51 / ${(70 * weights[place] / most).toFixed(0)}%)`;
      context.fillRect(...box);
    }
  }
  words.textContent = text;
  canvas.setAttribute("aria-label", text);
}

function hatch(context, x, y, wide, high) {
  context.save();
  context.beginPath();
  context.rect(x, y, wide, high);
  context.clip();
  context.fillStyle = "rgb(20 22 26 / 82%)";
  context.fillRect(x, y, wide, high);
  context.strokeStyle = "rgb(160 168 180 / 70%)";
  for (let d = -high; d < wide; d += 8) {
    context.moveTo(x + d, y + high);
    context.lineTo(x + d + high, y);
  }
  context.stroke();
  context.restore();
}

function table(names, columns) {
  names.forEach((name, k) => {
    const row = at("classes").rows[k];
    row.className = reply.label === k ? "label" : "";
    columns.forEach((column, c) => {
      const cell = row.cells[c + 1];
      cell.textContent = percent(column[k]);
      cell.className = column[k] === Math.max(...column) ? "best" : "";
      cell.style.setProperty("--share", percent(column[k]).replace(" ", ""));
    });
  });
}

// The parts that are made once

function make(kind, more = {}, ...inside) {
  const element = Object.assign(document.createElement(kind), more);
  element.append(...inside);
  return element;
}

function build() {
  const views = {vit: ["attention"], dynamicvit: ["stage0", "stage1", "stage2", "attention"],
    lookupvit: ["all", "one"]};
  for (const [name, title] of Object.entries(NAMES)) {
    const shown = make("div", {className: "views"});
    for (const view of views[name]) {
      const canvas = make("canvas"), words = make("figcaption");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", view);
      figures[`${name}-${view}`] = {canvas, words};
      shown.append(make("figure", {}, canvas, words));
    }
    const list = make("dl");
    for (const [key, word] of [["macs", "multiply-adds"], ["time", "time"], ["accuracy", "test accuracy"]]) {
      list.append(make("dt", {textContent: word}), make("dd", {id: `${name}-${key}`}));
    }
    at("seen").append(make("article", {className: "model"}, make("h3", {textContent: title}),
      make("p", {className: "answer", id: `${name}-answer`}), shown, list));
  }
  for (const name of setup.classes) {
    const head = make("th", {textContent: name, scope: "row"});
    at("classes").append(make("tr", {}, head, make("td"), make("td"), make("td")));
  }
  for (const [name, value] of Object.entries(COLOURS)) {
    const button = make("button", {type: "button", className: "colour", title: name});
    button.style.background = value;
    button.setAttribute("aria-label", `Colour ${name}`);
    button.setAttribute("aria-pressed", String(value === colour));
    button.onclick = () => {
      colour = value;
      for (const one of at("colours").children) one.setAttribute("aria-pressed", String(one === button));
    };
    at("colours").append(button);
  }
  at("keep").max = setup.keeps.length - 1;
  at("keep").value = setup.keeps.findIndex(keep => Math.abs(keep - 0.7) < 1e-6);
  at("grid").max = setup.grid[0];
  at("block").max = at("block").value = setup.depth;
  at("scene").max = setup.scenes.length - 1;
}
