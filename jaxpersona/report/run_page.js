"use strict";
// The figures of the page of a run. All texts of the run are inserted as text, or escaped for Plotly.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const roles = data.roles, own = data.default, layers = data.layers;
  const state = { layer: data.middle, role: -1 };
  const at = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)");
  const FONT = 'system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif';
  const CONFIG = { displayModeBar: false, displaylogo: false, scrollZoom: false };
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up"];
  const NAMED = 40;  // with more roles, only the outermost are named beside their dots

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const known = (value) => value !== null && value !== undefined;
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const cut = (text, most) => {
    const points = Array.from(text);
    return points.length <= most ? text : points.slice(0, most - 1).join("") + "…";
  };
  const shown = (value) => known(value) ? value.toPrecision(4).replace("-", "−") : "–";
  const faded = (hex, alpha) => {
    const part = (i) => parseInt(hex.slice(i, i + 2), 16);
    return `rgba(${part(1)},${part(3)},${part(5)},${alpha})`;
  };
  function wrapped(text, width) {
    const lines = [];
    let line = "";
    for (const word of text.split(/\s+/)) {
      let rest = Array.from(word);
      while (rest.length > width) {
        if (line) { lines.push(line); line = ""; }
        lines.push(rest.slice(0, width).join(""));
        rest = rest.slice(width);
      }
      const short = rest.join("");
      if (line && Array.from(line).length + 1 + rest.length > width) { lines.push(line); line = short; }
      else line = line ? `${line} ${short}` : short;
    }
    return lines.concat(line || []).map(escaped).join("<br>");
  }
  function scores(counts) {
    const names = { None: "undecided", failed: "without a verdict" };
    return data.scores.filter((s) => counts[s]).map((s) => `${counts[s].toLocaleString("en")} ${names[s] || `with score ${s}`}`)
      .join(", ") || "no reply";
  }
  function element(kind, text, className) {
    const made = document.createElement(kind);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  }

  // ---- figures
  function axisOf(title, more) {
    return { title: { text: title, standoff: 8 }, gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line"),
      tickcolor: colour("line"), ticks: "outside", ticklen: 4, automargin: false, fixedrange: true, ...more };
  }
  function draw(id, traces, layout) {
    const box = at(id);
    if (!box) return null;
    const ink = colour("ink");
    const whole = {
      width: box.clientWidth, height: layout.height || box.clientHeight, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: FONT, size: 12, color: ink }, hovermode: "closest", dragmode: false,
      hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), align: "left", font: { family: FONT, size: 12, color: ink } },
      legend: { traceorder: "normal", orientation: "h", x: 0, y: 1, xanchor: "left", yanchor: "bottom", font: { size: 12 } }, ...layout };
    const fresh = !box.data;
    Plotly.react(box, traces, whole, CONFIG);
    return fresh ? box : null;
  }
  const marker = () => ({ type: "line", x0: state.layer, x1: state.layer, y0: 0, y1: 1, yref: "paper", layer: "below",
    line: { color: colour("muted"), width: 1.5, dash: "dash" } });
  function byLayer(id, curves, axis, bands = []) {
    if (!at(id)) return;
    const xs = Array.from({ length: layers }, (_, i) => i);
    const traces = [];
    bands.forEach((band, i) => {
      if (!band) return;
      const plain = { x: xs, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, connectgaps: false };
      traces.push({ ...plain, y: band.low });
      traces.push({ ...plain, y: band.high, fill: "tonexty", fillcolor: faded(colour(`c${i + 1}`), 0.2) });
    });
    curves.forEach(([name, ys], i) => traces.push({
      x: xs, y: ys, name, mode: "lines+markers", connectgaps: false,
      line: { color: colour(`c${i + 1}`), width: 2 }, marker: { size: layers > 40 ? 4 : 6, symbol: SYMBOLS[i % 4] },
      hovertemplate: "layer %{x}: %{y:.4g}<extra></extra>" }));
    const top = curves.length > 1 ? 46 : 12;
    const fresh = draw(id, traces, {
      margin: { l: 52, r: 12, t: top, b: 46 }, shapes: [marker()], showlegend: curves.length > 1,
      xaxis: axisOf("layer", { zeroline: false, range: [-0.5, layers - 0.5], ...(layers <= 12 ? { dtick: 1 } : { nticks: 10 }) }),
      yaxis: axisOf("", axis) });
    if (fresh) fresh.on("plotly_click", (event) => setLayer(event.points[event.points.length - 1].x));
  }
  function curves() {
    if (!data.byLayer) return;
    const share = data.byLayer.variance, bars = data.byLayer.bars;
    const counts = Object.keys(share).sort((a, b) => a - b);
    byLayer("plot-cos", [["|cos(PC1, axis)|", data.byLayer.cos]], { range: [0, 1.03] }, bars ? [bars.cos] : []);
    byLayer("plot-variance", counts.map((n) => [n === "1" ? "PC1" : `PC1 to PC${n}`, share[n]]),
      { range: [0, 1.03], tickformat: ".0%" }, bars ? counts.map((n) => bars.variance[n]) : []);
    if (data.reliability) {
      const lowest = Math.min(0, ...data.reliability.low.filter(known));
      byLayer("plot-reliability", [["mean of the splits", data.reliability.mean]], { range: [lowest * 1.05, 1.03] }, [data.reliability]);
    }
  }

  // Names beside dots: a name is placed on a side where it covers no dot, or else omitted. The names of the
  // default persona and of the marked role may cover dots.
  const pen = document.createElement("canvas").getContext("2d");
  function fitted(text, size, width) {  // shorten a text until it is at most `width` pixels wide
    pen.font = `${size}px ${FONT}`;
    let short = text;
    for (let most = Array.from(text).length; pen.measureText(short).width > width && most > 2; most--) short = cut(text, most - 1);
    return short;
  }
  function sides(points, dots, width, height) {
    pen.font = `11px ${FONT}`;
    const taken = [], found = new Map();
    const meets = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
    for (const point of points) {
      const wide = pen.measureText(point.label).width + 8, tall = 16, gap = point.gap;
      const boxes = {
        "middle right": [point.x + gap, point.y - tall / 2], "middle left": [point.x - gap - wide, point.y - tall / 2],
        "top center": [point.x - wide / 2, point.y - gap - tall], "bottom center": [point.x - wide / 2, point.y + gap] };
      let best = null, least = point.must ? Infinity : 1;
      for (const [side, [x, y]] of Object.entries(boxes)) {
        const box = [x, y, x + wide, y + tall];
        if (box[0] < 0 || box[1] < 0 || box[2] > width || box[3] > height || taken.some((one) => meets(one, box))) continue;
        const covered = dots.filter((dot) => dot !== point.dot && meets([dot.x - dot.r, dot.y - dot.r, dot.x + dot.r, dot.y + dot.r], box)).length;
        if (covered < least) { least = covered; best = [side, box]; }
      }
      if (best) { taken.push(best[1]); found.set(point.dot, best[0]); }
    }
    return found;
  }
  function hover(role, l) {
    const lines = [`<b>${wrapped(cut(role.name, 80), 44)}</b>`];
    if (role.mean && known(role.mean[l])) lines.push(`mean projection ${shown(role.mean[l])}`);
    if (role.counts && !data.unread) lines.push(wrapped(scores(role.counts), 52));
    else lines.push(`${(role.answers || 0).toLocaleString("en")} replies, not scored`);
    if (known(role.reply)) lines.push(wrapped(`“${role.reply}”`, 52));
    return lines.join("<br>");
  }
  function components() {
    const box = at("plot-pca");
    if (!box) return;
    const l = state.layer, ratio = data.pca.ratio;
    const name = (role) => role === own ? "default persona" : cut(role.name.replace(/_/g, " "), box.clientWidth < 560 ? 14 : 24);
    const placed = [...roles, own].filter((one) => one.x && known(one.x[l]) && known(one.y[l]));
    const margin = { l: 56, r: 14, t: 10, b: 50 }, narrow = box.clientWidth < 560;
    const width = box.clientWidth - margin.l - margin.r, height = box.clientHeight - margin.t - margin.b;
    const span = (values, room) => {
      const low = Math.min(...values), high = Math.max(...values), pad = Math.max((high - low) * room, 1e-9);
      return [low - pad, high + pad];
    };
    const xs = span(placed.map((one) => one.x[l]), 0.13), ys = span(placed.map((one) => one.y[l]), 0.1);
    const dots = new Map(placed.map((one) => [one, {
      x: (one.x[l] - xs[0]) / (xs[1] - xs[0]) * width, y: (ys[1] - one.y[l]) / (ys[1] - ys[0]) * height, r: one === own ? 10 : 4 }]));
    const out = (one) => Math.max(Math.abs(dots.get(one).x / width - 0.5), Math.abs(dots.get(one).y / height - 0.5));
    const marked = roles[state.role];
    const first = placed.filter((one) => one === own || one === marked);
    const rest = placed.filter((one) => !first.includes(one)).sort((a, b) => out(b) - out(a));
    const few = roles.length <= NAMED ? rest : rest.slice(0, NAMED);
    const points = [...first, ...few].map((one) => ({ label: name(one), dot: dots.get(one), must: first.includes(one),
      gap: first.includes(one) ? 11 : 6, ...dots.get(one) }));
    const placedSides = sides(points, [...dots.values()], width, height);
    const trace = (members, title, look) => ({
      name: title, mode: "markers+text", x: members.map((one) => one.x[l]), y: members.map((one) => one.y[l]),
      text: members.map((one) => placedSides.has(dots.get(one)) ? escaped(name(one)) : ""),
      textposition: members.map((one) => placedSides.get(dots.get(one)) || "top center"),
      textfont: { size: 11, color: colour("ink") }, hoverinfo: "text", hovertext: members.map((one) => hover(one, l)),
      customdata: members.map((one) => roles.indexOf(one)), cliponaxis: false, ...look });
    const inside = placed.filter((one) => one !== own && one.inAxis), other = placed.filter((one) => one !== own && !one.inAxis);
    const traces = [trace(inside, "role", { marker: { size: 8, color: faded(colour("role"), 0.75) } })];
    if (other.length) traces.push(trace(other, "role not used for the axis", {
      marker: { size: 8, symbol: "circle-open", color: colour("role"), line: { width: 1.6 } } }));
    if (placed.includes(own)) traces.push(trace([own], "default persona", {
      marker: { size: 17, symbol: "star", color: colour("own"), line: { width: 1, color: colour("paper") } },
      textfont: { size: 11, color: colour("own") } }));
    if (placed.includes(marked)) traces.push({ name: "marked role", mode: "markers", x: [marked.x[l]], y: [marked.y[l]], hoverinfo: "skip",
      marker: { size: 17, symbol: "circle-open", color: colour("mark"), line: { width: 2.5 } } });
    const share = (i) => known(ratio[i][l]) ? `, ${(100 * ratio[i][l]).toFixed(0)} %${narrow ? "" : " of the variance"}` : "";
    const fresh = draw("plot-pca", traces, {
      margin, showlegend: false, dragmode: coarse.matches ? false : "zoom", height: box.clientHeight,
      xaxis: axisOf(`PC1 → more Assistant-like${share(0)}`, { range: xs, fixedrange: coarse.matches, zeroline: true }),
      yaxis: axisOf(`PC2${share(1)}`, { range: ys, fixedrange: coarse.matches, zeroline: true }) });
    if (fresh) fresh.on("plotly_click", (event) => setRole(event.points[0].customdata));
    absent("missing-pca", roles.filter((one) => !placed.includes(one)),
      "Not shown, because there is no vector of replies with score 3, or its coordinates are not finite at this layer: ");
  }
  function absent(id, members, text) {
    const box = at(id);
    if (!box) return;
    box.hidden = !members.length;
    const names = members.slice(0, 30).map((one) => cut(one.name, 60)).join(", ");
    box.textContent = text + names + (members.length > 30 ? ` and ${members.length - 30} more` : "") + ".";
  }

  // ---- ranking: a table with one row per role, so that all names are legible and searchable
  function steps(low, high, count) {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((n) => n * power >= rough);
    const found = [];
    for (let i = Math.ceil(low / step); i * step <= high; i++) found.push(+(i * step).toPrecision(12));
    return found;
  }
  const rows = new Map();
  function row(one) {
    if (rows.has(one)) return rows.get(one);
    const line = element("tr"), cells = {};
    for (const name of ["rank", "name", "strip", "value", "z"]) {
      cells[name] = line.appendChild(element("td", undefined, name));
    }
    const label = cells.name.appendChild(element("span", one === own ? "default persona" : one.name.replace(/_/g, " ")));
    label.title = cut(one.name, 300);
    const track = cells.strip.appendChild(element("div", undefined, "track"));
    for (const name of ["band", "range", "dot"]) cells[name] = track.appendChild(element("i", undefined, name));
    if (one === own) line.classList.add("own");
    else {
      cells.dot.classList.toggle("open", !one.inAxis);
      line.addEventListener("click", () => setRole(roles.indexOf(one)));
    }
    rows.set(one, { line, cells });
    return rows.get(one);
  }
  function ranking() {
    const table = at("ranking-table");
    if (!table) return;
    const l = state.layer, ranked = data.order[l].map((i) => roles[i]);
    const lines = ranked.slice();
    if (known(own.mean[l])) {
      const place = ranked.findIndex((one) => one.mean[l] < own.mean[l]);
      lines.splice(place < 0 ? lines.length : place, 0, own);
    }
    const all = lines.flatMap((one) => [one.mean[l], one.p25 && one.p25[l], one.p75 && one.p75[l]]).filter(known);
    let low = Math.min(...all), high = Math.max(...all);
    const pad = Math.max((high - low) * 0.03, 1e-9);
    low -= pad; high += pad;
    const part = (value) => `${(100 * (value - low) / (high - low)).toFixed(2)}%`;
    const bar = (mark, from, to) => {
      mark.hidden = !known(from) || !known(to);
      if (!mark.hidden) { mark.style.left = part(from); mark.style.width = `calc(${part(to)} - ${part(from)})`; }
    };
    const body = table.tBodies[0];
    body.replaceChildren(...lines.map((one) => {
      const { line, cells } = row(one), mean = one.mean[l];
      cells.rank.textContent = one === own ? "★" : String(ranked.indexOf(one) + 1);
      bar(cells.band, own.p25 && own.p25[l], own.p75 && own.p75[l]);
      bar(cells.range, one.p25 && one.p25[l], one.p75 && one.p75[l]);
      cells.dot.style.left = part(mean);
      cells.value.textContent = shown(mean);
      const spread = own.spread && own.spread[l];
      const z = spread && known(own.median[l]) ? (mean - own.median[l]) / spread : null;
      cells.z.textContent = z === null ? "–" : (z < 0 ? "−" : "+") + Math.abs(z).toFixed(1);
      line.classList.toggle("marked", roles[state.role] === one);
      return line;
    }));
    const ticks = at("ranking-ticks"), room = ticks.clientWidth || 300;
    ticks.replaceChildren(...steps(low, high, Math.max(2, room / 60)).map((value) => {
      const tick = element("b", String(value).replace("-", "−"));
      tick.style.left = part(value);
      return tick;
    }));
    absent("missing-ranking", roles.filter((one) => !ranked.includes(one)),
      "Not ranked, because there is no finite mean projection at this layer: ");
  }

  // ---- thresholds
  function thresholds() {
    if (!at("plot-thresholds")) return;
    const l = state.layer, populations = Object.keys(data.thresholds)
      .sort((a, b) => (a !== "default") - (b !== "default"));
    const names = Object.keys(data.thresholds[populations[0]]).sort((a, b) => a.slice(1) - b.slice(1));
    const title = { default: "default persona", all: "all roles and the default persona" };
    const traces = populations.map((of, i) => {
      const table = data.thresholds[of];
      const value = (name, end) => table[name] && table[name][end] ? table[name][end][l] : null;
      const bar = (name, end) => known(value(name, end)) && known(value(name, "value")) ? Math.abs(value(name, end) - value(name, "value")) : 0;
      const inside = names.filter((name) => known(value(name, "value")));
      return {
        name: title[of] || escaped(of), mode: "markers", x: inside.map((name) => value(name, "value")),
        y: inside.map((name) => names.indexOf(name) - (i - (populations.length - 1) / 2) * 0.26),
        marker: { size: 9, symbol: SYMBOLS[i % 4], color: colour(of === "default" ? "own" : "role") }, hoverinfo: "text",
        hovertext: inside.map((name) => `${escaped(name)} of ${title[of] || escaped(of)}: ${shown(value(name, "value"))}`
          + (known(value(name, "low")) ? `<br>95 % interval ${shown(value(name, "low"))} to ${shown(value(name, "high"))}` : "")),
        error_x: { type: "data", symmetric: false, thickness: 2, width: 5, color: colour(of === "default" ? "own" : "role"),
          array: inside.map((name) => bar(name, "high")), arrayminus: inside.map((name) => bar(name, "low")) } };
    });
    draw("plot-thresholds", traces, {
      margin: { l: 50, r: 14, t: 52, b: 50 }, showlegend: true, xaxis: axisOf(`projection onto the axis, layer ${l}`, { zeroline: false }),
      yaxis: axisOf("", { tickvals: names.map((_, i) => i), ticktext: names, range: [-0.6, names.length - 0.4], zeroline: false }) });
    const table = at("threshold-table");
    const head = element("tr");
    head.append(element("th", "percentile"), ...populations.map((of) => element("th", title[of] || of)));
    table.tHead.replaceChildren(head);
    table.tBodies[0].replaceChildren(...names.map((name) => {
      const line = element("tr");
      line.append(element("th", name), ...populations.map((of) => {
        const one = data.thresholds[of][name];
        const ends = one && one.low ? ` (${shown(one.low[l])} to ${shown(one.high[l])})` : "";
        return element("td", (one ? shown(one.value[l]) : "–") + ends);
      }));
      return line;
    }));
  }

  // ---- scores
  const TITLES = { 3: "3 (plays the role fully)", 2: "2 (an AI with some attributes of the role)", 1: "1 (declines the role, but helps)",
    0: "0 (refuses)", None: "undecided", failed: "without a verdict" };
  const judged = roles.map((role, i) => [role, i]).filter(([role]) => role.counts && Object.values(role.counts).some((n) => n > 0));
  const total = (role) => Object.values(role.counts).reduce((a, b) => a + b, 0);
  const part = (role, score) => (role.counts[score] || 0) / total(role);
  judged.sort(([a], [b]) => part(b, "3") - part(a, "3") || part(b, "2") - part(a, "2") || (a.name < b.name ? -1 : 1));
  function scoreBars() {
    const box = at("plot-scores");
    if (!box) return;
    const used = data.scores.filter((score) => judged.some(([role]) => role.counts[score]));
    at("score-key").replaceChildren(...used.map((score) => {
      const key = element("span", undefined, "key");
      const sign = key.appendChild(element("i", undefined, "k-score"));
      sign.style.background = colour(`s${score.toLowerCase()}`);
      key.append(TITLES[score]);
      return key;
    }));
    const narrow = box.clientWidth < 560, ys = judged.map((_, i) => i);
    const traces = used.map((score) => ({
      type: "bar", orientation: "h", name: TITLES[score], y: ys, x: judged.map(([role]) => role.counts[score] || 0),
      marker: { color: colour(`s${score.toLowerCase()}`), line: { width: 0 } }, customdata: judged.map(([, i]) => i), hoverinfo: "text",
      hovertext: judged.map(([role]) => `<b>${wrapped(cut(role.name, 80), 44)}</b><br>${wrapped(scores(role.counts), 52)}`) }));
    const height = judged.length * 19 + 70;
    const fresh = draw("plot-scores", traces, {
      barmode: "stack", bargap: 0.25, height, showlegend: false, margin: { l: narrow ? 118 : 190, r: 16, t: 54, b: 10 },
      xaxis: axisOf("number of replies", { side: "top", zeroline: false }),
      yaxis: axisOf("", { tickvals: ys, range: [judged.length - 0.4, -0.6], ticks: "", showgrid: false, zeroline: false, tickfont: { size: 12 },
        ticktext: judged.map(([role, i]) => {
          const text = escaped(fitted(cut(role.name.replace(/_/g, " "), 60), 12, narrow ? 100 : 170));
          return i === state.role ? `<b>${text}</b>` : text;
        }) }) });
    if (fresh) fresh.on("plotly_click", (event) => setRole(event.points[0].customdata));
  }

  // ---- drift
  function drift() {
    if (!data.drift) return;
    const tint = { uncapped: "c2", capped: "c1" };
    const names = Object.keys(data.drift.arms), look = (name, i) => colour(tint[name] || `c${i % 4 + 1}`);
    const turns = Math.max(...names.map((name) => data.drift.arms[name].mean.length));
    const xs = Array.from({ length: turns }, (_, i) => i + 1);
    const line = (name, i, ys, more) => ({ name: escaped(name), x: xs.slice(0, ys.length), y: ys, mode: "lines+markers", connectgaps: false,
      line: { color: look(name, i), width: 2 }, marker: { size: 7, symbol: SYMBOLS[i % 4] }, ...more });
    const layout = (axis, shapes, last) => ({ margin: { l: 52, r: 12, t: 40, b: 48 }, showlegend: true, shapes,
      xaxis: axisOf("turn", { tickvals: last ? [...xs, turns + 1] : xs, ticktext: last ? [...xs.map(String), "request"] : xs.map(String),
        range: [0.6, turns + (last ? 1.5 : 0.4)] }), yaxis: axisOf("", axis) });
    draw("plot-behaviour", names.flatMap((name, i) => {
      const arm = data.drift.arms[name], look2 = { hovertemplate: `${escaped(name)}, turn %{x}: %{y:.3f}<extra></extra>` };
      return [line(name, i, arm.style, look2), ...(known(arm.leak) ? [{ ...line(name, i, [arm.leak]), x: [turns + 1], mode: "markers",
        showlegend: false, marker: { size: 11, symbol: SYMBOLS[i % 4], color: look(name, i) },
        hovertemplate: `${escaped(name)}, forbidden request: %{y:.3f}<extra></extra>` }] : [])];
    }), layout({ range: [-0.03, 1.03], title: { text: "share" } }, [], true));
    const floor = known(data.drift.floor) ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.drift.floor, y1: data.drift.floor,
      line: { color: colour("muted"), width: 1.5, dash: "dot" } }] : [];
    draw("plot-drift", names.flatMap((name, i) => {
      const arm = data.drift.arms[name], plain = { mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
      return [line(name, i, arm.p25, plain), line(name, i, arm.p75, { ...plain, fill: "tonexty", fillcolor: faded(look(name, i), 0.18) }),
        line(name, i, arm.mean, { hovertemplate: `${escaped(name)}, turn %{x}: %{y:.4g}<extra></extra>` })];
    }), layout({ title: { text: "projection" } }, floor, false));
  }

  // ---- precision by round
  function rounds() {
    if (!data.rounds) return;
    const xs = data.rounds.questions, names = ["axis", "roles"], titles = ["axis", "roles, median"];
    const band = (ys, more) => ({ x: xs, y: ys, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false, connectgaps: false, ...more });
    const traces = names.flatMap((name, i) => {
      const [, low, high] = data.rounds[name];
      return [band(low, {}), band(high, { fill: "tonexty", fillcolor: faded(colour(`c${i + 1}`), 0.18) }),
        { x: xs, y: data.rounds[name][0], name: titles[i], mode: "lines+markers", connectgaps: false, line: { color: colour(`c${i + 1}`), width: 2 },
          marker: { size: 7, symbol: SYMBOLS[i] }, hovertemplate: `${titles[i]}, %{x} questions: %{y:.4f}<extra></extra>` }];
    });
    traces.push({ x: xs, y: data.rounds.settled, name: "settled roles", mode: "lines+markers", line: { color: colour("c3"), width: 2, dash: "dot" },
      marker: { size: 7, symbol: SYMBOLS[2] }, hovertemplate: "settled, %{x} questions: %{y:.0%}<extra></extra>" });
    draw("plot-rounds", traces, { margin: { l: 52, r: 12, t: 46, b: 48 }, showlegend: true,
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: data.rounds.target, y1: data.rounds.target,
        line: { color: colour("muted"), width: 1.5, dash: "dash" } }],
      xaxis: axisOf("questions", { type: "log", tickvals: xs, zeroline: false }), yaxis: axisOf("", { range: [-0.03, 1.03] }) });
  }

  // ---- the marked role, the chosen layer
  function detail() {
    const box = at("detail"), role = roles[state.role];
    if (!box) return;
    box.hidden = !role;
    if (!role) return;
    const l = state.layer, lines = [element("p")];
    lines[0].append(element("strong", role.name));
    if (role.mean) {
      const place = data.order[l].indexOf(state.role);
      lines.push(element("p", known(role.mean[l]) ? `Mean projection ${shown(role.mean[l])} at layer ${l}: rank ${place + 1} of ${data.order[l].length}.`
        : `No finite mean projection at layer ${l}.`));
      lines.push(element("p", role.inAxis ? "Its vector is used for the axis." : role.heldOut ? "It was held out of the axis."
        : "It has too few replies with score 3 for the axis."));
    } else lines.push(element("p", "The last axis of the run does not include this role."));
    if (role.counts && !data.unread) lines.push(element("p", `Replies: ${scores(role.counts)}.`));
    if (known(role.reply)) {
      lines.push(element("p", `“${role.question}”`), element("p", role.reply ? `“${role.reply}”${known(role.score) ? ` (score ${role.score})` : ""}`
        : "(empty reply)"));
    }
    box.replaceChildren(...lines);
  }
  let queued = false;
  function update() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => { queued = false; components(); ranking(); curves(); thresholds(); detail(); });
  }
  function setLayer(layer) {
    state.layer = Math.max(0, Math.min(layers - 1, Math.round(+layer)));
    const text = `${state.layer} of 0–${layers - 1}`;
    at("layer").value = state.layer;
    at("layer").setAttribute("aria-valuetext", `layer ${text}`);
    at("layer-text").textContent = text;
    update();
  }
  function setRole(index) {
    if (!at("role")) return;
    state.role = Number.isInteger(index) && index >= 0 ? index : -1;
    at("role").value = state.role < 0 ? "" : String(state.role);
    update();
    scoreBars();
  }
  function all() { update(); scoreBars(); rounds(); drift(); }

  if (at("layer")) {
    at("layer").addEventListener("input", () => setLayer(at("layer").value));
    roles.map((role, i) => [role.name, i]).sort((a, b) => a[0] < b[0] ? -1 : 1).forEach(([name, i]) => {
      const option = at("role").appendChild(element("option", cut(name.replace(/_/g, " "), 60)));
      option.value = String(i);
    });
    at("role").addEventListener("change", () => setRole(at("role").value === "" ? -1 : +at("role").value));
    setLayer(at("layer").value);  // a browser may keep the slider's value when the page is reloaded
  }
  all();
  dark.addEventListener("change", all);
  let timer = 0, width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return;  // the toolbars of mobile browsers change only the height
    width = innerWidth;
    clearTimeout(timer);
    timer = setTimeout(all, 120);
  });
})();
