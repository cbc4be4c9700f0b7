"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const percent = (x) => (x === null ? "not measured" : `${+(100 * x).toPrecision(3)}%`);
const human = (size) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (size >= 1000 && at < 4) { size /= 1024; at += 1; }
  return `${+size.toPrecision(3)} ${units[at]}`;
};

// Drawing: all text enters by textContent, never as markup.
function draw(parent, tag, attributes = {}, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}
function canvas(parent, width, height, title) {
  const svg = draw(parent, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  draw(svg, "title", {}, title);
  return svg;
}
function figure(parent, title) {
  const box = document.createElement("figure"), heading = document.createElement("h3");
  heading.textContent = title;
  box.append(heading);
  parent.append(box);
  return box;
}
function tell(node, text) {
  const tip = byId("tip");
  const show = (event) => {
    const box = node.getBoundingClientRect();
    tip.textContent = text;
    tip.style.display = "block";
    const left = (event.clientX ?? box.left) + 12;
    tip.style.left = `${Math.max(0, Math.min(left, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${(event.clientY ?? box.bottom) + 14}px`;
  };
  node.addEventListener("mousemove", show);
  node.addEventListener("focus", show);
  for (const end of ["mouseleave", "blur"]) {
    node.addEventListener(end, () => { tip.style.display = "none"; });
  }
}

// Heat maps: layers run across, heads down.
function heat(parent, title, rows, look, click) {
  const box = figure(parent, title), layers = rows.length, heads = rows[0].length;
  const side = 356 / layers, high = Math.max(7, Math.min(20, 160 / heads));
  const svg = canvas(box, 400, heads * high + 34, title);
  draw(svg, "text", { x: 0, y: heads * high / 2 + 4 }, "head");
  draw(svg, "text", { x: 44, y: heads * high + 30 }, "layer");
  const step = Math.ceil(26 / side);
  rows.forEach((row, layer) => {
    if (layer % step === 0) {
      draw(svg, "text", { x: 44 + (layer + 0.5) * side, y: heads * high + 14,
        "text-anchor": "middle" }, String(layer));
    }
    row.forEach((value, head) => {
      const [fill, said] = look(value, layer, head);
      const cell = draw(svg, "rect", { class: click ? "cell open" : "cell", x: 44 + layer * side,
        y: head * high, width: side, height: high, style: `fill:${fill}`,
        "data-layer": layer, "data-head": head });
      tell(cell, said);
      if (!click) return;
      cell.setAttribute("tabindex", "0");
      cell.addEventListener("click", () => click(layer, head));
      cell.addEventListener("keydown", (e) => { if (e.key === "Enter") click(layer, head); });
    });
  });
  return box;
}
const shaded = (value, least, most) =>
  `rgba(var(--hot),${0.04 + 0.96 * (most > least ? (value - least) / (most - least) : 0)})`;
const kinds = { s: "static", d: "dynamic", w: "whole" };

// Lines on axes; x is logarithmic. Lines: {name, colour, dash, points: [x, y], chosen}.
function lines(parent, title, xLabel, yLabel, all, logY) {
  const box = figure(parent, title), W = 560, H = 320, L = 62, B = 46, R = 26, T = 10;
  const svg = canvas(box, W, H, title), points = all.flatMap((line) => line.points);
  if (!points.length) { box.append("Nothing was measured here."); return box; }
  const xs = points.map((p) => p[0]), low = Math.min(...xs), high = Math.max(...xs);
  const ys = points.map((p) => p[1]).filter((y) => !logY || y > 0);
  const least = logY ? Math.min(...ys) : 0, most = Math.max(...ys, logY ? 0 : 1e-9);
  const wide = Math.log(high / low) || 1;
  const tall = logY ? Math.log(most / least) || 1 : most - least;
  const x = (v) => L + (W - L - R) * Math.log(v / low) / wide;
  const rise = (v) => (logY ? Math.log(Math.max(v, least) / least) : v - least) / tall;
  const y = (v) => H - B - (H - B - T) * rise(v);
  for (let i = 0; i <= 4; i += 1) {
    const v = logY ? least * Math.exp(tall * i / 4) : least + tall * i / 4;
    draw(svg, "line", { class: "rule", x1: L, x2: W - R, y1: y(v), y2: y(v) });
    const said = yLabel.endsWith("%)") ? String(+(100 * v).toPrecision(2)) : String(+v.toPrecision(2));
    draw(svg, "text", { x: L - 6, y: y(v) + 4, "text-anchor": "end" }, said);
  }
  const ticks = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1].filter((v) => v >= low * 0.99 && v <= high * 1.01);
  for (const v of ticks) {
    draw(svg, "text", { x: x(v), y: H - B + 16, "text-anchor": "middle" }, percent(v));
  }
  draw(svg, "line", { class: "axis", x1: L, x2: W - R, y1: H - B, y2: H - B });
  draw(svg, "text", { x: (L + W) / 2, y: H - 8, "text-anchor": "middle" }, xLabel);
  draw(svg, "text", { x: 14, y: (H - B) / 2, "text-anchor": "middle",
    transform: `rotate(-90 14 ${(H - B) / 2})` }, yLabel);
  const legend = document.createElement("figcaption");
  for (const line of all) {
    const path = line.points.map((p) => `${x(p[0])},${y(p[1])}`).join(" ");
    draw(svg, "polyline", { points: path, style: `fill:none;stroke:${line.colour};stroke-width:` +
      `${line.chosen ? 3.5 : 1.5};stroke-dasharray:${line.dash || "none"}` });
    for (const p of line.points) {
      const dot = draw(svg, "circle", { cx: x(p[0]), cy: y(p[1]), r: p[2] ? 7 : 3,
        class: p[2] ? "now" : "point", style: `fill:${line.colour}` });
      tell(dot, `${line.name}\n${xLabel}: ${percent(p[0])}\n${yLabel}: ` +
        (yLabel.endsWith("%)") ? percent(p[1]) : String(p[1])));
    }
    const mark = document.createElement("span");
    mark.style.color = line.colour;
    mark.textContent = line.dash ? "┅ " : "━ ";
    legend.append(mark, `${line.name}   `);
  }
  box.append(legend);
  return box;
}
const palette = ["#2a8fd0", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6d31",
  "#777777", "#7b4fa3"];
