// Plots. Each is a function of the data and of a width in pixels, and returns an <svg>.

// -------------------------------------------------------------------------------------------------------- stacked bars

// bars: [{name, parts: [{name, key, ms}]}], all on one scale.
function stack(bars, width, onpick) {
  const high = 38;
  const gap = 10;
  const names = bars.length > 1 ? 52 : 0;
  const top = Math.max(...bars.map((bar) => sum(bar.parts)), 1e-9);
  const x = linear(0, top, 0, width - names);
  const marks = bars.flatMap((bar, row) => {
    let at = 0;
    const y = row * (high + gap);
    const label = names ? [text(0, y + high / 2 + 4.5, bar.name, { class: "axis" })] : [];
    return label.concat(
      bar.parts.map((part) => {
        const left = names + x(at);
        const size = Math.max(x(part.ms) - 1.5, 0.75);
        at += part.ms;
        const share = `${whole((100 * part.ms) / (sum(bar.parts) || 1))}%`;
        const long = `${part.name}  ${share}`;
        const said = measure(long, 13, 600) + 18 < size ? long : measure(share, 13, 600) + 12 < size ? share : "";
        const group = s(
          "g",
          { class: "part", style: color(part.key), onclick: () => onpick(part) },
          s("rect", {
            x: left,
            y,
            width: size,
            height: high,
            rx: Math.min(3, size / 2),
            class: part.key === "host" ? "mark idle" : "mark",
          }),
          title(`${part.name}: ${seconds(part.ms)}, ${share}`),
        );
        if (said)
          group.append(text(left + 9, y + high / 2 + 4.5, said, { class: part.key === "host" ? "on-idle" : "on" }));
        return group;
      }),
    );
  });
  const hatch = s(
    "pattern",
    { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    s("rect", { width: 5, height: 5, class: "hatch-ground" }),
    s("rect", { width: 1.4, height: 5, class: "hatch-line" }),
  );
  const height = bars.length * (high + gap) - gap;
  const svg = canvas(
    width,
    height,
    bars
      .map((bar) => `${bar.name} ${bar.parts.map((part) => `${part.name} ${seconds(part.ms)}`).join(", ")}`)
      .join("; "),
  );
  svg.append(s("defs", {}, hatch), ...marks);
  svg.classList.add("stack");
  return svg;
}
const sum = (parts) => parts.reduce((total, part) => total + part.ms, 0);

// ----------------------------------------------------------------------------------------------------- sequence length

// Kinds run side by side, three pixels apart, since two kinds often have the same length.
function steps(view, width) {
  const left = 52;
  const top = 14;
  const labels = view.lines.map((line) => line.label);
  const right = width < 560 ? 12 : Math.max(...labels.map((label) => measure(label, 13))) + 22;
  const lengths = [...new Set(view.lines.flatMap((line) => line.points.map((point) => point[1])))].sort(
    (a, b) => b - a,
  );
  const height = lengths.length === 1 ? 110 : width < 560 ? 240 : 280;
  const bottom = height - 30; // a DiT has one length
  const low = lengths[lengths.length - 1] / 1.6;
  const high = lengths[0] * 1.6;
  const x = linear(0, view.calls, left, width - right);
  const y = log(low, high, bottom, top);
  const svg = canvas(width, height, `Queries of each attention call: ${labels.join(", ")}`);
  let last = -99;
  for (const length of lengths) {
    if (y(length) - last < 15) continue;
    last = y(length);
    svg.append(rule(left, last, width - right, last), text(left - 8, last + 4, whole(length), { class: "axis end" }));
  }
  const wide = view.steps.length > 1 && (width - left - right) / view.steps.length;
  view.steps.forEach((start, i) => {
    if (wide < 6) return;
    svg.append(rule(x(start), top, x(start), bottom, "grid faint"));
    if (i % Math.ceil(34 / wide) === 0)
      svg.append(text(x(start) + 4, bottom + 18, i ? i : "step 0", { class: "axis" }));
  });
  if (!wide)
    for (const call of rounds(view.calls, width < 560 ? 4 : 8))
      svg.append(text(x(call), bottom + 18, whole(call), { class: "axis middle" }));
  const ends = view.lines.map((line, i) => {
    const shift = 3.5 * (i - (view.lines.length - 1) / 2);
    let levels = "";
    let risers = "";
    line.points.forEach(([call, length], j) => {
      const from = px(x(call));
      const to = px(x(j + 1 < line.points.length ? line.points[j + 1][0] : line.end));
      const at = px(y(length) + shift);
      levels += `M${from},${at}H${to}`;
      if (j) risers += `M${from},${px(y(line.points[j - 1][1]) + shift)}V${at}`;
    });
    svg.append(s("path", { d: risers, class: "riser", style: color(line.kind) }));
    svg.append(
      s(
        "path",
        { d: levels, class: "line mark", style: color(line.kind), "data-points": line.points.length },
        title(line.label),
      ),
    );
    return { y: y(line.points[line.points.length - 1][1]) + shift, line };
  });
  if (width >= 560) {
    for (const end of spread(ends, 16, top, bottom)) {
      svg.append(text(width - right + 12, end.y + 4.5, end.line.label, { class: "name", style: color(end.line.kind) }));
    }
  }
  return svg;
}
const px = (value) => Math.round(10 * value) / 10;

// -------------------------------------------------------------------------------------------------- memory over time

// runs: [{name, timeline: [[ms, bytes]], weights_bytes, peak_bytes, peak_ms, peak_module}]; the last is filled.
function area(runs, width) {
  const height = width < 560 ? 230 : 270;
  const left = 58;
  const right = 12;
  const bottom = height - 30;
  const top = 18 + 16 * runs.length;
  const end = Math.max(...runs.map((run) => run.timeline[run.timeline.length - 1][0]), 1e-9);
  const most = Math.max(...runs.map((run) => run.peak_bytes), 1);
  const unit = most >= 2 ** 29 ? 2 ** 30 : 2 ** 20;
  const x = linear(0, end, left, width - right);
  const y = linear(0, most / unit, bottom, top);
  const svg = canvas(
    width,
    height,
    runs.map((run) => `${run.name} memory over time, peak ${gib(run.peak_bytes)} in ${run.peak_module}`).join("; "),
  );
  for (const value of rounds(most / unit, 4)) {
    svg.append(
      rule(left, y(value), width - right, y(value)),
      text(left - 8, y(value) + 4, value ? short(value) : unit < 2 ** 30 ? "0 MiB" : "0 GiB", { class: "axis end" }),
    );
  }
  const clock = end >= 2000 ? [1000, "s"] : [1, "ms"];
  for (const value of rounds(end / clock[0], width < 560 ? 4 : 8)) {
    svg.append(
      text(x(value * clock[0]), bottom + 18, value ? short(value) : `0 ${clock[1]}`, { class: "axis middle" }),
    );
  }
  runs.forEach((run, i) => {
    const now = i === runs.length - 1;
    let path = "";
    run.timeline.forEach(
      ([ms, bytes], j) => (path += j ? `H${px(x(ms))}V${px(y(bytes / unit))}` : `M${px(x(ms))},${px(y(bytes / unit))}`),
    );
    if (now) {
      svg.append(s("path", { d: `${path}V${bottom}H${left}Z`, class: "area" }));
      const base = y(run.weights_bytes / unit);
      svg.append(
        s("rect", {
          x: left,
          y: base,
          width: x(run.timeline[run.timeline.length - 1][0]) - left,
          height: bottom - base,
          class: "weights",
        }),
      );
      if (bottom - base > 20)
        svg.append(text(left + 10, base + 17, `weights ${gib(run.weights_bytes)}`, { class: "weights-name" }));
    }
    svg.append(
      s("path", {
        d: path,
        class: now ? "line mark memory" : "line mark memory before",
        "data-points": run.timeline.length,
      }),
    );
    const cx = x(run.peak_ms);
    const cy = y(run.peak_bytes / unit);
    const end = cx > width / 2;
    svg.append(s("circle", { cx, cy, r: 4, class: now ? "peak mark" : "peak mark before" }));
    const said = `${run.name ? `${run.name}: ` : "peak "}${gib(run.peak_bytes)}`;
    const inside = width < 560 ? "" : `  ${run.peak_module}`;
    svg.append(
      text(cx + (end ? 5 : -5), now ? Math.max(cy - 11, 16 * runs.length - 2) : 14, said + inside, {
        class: `peak-name ${now ? "" : "before"} ${end ? "end" : ""}`,
      }),
    );
  });
  return svg;
}

// ---------------------------------------------------------------------------------------------------- curves by number

// lines: [{name, values: [number or null], dotted}]; y from its least to its greatest value, or from 0.
function curve(lines, width, unit, from_zero) {
  const height = 220;
  const left = 52;
  const right = 12;
  const bottom = height - 30;
  const top = 16;
  const values = lines.flatMap((line) => line.values).filter((value) => value !== null);
  const count = Math.max(...lines.map((line) => line.values.length), 2);
  const spare = 0.08 * (Math.max(...values) - Math.min(...values)) || 1;
  const low = from_zero ? 0 : Math.min(...values) - spare;
  const high = Math.max(...values) + (from_zero ? 0 : spare);
  const x = linear(0, count - 1, left, width - right);
  const y = linear(low, high, bottom, top);
  const svg = canvas(width, height, lines.map((line) => line.name).join(", "));
  const grid = rounds(high, from_zero ? 4 : Math.max(4, Math.ceil((4 * high) / (high - low))));
  for (const value of grid.filter((value) => value >= low)) {
    svg.append(
      rule(left, y(value), width - right, y(value)),
      text(left - 8, y(value) + 4, short(value), { class: "axis end" }),
    );
  }
  svg.append(text(left - 8, top - 4, unit, { class: "axis end" }));
  for (const value of rounds(count - 1, width < 560 ? 4 : 8).filter(Number.isInteger))
    svg.append(text(x(value), bottom + 18, value, { class: "axis middle" }));
  for (const line of lines) {
    let path = "";
    let pen = "M";
    line.values.forEach((value, i) => {
      if (value === null) return void (pen = "M");
      path += `${pen}${px(x(i))},${px(y(value))}`;
      pen = "L";
    });
    if (path)
      svg.append(
        s(
          "path",
          { d: path, class: `line mark ${line.dotted ? "dotted" : "memory"}`, "data-points": line.values.length },
          title(line.name),
        ),
      );
  }
  return svg;
}
