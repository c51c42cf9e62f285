// Tables that sort by a click on a column, and whose rows open. They redraw as a whole: a page has a few hundred rows.

// columns: [{name, show(row) -> text or node, by(row) -> value or null, wide, hint}]; the first is the row's name.
// rows: [{id, children: [row] or undefined}]; options: {label, by, limit, up}.
function table(columns, rows, options = {}) {
  const state = { by: options.by ?? -1, down: !options.up, open: new Set(), shown: options.limit || 1e9 };
  const body = h("tbody");
  const head = h("tr");
  const root = h("table", { "aria-label": options.label }, h("thead", {}, head), body);
  const holder = h("div", { class: "table" }, root);

  const sorted = (list) => {
    if (state.by < 0) return list;
    const by = columns[state.by].by;
    const sign = state.down ? -1 : 1;
    const key = (row) => by(row) ?? (typeof by(list[0]) === "string" ? "" : -Infinity);
    return list
      .map((row, i) => [key(row), i, row])
      .sort(
        (a, b) => Boolean(a[2].rest) - Boolean(b[2].rest) || (a[0] < b[0] ? -sign : a[0] > b[0] ? sign : a[1] - b[1]),
      )
      .map((entry) => entry[2]);
  };
  const toggle = (id) => {
    if (!state.open.delete(id)) state.open.add(id);
    draw(id);
  };
  function line(row, level) {
    const opens = Boolean(row.children && row.children.length);
    const open = state.open.has(row.id);
    const cells = columns.map((column, i) => {
      let content = column.show(row);
      if (!i && opens)
        content = h(
          "button",
          { class: "expand", "aria-expanded": String(open), "data-id": row.id, onclick: () => toggle(row.id) },
          content,
        );
      const empty = content === null || content === undefined || content === "";
      return h(
        i ? "td" : "th",
        {
          scope: i ? undefined : "row",
          class: [i ? (column.wide ? "text" : "number") : "", empty ? "empty" : ""].join(" ").trim() || undefined,
          "data-label": i ? column.name : undefined,
        },
        empty ? "" : content,
      );
    });
    return h("tr", { class: `level-${level}`, "data-row": row.id }, cells);
  }
  function draw(focus) {
    head.replaceChildren(
      ...columns.map((column, i) => {
        const now = state.by === i;
        const order = now ? (state.down ? "descending" : "ascending") : undefined;
        const pick = () => {
          state.down = now ? !state.down : typeof column.by(rows[0] || {}) !== "string";
          state.by = i;
          draw(`sort ${i}`);
        };
        const name =
          column.by && rows.length > 1
            ? h("button", { class: "sort", "data-id": `sort ${i}`, title: column.hint, onclick: pick }, column.name)
            : h("span", { title: column.hint }, column.name);
        return h(
          "th",
          { scope: "col", class: i ? (column.wide ? "text" : "number") : undefined, "aria-sort": order },
          name,
        );
      }),
    );
    const lines = [];
    const visit = (list, level) => {
      for (const row of level ? sorted(list) : sorted(list).slice(0, state.shown)) {
        lines.push(line(row, level));
        if (row.children && state.open.has(row.id)) visit(row.children, level + 1);
      }
    };
    visit(rows, 0);
    if (rows.length > state.shown) {
      const more = h(
        "button",
        {
          class: "more",
          "data-id": "more",
          onclick: () => {
            state.shown += options.limit;
            draw("more");
          },
        },
        `Show ${whole(Math.min(options.limit, rows.length - state.shown))} more of ${whole(rows.length)}`,
      );
      lines.push(h("tr", { class: "tail" }, h("td", { colspan: columns.length }, more)));
    }
    body.replaceChildren(...lines);
    if (focus)
      [...root.querySelectorAll("[data-id]")]
        .find((button) => button.dataset.id === focus)
        ?.focus({ preventScroll: true });
  }
  draw();
  holder.toggle = toggle;
  return holder;
}

const swatch = (key) =>
  h("span", { class: key === "host" ? "swatch idle" : "swatch", style: color(key), "aria-hidden": "true" });
const named = (key, name) => [swatch(key), h("span", { class: "row-name" }, name)];
// A long name may break after its dots, and where a word begins.
const breaking = (name) =>
  String(name)
    .split(/(?<=[._/])|(?<=[a-z])(?=[A-Z])/)
    .flatMap((part, i) => (i ? [h("wbr"), part] : [part]));
const path = (name) => h("code", { class: "path", title: name }, breaking(name));
const bar = (share, content) =>
  h(
    "span",
    { class: "with-bar" },
    h(
      "span",
      { class: "gauge" },
      h("span", { class: "tiny", style: `width: ${Math.max(0, Math.min(1, share)) * 100}%` }),
    ),
    h("span", {}, content),
  );
const column = (name, by, show, more = {}) => ({
  name,
  by,
  show: (row) => (by(row) === null || by(row) === undefined ? "" : show(by(row), row)),
  ...more,
});
// Decimals that fit the greatest of the values, so that a column lines up.
const aligned = (values) => {
  const most = Math.max(...values.filter((value) => value !== null && value !== undefined), 0);
  const places = most >= 100 ? 1 : most >= 10 ? 2 : 3;
  const least = 0.5 * 10 ** -places;
  return (value) => (value > 0 && value < least ? `< ${fixed(10 ** -places, places)}` : fixed(value, places));
};
