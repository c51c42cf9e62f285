// Attention by kind, by shape and call by call; its sequence length over the run; its bytes by the I/O model.

const shape_of = (row) =>
  h("span", { class: "shape" }, [row.batch, row.heads, row.q_len, row.kv_len, row.head_dim].join(" \u00d7 "));
const kind_of = (row) => named(row.kind, row.kind || "unknown");
const kind_column = { name: "Kind", by: (row) => row.kind, show: kind_of };
const shape_column = {
  name: "B \u00d7 H \u00d7 Nq \u00d7 Nk \u00d7 D",
  by: (row) => row.batch * row.heads * row.q_len * row.kv_len * row.head_dim,
  show: shape_of,
  wide: true,
};
const backend_column = { name: "Backend", by: (row) => row.backend, show: (row) => row.backend, wide: true };

function shapes(run) {
  if (!run.shapes.length) return null;
  const ms = aligned(run.shapes.map((row) => row.ms));
  const rows = run.shapes.map((row, i) => ({ ...row, id: i }));
  return table(
    [
      kind_column,
      backend_column,
      shape_column,
      column("Calls", (row) => row.calls, whole),
      column("ms", (row) => row.ms, ms),
      column("Share", (row) => row.share, percent),
      column("TFLOP/s", (row) => row.tflops, digits),
      column("GB/s", (row) => row.gbs, digits),
      column("Padding", (row) => row.padding_waste, percent, { hint: "Share of the kernel's tiles that is padding" }),
      column("\u00d7 bound", (row) => row.over_bound, digits, {
        hint: "Bytes that the tiling moves over the least that any exact algorithm moves",
      }),
    ],
    rows,
    { label: "Attention by shape", by: 4, limit: 30 },
  );
}

function kinds(run) {
  if (!run.kinds.length) return null;
  const cheapest = Math.min(...run.kinds.map((row) => row.ms_per_tflop).filter(Boolean));
  const ms = aligned(run.kinds.map((row) => row.ms));
  const rows = run.kinds.map((row) => ({ ...row, id: row.kind }));
  return table(
    [
      { name: "Kind", by: (row) => row.label, show: (row) => named(row.kind, row.label) },
      column("Calls", (row) => row.calls, whole),
      column("ms", (row) => row.ms, ms),
      column("TFLOP", (row) => row.flops / 1e12, digits),
      column("ms per TFLOP", (row) => row.ms_per_tflop || null, digits),
      column(
        "\u00d7 cheapest",
        (row) => (row.ms_per_tflop ? row.ms_per_tflop / cheapest : null),
        (value) => fixed(value, 1),
      ),
      column("GB", (row) => row.bytes / 1e9, digits),
      column("Layout GB", (row) => row.layout_bytes / 1e9, digits, {
        hint: "Moved by copies in the attention module around the calls",
      }),
      {
        name: "Queries",
        by: (row) => Math.max(...row.q_lens),
        show: (row) =>
          row.q_lens.length > 4
            ? `${whole(Math.min(...row.q_lens))} to ${whole(Math.max(...row.q_lens))}`
            : row.q_lens.map(whole).join(", "),
        wide: true,
      },
    ],
    rows,
    { label: "Attention by kind", by: 2 },
  );
}

function single_calls(run) {
  const calls = run.calls;
  if (!calls.total) return null;
  const listed = calls.number.length;
  const name =
    listed < calls.total
      ? `The longest ${whole(listed)} of ${whole(calls.total)} calls; all are in the exact JSON`
      : `All ${whole(calls.total)} calls, one by one`;
  const holder = h("details", { class: "calls" }, h("summary", {}, name));
  holder.addEventListener("toggle", () => {
    if (holder.children.length > 1) return;
    const rows = calls.number.map((number, i) => {
      const shape = run.shapes[calls.shape[i]];
      const ms = calls.ms[i];
      const rate = shape.ms && ms ? shape.ms / shape.calls / ms : 0; // of the mean of its shape
      return {
        ...shape,
        id: number,
        number,
        ms,
        step: calls.step[i],
        branch: calls.branch[i],
        site: calls.sites[calls.site[i]],
        tflops: shape.tflops * rate,
        gbs: shape.gbs * rate,
        share: ms / (run.total_ms || 1),
      };
    });
    holder.append(
      table(
        [
          { name: "Site", by: (row) => row.site, show: (row) => path(row.site) },
          column("Call", (row) => row.number, whole),
          column(
            "Step",
            (row) => row.step,
            (step, row) => (step < 0 ? "" : `${step}, branch ${row.branch}`),
            { wide: true },
          ),
          { ...kind_column, wide: true },
          shape_column,
          backend_column,
          column("ms", (row) => row.ms, aligned(calls.ms)),
          column("TFLOP/s", (row) => row.tflops, digits),
          column("GB/s", (row) => row.gbs, digits),
          column("Share", (row) => row.share, percent),
        ],
        rows,
        { label: "Attention calls", by: 1, up: true, limit: 100 },
      ),
    );
  });
  return holder;
}

function attention(run) {
  const ratio = run.temporal_per_flop;
  const said = ratio
    ? `Temporal attention takes ${digits(ratio)} times as long for a FLOP as spatial attention.`
    : null;
  const parts = [kinds(run), shapes(run), single_calls(run)].filter(Boolean);
  return parts.length ? h("div", { class: "group" }, said ? lead(said) : null, parts) : null;
}

function sequence() {
  if (!after.sequence.length) return null;
  let view = after.sequence[0];
  const holder = plot((width) => steps(view, width));
  const draw = plots[plots.length - 1];
  const buttons = after.sequence.map((choice, i) =>
    h(
      "button",
      {
        "aria-pressed": String(!i),
        onclick: () => {
          view = choice;
          buttons.forEach((button, j) => button.setAttribute("aria-pressed", j === i));
          draw();
        },
      },
      `${choice.name}, ${whole(choice.calls)} calls`,
    ),
  );
  const legend = h(
    "ul",
    { class: "legend narrow" },
    after.sequence[0].lines.map((line) => h("li", {}, named(line.kind, line.label))),
  );
  return [
    buttons.length > 1 ? h("div", { class: "switch", role: "group", "aria-label": "Part of the run" }, buttons) : null,
    holder,
    legend,
  ];
}

function io(run) {
  if (!run.io.length) return null;
  const large = (bytes) => `${digits(bytes / 1e9)}`;
  return table(
    [
      kind_column,
      shape_column,
      {
        name: "Tile",
        by: (row) => row.block_m * row.block_n,
        show: (row) => `${row.block_m} \u00d7 ${row.block_n}`,
        wide: true,
      },
      column("SM, GB", (row) => row.sm_bytes, large, { hint: "Between L2 and the multiprocessors, one call" }),
      column("bound", (row) => row.sm_bound, large),
      column("\u00d7", (row) => row.sm_bytes / row.sm_bound, digits),
      column("HBM, GB", (row) => row.hbm_bytes, large, { hint: "Between memory and L2, one call" }),
      column("bound", (row) => row.hbm_bound, large),
      column("\u00d7", (row) => row.hbm_bytes / row.hbm_bound, digits),
      { name: "Regime", by: (row) => row.regime, show: (row) => row.regime, wide: true },
    ],
    run.io.map((row, i) => ({ ...row, id: i })),
    { label: "Bytes of attention by the I/O model", by: 3, limit: 30 },
  );
}
