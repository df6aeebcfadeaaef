// Strokes on the canvas of painter_html. Each is kept, so that it can be undone; after each, the whole layer
// goes to window.zgpPainted as a PNG with transparency.
const INK = { paint: "#e11d48", white: "#fff", black: "#000" };
let strokes = [];
let before = null; // what was painted when this picture came

const canvas = () => element.querySelector("canvas");
const painter = () => element.querySelector(".zgp-painter");
const tool = () => element.querySelector("[data-tool][aria-pressed=true]").dataset.tool;

const draw = () => {
  const to = canvas().getContext("2d", { willReadFrequently: true });
  const { width, height } = canvas();
  to.globalCompositeOperation = "source-over";
  to.clearRect(0, 0, width, height);
  if (before) to.drawImage(before, 0, 0, width, height);
  for (const { kind, size, points } of strokes) {
    if (kind === "clear") {
      to.clearRect(0, 0, width, height);
    } else if (kind === "invert") {
      to.globalCompositeOperation = "xor";
      to.fillStyle = INK.paint;
      to.fillRect(0, 0, width, height);
    } else {
      to.globalCompositeOperation = kind === "erase" ? "destination-out" : "source-over";
      to.strokeStyle = INK[kind] || "#000";
      to.lineWidth = size;
      to.lineCap = to.lineJoin = "round";
      to.beginPath();
      to.moveTo(...points[0]);
      for (const point of points) to.lineTo(...point);
      to.stroke();
    }
    to.globalCompositeOperation = "source-over";
  }
  return to;
};

const send = () => {
  const { width, height } = canvas();
  const painted = draw().getImageData(0, 0, width, height).data.some((value, i) => i % 4 === 3 && value > 127);
  painter().dataset.painted = Number(painted);
  window.zgpPainted = painted ? canvas().toDataURL("image/png") : "data:,";
  trigger("painted");
};

const begin = () => {
  strokes = [];
  before = null;
  if (!canvas()) return;
  draw();
  if (!painter().dataset.layer) return;
  const image = new Image();
  image.onload = () => {
    before = image;
    draw();
  };
  image.src = painter().dataset.layer;
};

const place = (event) => {
  const box = canvas().getBoundingClientRect();
  const { width, height } = canvas();
  return [((event.clientX - box.left) / box.width) * width, ((event.clientY - box.top) / box.height) * height];
};

let drawing = false;
element.addEventListener("pointerdown", (event) => {
  if (event.target !== canvas() || event.button || painter().dataset.kind === "shown") return;
  event.preventDefault();
  canvas().setPointerCapture(event.pointerId);
  const { width, height } = canvas();
  const size = (element.querySelector(".zgp-brush input").value / 100) * Math.max(width, height);
  strokes.push({ kind: tool(), size, points: [place(event)] });
  drawing = true;
  draw();
});
element.addEventListener("pointermove", (event) => {
  if (!drawing) return;
  strokes.at(-1).points.push(place(event));
  draw();
});
for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, () => {
    if (drawing) send();
    drawing = false;
  });
}

element.addEventListener("input", ({ target }) => {
  target.parentElement.style.setProperty("--zgp-part", (target.value - target.min) / (target.max - target.min));
});

element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { tool, deed } = button.dataset;
  if (tool) {
    for (const one of element.querySelectorAll("[data-tool]")) one.setAttribute("aria-pressed", one === button);
  } else if (deed === "remove") {
    trigger("remove");
  } else {
    if (deed === "undo") strokes.pop();
    else strokes.push({ kind: deed });
    send();
  }
});

// A picture that is pasted goes to the group under the mouse or with the focus.
document.addEventListener("paste", (event) => {
  const group = element.closest(".zgp-pictures");
  const picture = [...(event.clipboardData?.files || [])].find((file) => file.type.startsWith("image/"));
  if (!picture || !group || !group.matches(":hover, :focus-within")) return;
  const input = group.querySelector(".zgp-drop input[type=file]");
  const files = new DataTransfer();
  files.items.add(picture);
  input.files = files.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});

watch("value", begin);
begin();