const dashes = ["", "7 3", "2 3"];
const styled = (i) => ({ colour: palette[i % 9], dash: dashes[Math.floor(i / 9) % 3] });

function openHead(layer, head) {
  const place = byId("curves");
  place.replaceChildren();
  for (const cell of document.querySelectorAll("#heads rect.open")) {
    cell.classList.toggle("chosen", +cell.dataset.layer === layer && +cell.dataset.head === head);
  }
  const { ratios, loss } = data.curves;
  const all = data.strategies.map((name, s) => ({ name, ...styled(s),
    chosen: s === data.strategy[layer][head],
    points: ratios.map((r, i) => [r, loss[s][layer][head][i]]).filter((p) => p[1] !== null) }));
  lines(place, `Layer ${layer}, head ${head}: loss of every strategy (chosen: thick)`,
    "share of the head's dense bytes", "loss", all.filter((line) => line.points.length), false);
}
function heads() {
  const place = byId("heads"), click = data.curves ? openHead : null;
  const about = (layer, head) => `layer ${layer}, head ${head}: ${data.types[layer][head]}\n` +
    `${data.strategies[data.strategy[layer][head]]}\nkeeps ${percent(data.budget[layer][head])}`;
  heat(place, "Types (blue static, orange dynamic)", data.types,
    (type, l, h) => [`var(--${type})`, about(l, h)], click);
  const most = Math.max(...data.budget.flat());
  heat(place, `Budgets (strongest: ${percent(most)} kept)`, data.budget,
    (v, l, h) => [shaded(v, 0, most), about(l, h)], click);
  if (data.curves) openHead(0, 0);
  for (const map of data.query_maps) {
    const flat = map.mean.flat(), least = Math.min(...flat), top = Math.max(...flat);
    heat(byId("maps"), `${map.title} (${percent(least)} to ${percent(top)})`, map.mean,
      (v, l, h) => [shaded(v, least, top), `layer ${l}, query head ${h}\n${percent(v)}` +
        (map.std ? ` ± ${percent(map.std[l][h])} over samples` : "")], null);
  }
}

// The plan that the sliders choose, of those computed in advance.
function showPlan() {
  const { budgets, fetches, cells, quality } = data.plans;
  const b = +byId("budget").value, f = +byId("fetch").value, plan = cells[b][f];
  byId("budget-said").textContent = percent(budgets[b]);
  byId("fetch-said").textContent = fetches[f] === "0" ? "0 (no host memory)" : fetches[f];
  const place = byId("plan"), said = byId("plan-said");
  place.replaceChildren();
  if (plan.error) {
    said.textContent = `No plan: ${plan.error}`;
  } else {
    said.textContent = `${human(plan.resident)} of ${human(plan.dense)} on the device ` +
      `(${percent(plan.resident / plan.dense)}), tables ${human(plan.tables)} once per model, ` +
      `${human(plan.host)} in host memory; a step reads ${human(plan.read)}, at most ` +
      `${human(plan.most)}; ${percent(plan.static)} of heads static; ` +
      (quality[b][f] ? `held-out samples, ${quality[b][f]}.`
        : `expected loss ${plan.loss === null ? "not measured" : percent(plan.loss)}.`);
    const rows = Array.from({ length: data.layers }, (_, l) =>
      Array.from({ length: data.kv_heads }, (_, h) => l * data.kv_heads + h));
    const about = (i, l, h) => `layer ${l}, head ${h}: ${kinds[plan.kinds[i]]}\n` +
      `keeps ${percent(plan.ratios[i])}`;
    const most = Math.max(...plan.ratios);
    heat(place, "Types of this plan", rows,
      (i, l, h) => [`var(--${kinds[plan.kinds[i]]})`, about(i, l, h)], null);
    heat(place, `Shares of this plan (strongest: ${percent(most)})`, rows,
      (i, l, h) => [shaded(plan.ratios[i], 0, most), about(i, l, h)], null);
  }
  const pareto = byId("pareto");
  pareto.replaceChildren();
  const over = (read) => fetches.map((name, k) => ({ name: `reads ${name}`, ...styled(k),
    chosen: k === f, points: budgets.map((_, i) => [cells[i][k], i]).filter(([c]) => !c.error)
      .map(([c, i]) => [c.resident / c.dense, read(c), i === b && k === f])
      .filter((p) => p[1] !== null) }));
  lines(pareto, "Loss over bytes", "share on the device", "expected loss (%)",
    over((c) => c.loss), false);
  lines(pareto, "Reads over bytes", "share on the device", "most a step reads, of dense (%)",
    over((c) => c.most / c.dense), false);
}
heads();
for (const name of ["budget", "fetch"]) byId(name).addEventListener("input", showPlan);
showPlan();
