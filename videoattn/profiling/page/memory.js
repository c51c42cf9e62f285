// Memory over time, and what was alive at the peak.

function memory() {
  const runs = data.runs
    .filter((run) => run.memory && run.memory.timeline.length)
    .map((run) => ({ ...run.memory, name: run.name }));
  if (!runs.length) return null;
  const last = runs[runs.length - 1];
  const total = Object.values(last.kinds).reduce((a, b) => a + b, 0) || 1;
  const parts = Object.entries(last.kinds).filter(([, bytes]) => bytes);
  const split = h(
    "p",
    { class: "lead" },
    `Alive at the peak: ${parts.map(([what, bytes]) => `${gib(bytes)} ${what}`).join(", ")}.`,
  );
  const most = Math.max(...last.alive.map((row) => row.bytes), 1);
  const alive = table(
    [
      { name: "Alive at the peak", by: (row) => row.module, show: (row) => path(row.module) },
      { name: "What", by: (row) => row.what, show: (row) => row.what, wide: true },
      column(
        "Memory",
        (row) => row.bytes,
        (bytes) => bar(bytes / most, gib(bytes)),
      ),
      column("Share", (row) => row.bytes / total, percent),
    ],
    last.alive.map((row, i) => ({ ...row, id: i })),
    { label: "Alive at the peak", by: 2 },
  );
  const more = last.alive_more.count
    ? h("p", { class: "hint" }, `and ${last.alive_more.count} more with ${gib(last.alive_more.bytes)}`)
    : null;
  const modules = last.modules.length
    ? table(
        [
          { name: "While it ran", by: (row) => row.module, show: (row) => path(row.module) },
          column("Peak", (row) => row.peak_bytes, gib),
          column("Allocated itself", (row) => row.allocated_bytes, gib),
        ],
        last.modules.map((row) => ({ ...row, id: row.module })),
        { label: "Peak by module", by: 1 },
      )
    : null;
  return [
    plot((width) => area(runs, width)),
    parts.length ? split : null,
    h("div", { class: "columns" }, h("div", {}, last.alive.length ? alive : null, more), modules),
  ];
}
