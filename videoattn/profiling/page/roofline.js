// The roofline: its plot, whose labels do not overlap, and its section.

// groups: [{style: "disc", "hollow" or "heavy", points: [{mark, name, key, intensity, ...}], named}]. A point without
// operations stands in a lane at the left, as far below the end of the slope as its bandwidth below that of a copy.
function roofline(ceilings, groups, pairs, width) {
  const small = width < 600;
  const height = small ? 360 : 460;
  const lane = 52;
  const left = small ? 46 : 84;
  const top = 18;
  const bottom = height - 40;
  const right = small ? 14 : 104;
  const all = groups.flatMap((group) => group.points);
  const moving = all.filter((point) => point.intensity > 0);
  const peak = Math.max(...Object.values(ceilings.flops));
  const ridge = peak / ceilings.bandwidth;
  const low = 10 ** Math.floor(Math.log10(Math.min(ridge / 10, ...moving.map((point) => point.intensity)) * 0.9));
  const high = 10 ** Math.ceil(Math.log10(Math.max(ridge * 10, ...moving.map((point) => point.intensity))));
  const start = low * ceilings.bandwidth; // FLOP/s on the slope at the left end
  const lane_y = (point) => low * point.bytes_per_second;
  const least = Math.min(
    start / 2,
    ...moving.map((point) => point.flops_per_second),
    ...all.filter((point) => !point.intensity).map(lane_y),
  );
  const x = log(low, high, left + lane, width - right);
  const y = log(10 ** Math.floor(Math.log10(least)), 10 ** Math.ceil(Math.log10(peak * 1.15)), bottom, top);
  const svg = canvas(width, height, "Roofline: operations per byte against operations per second");
  let ended = all.some((point) => !point.intensity) ? left + lane / 2 + 16 : 0;
  for (const value of decades(low, high)) {
    svg.append(rule(x(value), top, x(value), bottom));
    const half = measure(short(value), 12) / 2 + 4;
    if (x(value) - half < ended) continue;
    ended = x(value) + half;
    svg.append(text(x(value), bottom + 18, short(value), { class: "axis middle" }));
  }
  for (const value of decades(10 ** Math.floor(Math.log10(least)), peak)) {
    svg.append(
      rule(left, y(value), width - right, y(value)),
      text(left - 8, y(value) + 4, scaled(value, small ? "" : "FLOP/s", short), { class: "axis end" }),
    );
  }
  svg.append(
    text(width - right, bottom + 35, "FLOP per byte", { class: "axis end" }),
    rule(left + lane, top, left + lane, bottom, "grid lane"),
  );
  if (all.some((point) => !point.intensity))
    svg.append(text(left + lane / 2, bottom + 18, "none", { class: "axis middle" }));
  const placed = [];
  const ends = [];
  const knee = x(ridge);
  svg.append(s("path", { d: `M${left},${px(y(start))}H${left + lane}L${px(knee)},${px(y(peak))}`, class: "roof" }));
  Object.entries(ceilings.flops)
    .sort((a, b) => b[1] - a[1])
    .forEach(([name, flops]) => {
      svg.append(
        s("path", { d: `M${px(x(flops / ceilings.bandwidth))},${px(y(flops))}H${width - right}`, class: "roof" }),
      );
      if (!small) ends.push({ y: y(flops), name, flops });
    });
  for (const end of spread(ends, 34, top, bottom)) {
    svg.append(
      text(width - right + 10, end.y - 2, end.name, { class: "roof-name" }),
      text(width - right + 10, end.y + 13, scaled(end.flops, "FLOP/s"), { class: "roof-name strong" }),
    );
  }
  const at = (point) =>
    point.intensity ? [x(point.intensity), y(point.flops_per_second)] : [left + lane / 2, y(lane_y(point))];
  for (const [before, after] of pairs) {
    const [a, b] = [at(before), at(after)];
    svg.append(s("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], class: "move", style: color(after.key) }));
  }
  const most = Math.max(...all.map((point) => point.ms), 1e-9);
  const total = sum(groups.find((group) => group.named).points);
  const labels = [];
  for (const group of groups) {
    for (const point of group.points) {
      const [cx, cy] = at(point);
      const r = group.style === "heavy" ? 3.5 : 4 + 9 * Math.sqrt(point.ms / most);
      const rates = `${scaled(point.flops_per_second, "FLOP/s")}, ${scaled(point.bytes_per_second, "B/s")}`;
      const said = `${point.name}: ${digits(point.intensity)} FLOP/B, ${rates}`;
      svg.append(
        s("circle", { cx, cy, r: px(r), class: `point mark ${group.style}`, style: color(point.key) }, title(said)),
      );
      placed.push({ x: cx - r, y: cy - r, w: 2 * r, h: 2 * r });
      if (!group.named || point.ms < 0.004 * total) continue;
      const marked = small || group.style === "heavy";
      const same =
        marked &&
        labels.find(
          (label) => label.marked && label.point.key === point.key && Math.hypot(label.cx - cx, label.cy - cy) < 6,
        );
      if (same) same.said += `, ${point.mark}`;
      else labels.push({ point, cx, cy, r, marked, said: marked ? point.mark : point.name });
    }
  }
  svg.append(along([left + lane, y(start)], [knee, y(peak)], `copies ${scaled(ceilings.bandwidth, "B/s")}`, placed));
  labels.sort((a, b) => b.point.ms - a.point.ms);
  const bounds = { x: left, y: top - 6, w: width - right - left, h: bottom - top + 4 };
  const lines = [...trail(left, y(start), left + lane, y(start)), ...trail(left + lane, y(start), knee, y(peak))];
  for (const flops of Object.values(ceilings.flops))
    lines.push(...trail(x(flops / ceilings.bandwidth), y(flops), width - right, y(flops)));
  for (const label of labels)
    svg.append(...(beside(label, placed, bounds, 40, lines) || beside(label, placed, bounds, 260) || []));
  return svg;
}

// A name along a line from a to b, above it, where no point is in its way.
function along(a, b, said, placed) {
  const turn = Math.atan2(b[1] - a[1], b[0] - a[0]);
  const whole = Math.hypot(b[0] - a[0], b[1] - a[1]);
  const w = measure(said, 12);
  const boxes = (share) =>
    Array.from({ length: 12 }, (_, i) => {
      const far = share * (whole - w) + (i / 11) * w;
      return { x: a[0] + far * Math.cos(turn) - 8, y: a[1] + far * Math.sin(turn) - 20, w: 14, h: 16, text: true };
    });
  const share =
    [0.45, 0.6, 0.3, 0.75, 0.15, 0.9, 0].find((share) =>
      boxes(share).every((box) => placed.every((other) => !overlap(box, other))),
    ) ?? 0.45;
  placed.push(...boxes(share));
  const x = a[0] + share * (whole - w) * Math.cos(turn) + 7 * Math.sin(turn);
  const y = a[1] + share * (whole - w) * Math.sin(turn) - 7 * Math.cos(turn);
  return text(x, y, said, { class: "roof-name", transform: `rotate(${(turn * 180) / Math.PI} ${x} ${y})` });
}

// A line as small boxes.
function trail(x1, y1, x2, y2) {
  const count = Math.ceil(Math.hypot(x2 - x1, y2 - y1) / 4);
  return Array.from({ length: count + 1 }, (_, i) => ({
    x: x1 + ((x2 - x1) * i) / (count || 1) - 2,
    y: y1 + ((y2 - y1) * i) / (count || 1) - 2,
    w: 4,
    h: 4,
  }));
}

const overlap = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;

// The nearest free place for the label of a point, with a line to it where that is not at its side.
function beside({ point, cx, cy, r, said }, placed, bounds, reach, lines = []) {
  const w = measure(said, 13, 600) + 2;
  const h = 16;
  const free = (box) =>
    box.x >= bounds.x &&
    box.y >= bounds.y &&
    box.x + box.w <= bounds.x + bounds.w &&
    box.y + box.h <= bounds.y + bounds.h &&
    placed.every((other) => !overlap(box, other)) &&
    lines.every((other) => !overlap(box, other));
  for (let far = 5; far < reach; far += 7) {
    for (const turn of [0, 180, -60, 60, -120, 120, -90, 90, -30, 30, -150, 150, -75, 75, -105, 105]) {
      const dx = Math.cos((turn * Math.PI) / 180);
      const dy = Math.sin((turn * Math.PI) / 180);
      const x = cx + dx * (r + far);
      const y = cy + dy * (r + far);
      const box = {
        x: dx > 0.3 ? x : dx < -0.3 ? x - w : x - w / 2,
        y: dy > 0.6 ? y : dy < -0.6 ? y - h : y - h / 2,
        w,
        h,
      };
      // The line to it in small boxes: it crosses no other label, and no later label lies on it.
      const leader =
        far > 12 ? trail(cx + dx * (r + 2), cy + dy * (r + 2), cx + dx * (r + far - 3), cy + dy * (r + far - 3)) : [];
      if (!free(box) || leader.some((part) => placed.some((other) => other.text && overlap(part, other)))) continue;
      placed.push({ ...box, text: true }, ...leader);
      const marks = [text(box.x + 1, box.y + 12.5, said, { class: "point-name", style: color(point.key) })];
      if (far > 12) marks.unshift(rule(cx + dx * r, cy + dy * r, x - 2 * dx, y - 2 * dy, "leader"));
      return marks;
    }
  }
  return null;
}

// ------------------------------------------------------------------------------------------------------------ section

function roof() {
  const runs = data.runs.filter((run) => run.roofline && run.roofline.categories.length);
  if (!runs.length) return null;
  const letter = (points) => points.map((point, i) => ({ ...point, mark: String.fromCharCode(65 + (i % 26)) }));
  const number = (points) => points.map((point, i) => ({ ...point, mark: String(i + 1), key: "heavy" }));
  const last = runs[runs.length - 1].roofline;
  const categories = letter(last.categories);
  const heavy = number(last.heaviest);
  const earlier = runs.length > 1 ? letter(runs[0].roofline.categories) : [];
  const groups = [
    { style: "hollow", points: earlier },
    { style: "disc", points: categories, named: true },
  ];
  if (runs.length === 1) groups.push({ style: "heavy", points: heavy, named: true });
  const pairs = earlier.flatMap((before) =>
    categories.filter((point) => point.name === before.name).map((point) => [before, point]),
  );
  const rows = [...categories, ...(runs.length === 1 ? heavy : [])].map((point) => ({
    ...point,
    id: point.mark,
    roof: point.roof ? point.flops_per_second / point.roof : point.bytes_per_second / last.bandwidth,
  }));
  const key = table(
    [
      {
        name: "Point",
        show: (row) => [
          h("span", { class: row.key === "heavy" ? "badge heavy" : "badge", style: color(row.key) }, row.mark),
          row.key === "heavy" ? path(row.name) : h("span", { class: "row-name" }, row.name),
        ],
      },
      column(
        "FLOP/B",
        (row) => row.intensity,
        (value) => (value ? digits(value) : "none"),
      ),
      column(
        "TFLOP/s",
        (row) => row.flops_per_second / 1e12,
        (value) => (value ? digits(value) : ""),
      ),
      column("GB/s", (row) => row.bytes_per_second / 1e9, digits),
      column(
        "% of roof",
        (row) => row.roof,
        (value) => whole(100 * value),
      ),
      column("ms", (row) => row.ms, aligned(rows.map((row) => row.ms))),
    ],
    rows,
    { label: "Points of the roofline" },
  );
  const shown =
    runs.length > 1
      ? h(
          "ul",
          { class: "legend" },
          h("li", {}, h("span", { class: "dot hollow" }), "before"),
          h("li", {}, h("span", { class: "dot" }), "after"),
        )
      : h(
          "ul",
          { class: "legend" },
          h("li", {}, h("span", { class: "dot" }), "category, as large as its time"),
          h("li", {}, h("span", { class: "dot small" }), "one of the ten heaviest operators, by number"),
        );
  const ceilings = h(
    "p",
    { class: "hint narrow" },
    `Ceilings: ${Object.entries(last.flops)
      .map(([name, flops]) => `${name} ${scaled(flops, "FLOP/s")}`)
      .join(", ")}, copies ${scaled(last.bandwidth, "B/s")}.`,
  );
  return [
    shown,
    plot((width) => roofline(last, groups, pairs, width)),
    ceilings,
    h("details", { open: innerWidth < 640 }, h("summary", {}, `The ${rows.length} points as a table`), key),
  ];
}
