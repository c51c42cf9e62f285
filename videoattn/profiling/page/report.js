// The page: sections in order, each only where the data have something for it.

const data = JSON.parse(document.getElementById("data").textContent);
const after = data.runs[data.runs.length - 1];
const plots = []; // drawn again when the width changes

function plot(draw) {
  const holder = h("div", { class: "plot" });
  plots.push(() => holder.replaceChildren(draw(Math.max(holder.clientWidth, 280))));
  return holder;
}

function section(id, name, note, ...content) {
  const inside = content.flat().filter(Boolean);
  return inside.length
    ? h(
        "section",
        { id },
        h("div", { class: "rail" }, h("h2", {}, name), note ? h("p", {}, note) : null),
        h("div", { class: "body" }, inside),
      )
    : null;
}

const lead = (said) => h("p", { class: "lead" }, said);
const caption = (name) => h("h3", {}, name);
const facts = (pairs) =>
  h(
    "dl",
    { class: "facts" },
    Object.entries(pairs).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
  );
const by_run = (draw) =>
  data.runs.flatMap((run) => {
    const content = draw(run);
    return content ? [data.runs.length > 1 ? caption(run.name) : null, content] : [];
  });

function figure({ name, value, note }) {
  const [, number, unit] = value.match(/^([^ a-zA-Z%]+|[^ ]+)(.*)$/);
  return h(
    "div",
    { class: "figure" },
    h("dt", {}, name),
    h(
      "dd",
      {},
      h("span", { class: "value" }, number, h("span", { class: "unit" }, unit)),
      h("span", { class: "note" }, note),
    ),
  );
}

function head() {
  const failed = data.checks.filter((check) => !check.passed);
  const passed = data.checks.filter((check) => check.passed);
  const check = (c) => h("li", {}, h("b", {}, c.name), ` ${c.value}, wanted ${c.wanted}`);
  return h(
    "header",
    {},
    h(
      "div",
      { class: "rail" },
      h("p", { class: "brand" }, h("b", {}, "videoattn"), ` ${data.kind}`),
      data.about.map((part) => h("p", {}, breaking(part))),
      after.environment.date ? h("p", {}, after.environment.date) : null,
    ),
    h(
      "div",
      { class: "body" },
      h("h1", {}, data.title),
      data.error
        ? h(
            "div",
            { class: "alarm", role: "alert" },
            h("b", {}, "Partial report. "),
            `The generation broke off, and the figures are of what ran until then. ${data.error}`,
          )
        : null,
      failed.length
        ? h(
            "div",
            { class: "alarm", role: "alert" },
            h("b", {}, failed.length === 1 ? "A check failed" : `${failed.length} checks failed`),
            h("ul", {}, failed.map(check)),
          )
        : null,
      h("p", { class: "verdict" }, data.verdict[0], data.verdict[1] ? h("span", {}, ` ${data.verdict[1]}`) : null),
      h("dl", { class: "figures" }, data.figures.map(figure)),
      passed.length
        ? h(
            "details",
            { class: "passed" },
            h(
              "summary",
              {},
              `${passed.length} ${passed.length === 1 ? "check" : "checks"} passed`,
              h("span", {}, passed.map((c) => c.name).join(", ")),
            ),
            h("ul", {}, passed.map(check)),
          )
        : null,
    ),
  );
}

function exact() {
  const { name, gzip, bytes, without_pictures } = data.exact;
  if (!gzip) return h("p", {}, "The exact JSON is too large for this page: it is written beside it.");
  return h(
    "p",
    {},
    h("a", { class: "download", href: `data:application/gzip;base64,${gzip}`, download: name }, name),
    ` ${digits(bytes / 1000)} kB${without_pictures ? ", without the pictures" : ""}`,
  );
}

document.getElementById("report").replaceChildren(
  ...[
    head(),
    time_section(),
    section("quality", "Quality", "Raw frames, before any codec. Read them against the noise floor.", quality()),
    section("measured", "How it was timed", "Without any instrument.", data.measured ? facts(data.measured) : null),
    section("attention", "Attention", "By kind in the denoisers, then by shape.", by_run(attention)),
    section("sequence", "Sequence length", "Queries of each attention call, in the order of the run.", sequence()),
    section(
      "roofline",
      "Roofline",
      "Ceilings measured on this machine. Bytes as if nothing stayed in a cache.",
      roof(),
    ),
    section("memory", "Memory", "Of tensors on the device, from a pass of its own.", memory()),
    section("frames", "Frames", data.kind === "comparison" ? "The same seed." : "Of the untouched run.", frames()),
    section(
      "io",
      "I/O model",
      "Bytes that the tiling of one call moves, and the least that any exact algorithm moves.",
      by_run(io),
    ),
    section(
      "notes",
      "Notes",
      "",
      data.notes.length
        ? h(
            "ul",
            { class: "notes" },
            data.notes.map((note) => h("li", {}, note)),
          )
        : null,
    ),
    section("arguments", "Arguments", "", Object.keys(after.arguments).length ? facts(after.arguments) : null),
    section("environment", "Environment", "", Object.keys(after.environment).length ? facts(after.environment) : null),
    section("exact", "Exact data", "", exact()),
  ].filter(Boolean),
);

let drawn = 0;
function redraw() {
  if (drawn === document.documentElement.clientWidth) return;
  drawn = document.documentElement.clientWidth;
  plots.forEach((draw) => draw());
}
redraw();
addEventListener("resize", () => requestAnimationFrame(redraw));
addEventListener("beforeprint", () =>
  document.querySelectorAll("details").forEach((details) => (details.open = !details.classList.contains("calls"))),
);
