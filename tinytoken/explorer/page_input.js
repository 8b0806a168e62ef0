// What the user does

function painted(x, y) {
  const size = setup.size, width = Number(at("brush").value);
  const bytes = colour.match(/\w\w/g).map(part => parseInt(part, 16));
  const first = -Math.floor((width - 1) / 2);
  for (let i = first; i < first + width; i++) {
    for (let j = first; j < first + width; j++) {
      const across = x + i, down = y + j, inside = value => value >= 0 && value < size;
      if (inside(across) && inside(down)) pixels.set(bytes, 3 * (down * size + across));
    }
  }
  mine(pixels);
}

function mine(bytes) {
  pixels = bytes;
  source = {pixels: btoa(String.fromCharCode(...pixels))};
  showPicture();
  refresh();
}

function darkGround() {
  const bytes = new Uint8Array(3 * setup.size ** 2);
  let state = 1;
  for (let i = 0; i < bytes.length; i++) {
    state = (state * 48271) % 2147483647;  // a little noise, the same each time
    bytes[i] = 27 + state % 16;
  }
  mine(bytes);
}

const inPicture = value => Math.max(0, Math.min(setup.size - 1, value));

function place(event) {
  const box = at("picture").getBoundingClientRect(), size = setup.size;
  const along = (value, start, length) => inPicture(Math.floor((value - start) / length * size));
  return [along(event.clientX, box.left, box.width), along(event.clientY, box.top, box.height)];
}

function onKey(event) {
  const move = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (move) {
    cursor = {x: inPicture(cursor.x + move[0]), y: inPicture(cursor.y + move[1])};
    showPicture();
  } else if (event.key === " " && !recorded) painted(cursor.x, cursor.y);
  else return;
  event.preventDefault();
}

async function onFile(file) {
  try {
    if (file.size > MOST) throw new Error(`the file has more than ${MOST >> 20} MB`);
    if (form.form === "native") {
      const answer = await reading(await fetch("picture", {method: "POST", body: file}));
      mine(Uint8Array.from(atob(answer.pixels), letter => letter.charCodeAt(0)));
    } else mine(await decoded(file));
  } catch (error) {
    say(error);
  }
}

async function decoded(file) {
  const bitmap = await createImageBitmap(file), side = Math.min(bitmap.width, bitmap.height);
  const size = setup.size;
  const context = new OffscreenCanvas(size, size).getContext("2d");
  context.fillStyle = "white";  // behind what is transparent
  context.fillRect(0, 0, size, size);
  context.imageSmoothingQuality = "high";
  const left = (bitmap.width - side) / 2, top = (bitmap.height - side) / 2;
  context.drawImage(bitmap, left, top, side, side, 0, 0, size, size);
  const {data} = context.getImageData(0, 0, size, size), bytes = new Uint8Array(3 * size * size);
  for (let i = 0; i < size * size; i++) bytes.set(data.subarray(4 * i, 4 * i + 3), 3 * i);
  return bytes;
}

const known = () => recorded ? Object.keys(recorded.scenes).map(Number) : [...setup.scenes.keys()];

function goTo(number) {
  const nearest = known().reduce((best, n) => Math.abs(n - number) < Math.abs(best - number) ? n : best);
  at("scene").value = nearest;
  source = {scene: nearest};
  refresh();
}

function step(by) {
  const all = known(), here = Math.max(0, all.indexOf(Number(at("scene").value)));
  goTo(all[(here + by + all.length) % all.length]);
}

function listen() {
  const picture = at("picture");
  for (const name of ["keep", "block", "token"]) at(name).oninput = refresh;
  at("grid").oninput = () => { at("token").value = 0; refresh(); };
  at("scene").onchange = () => goTo(Number(at("scene").value));
  at("before").onclick = () => step(-1);
  at("after").onclick = () => step(1);
  at("clear").onclick = darkGround;
  at("file").onchange = () => at("file").files.length && onFile(at("file").files[0]);
  picture.onkeydown = onKey;
  picture.onfocus = picture.onblur = showPicture;
  picture.onpointerdown = event => {
    if (recorded) return;
    picture.setPointerCapture(event.pointerId);
    painted(...place(event));
  };
  picture.onpointermove = event => { if (!recorded && event.buttons) painted(...place(event)); };
  picture.ondragover = event => { event.preventDefault(); picture.classList.add("over"); };
  picture.ondragleave = () => picture.classList.remove("over");
  picture.ondrop = event => {
    event.preventDefault();
    picture.classList.remove("over");
    if (event.dataTransfer.files.length && !recorded) onFile(event.dataTransfer.files[0]);
  };
}

function only(free) {
  for (const name of ["file", "brush", "clear", "block", "token"]) at(name).disabled = !free;
  for (const button of at("colours").children) button.disabled = !free;
}

// How it begins

async function show(engine, words) {
  ask = engine;
  if (!setup) {
    setup = await ask({want: "setup"});
    build();
    listen();
  }
  only(!recorded);
  at("state").textContent = words;
  await refresh();
  document.body.dataset.form = recorded ? "recorded" : form.form;
}

async function begin() {
  if (form.form === "native") {
    return show(native, "The models run on this machine, by the installed package.");
  }
  recorded = await reading(await fetch(form.examples));
  const count = Object.keys(recorded.scenes).length;
  await show(fromRecorded, `Python is being loaded into this browser, about 19 MB. Until then: ${count} `
    + "recorded scenes.");
  try {
    const engine = await pyodide();
    recorded = null;
    await show(engine, "The models run in this browser, by Pyodide and this package.");
  } catch (error) {
    at("state").textContent = `Pyodide cannot be loaded here (${error.message}). What you see are ${count} `
      + "recorded scenes: their first two sliders work, drawing does not.";
    document.body.dataset.form = "without";
  }
}

begin().catch(error => {
  at("state").textContent = location.protocol === "file:"
    ? "This page has to come from a web server: python -m http.server in its folder is one." : "";
  say(error);
  document.body.dataset.form = "failed";
});
