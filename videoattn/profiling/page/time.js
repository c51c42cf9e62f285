// Where the time goes: by category, and in a comparison before and after.

function nodes(run) {
  return run.categories.map((category) => ({
    ...category,
    id: category.name,
    children: category.modules.map((module) => ({
      ...module,
      id: `${category.name}/${module.name}`,
      children: (module.operators || []).map((operator) => ({
        ...operator,
        id: `${category.name}/${module.name}/${operator.name}`,
        share: operator.ms / (run.total_ms || 1),
        operator: true,
      })),
    })),
  }));
}

function time(run) {
  const rows = nodes(run);
  const ms = aligned(rows.map((row) => row.ms));
  if (!rows.length) return null;
  const most = Math.max(...rows.map((row) => row.share));
  const first = {
    name: "Category",
    by: (row) => row.name,
    show: (row) =>
      row.key
        ? named(row.key, row.name)
        : row.operator
          ? h("code", { class: "operator", title: row.name }, row.name)
          : path(row.name),
  };
  return table(
    [
      first,
      column("Calls", (row) => row.calls, whole),
      column("ms", (row) => row.ms, ms),
      column(
        "Share",
        (row) => row.share,
        (share, row) => (row.key ? bar(share / most, percent(share)) : percent(share)),
      ),
      column(
        "TFLOP",
        (row) => row.flops && row.flops / 1e12,
        (value) => (value ? digits(value) : ""),
      ),
      column(
        "GB",
        (row) => row.bytes && row.bytes / 1e9,
        (value) => (value ? digits(value) : ""),
        { hint: "Inputs read once and outputs written once, as if nothing stayed in a cache" },
      ),
      column(
        "FLOP/B",
        (row) => row.intensity,
        (value) => (value ? digits(value) : ""),
      ),
      column(
        "% of roof",
        (row) => row.roof,
        (value) => whole(100 * value),
        { hint: "Of what the measured ceilings allow at this intensity" },
      ),
    ],
    rows,
    { label: "Time by category", by: 2 },
  );
}

function deltas() {
  const rows = data.deltas.map((delta) => ({
    ...delta,
    id: delta.name,
    children: delta.modules.map((module) => ({ ...module, id: `${delta.name}/${module.name}` })),
  }));
  const ms = aligned(rows.flatMap((row) => [row.before, row.after]));
  const ratio = (row) => (row.before && row.after ? row.before / row.after : null);
  return table(
    [
      { name: "Category", by: (row) => row.name, show: (row) => (row.key ? named(row.key, row.name) : path(row.name)) },
      column("Before, ms", (row) => row.before, ms),
      column("After, ms", (row) => row.after, ms),
      column(
        "Saved, ms",
        (row) => row.before - row.after,
        (value) => (value < 0 ? `\u2212${ms(-value)}` : ms(value)),
      ),
      column("Speed-up", ratio, (value) => `${fixed(value, 2)}x`),
    ],
    rows,
    { label: "Time by category, before and after", by: 1 },
  );
}

function time_section() {
  const holder = data.kind === "comparison" ? deltas() : time(after);
  const bars =
    data.kind === "comparison"
      ? ["before", "after"].map((name) => ({
          name,
          parts: data.deltas.map((delta) => ({ ...delta, ms: delta[name] })).filter((part) => part.ms),
        }))
      : [{ name: "", parts: after.categories }];
  const pick = (part) => {
    holder.toggle(part.name);
    [...holder.querySelectorAll("tr")]
      .find((row) => row.dataset.row === part.name)
      ?.scrollIntoView({ block: "nearest" });
  };
  const clock = after.clock === "device" ? "Time of the GPU" : "Time of the CPU";
  const note =
    data.kind === "comparison"
      ? "Each side sums to its untouched wall time. A row opens to its modules."
      : `${clock}, nothing counted twice. A row opens to its modules, a module to its operators.`;
  return section(
    "time",
    "Where the time goes",
    note,
    bars.some((bar) => bar.parts.length) ? plot((width) => stack(bars, width, pick)) : null,
    holder,
  );
}
