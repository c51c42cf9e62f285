// The frames, and in a comparison how far the videos are apart.

const picture = (png, said) => h("img", { src: `data:image/png;base64,${png}`, alt: said });

function frames() {
  if (data.pairs && data.pairs.length) {
    const holder = h("div", { class: "triple" });
    const name = h("output", {});
    const show = (i) => {
      const pair = data.pairs[i];
      name.textContent = `frame ${pair.index}`;
      holder.replaceChildren(
        ...[
          ["before", pair.base],
          ["after", pair.patched],
          ["difference \u00d7 8", pair.difference],
        ].map(([said, png]) =>
          h("figure", {}, picture(png, `${said}, frame ${pair.index}`), h("figcaption", {}, said)),
        ),
      );
    };
    const slider = h("input", {
      type: "range",
      min: 0,
      max: data.pairs.length - 1,
      value: 0,
      step: 1,
      "aria-label": "Frame",
      oninput: (event) => show(Number(event.target.value)),
    });
    show(0);
    return [holder, data.pairs.length > 1 ? h("div", { class: "slider" }, slider, name) : null];
  }
  return after.frames.length
    ? h(
        "div",
        { class: "frames" },
        after.frames.map((png, i) => picture(png, `Frame ${i + 1} of ${after.frames.length}`)),
      )
    : null;
}

const decibel = (value) => (value === null || value === undefined ? "identical" : `${fixed(value, 2)} dB`);

function quality() {
  if (data.kind !== "comparison") return null;
  const rows = data.quality.map((row, i) => ({ ...row, id: i }));
  const show = (name, by, said, more) => ({ name, by, show: (row) => said(by(row)), ...more });
  const known = (said) => (value) => (value === null || value === undefined ? "" : said(value));
  const columns = [
    { name: "Video", show: (row) => row.name },
    show("PSNR", (row) => row.psnr, decibel),
    show("Worst frame", (row) => row.psnr_worst, decibel),
    show(
      "SSIM",
      (row) => row.ssim,
      (value) => fixed(value, 4),
    ),
    show(
      "Worst",
      (row) => row.ssim_worst,
      (value) => fixed(value, 4),
    ),
    show("Flicker", (row) => row.flicker_psnr, decibel, {
      hint: "PSNR of the differences between neighbouring frames",
    }),
    show(
      "Motion",
      (row) => row.motion,
      known((value) => `x${fixed(value, 3)}`),
    ),
  ];
  if (rows.some((row) => row.lpips !== null)) columns.push(show("LPIPS", (row) => row.lpips, known(digits)));
  const lines = [
    { name: "after against before", values: data.psnr.video },
    { name: "noise floor", values: data.psnr.floor, dotted: true },
  ].filter((line) => line.values.some((value) => value !== null));
  const drawn = lines.length
    ? [
        caption("PSNR of each frame"),
        plot((width) => curve(lines, width, "dB")),
        lines.length > 1
          ? h(
              "ul",
              { class: "legend" },
              h("li", {}, h("span", { class: "stroke" }), "after against before"),
              h("li", {}, h("span", { class: "stroke dotted" }), "two exact kernels: less says nothing"),
            )
          : null,
      ]
    : [];
  const latents =
    data.latents.length > 1
      ? [
          caption("Relative L2 of the latents after each step"),
          plot((width) => curve([{ name: "latents", values: data.latents }], width, "", true)),
        ]
      : [];
  return [
    table(columns, rows, { label: "Quality" }),
    h("p", { class: "hint" }, `Control: ${data.control}.${data.lpips_why ? ` No LPIPS: ${data.lpips_why}.` : ""}`),
    h("div", { class: "columns" }, h("div", {}, drawn), h("div", {}, latents)),
  ];
}
