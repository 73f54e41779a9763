// Draws the figures when they come into view, in the colours of the theme.
(() => {
  const plots = [...document.querySelectorAll(".plot")];
  if (!plots.length) return;
  let ready = null;

  // Plotly is large: it is unpacked behind the first paint, once.
  const load = () => ready ??= Report.text("plotly").then((code) => {
    document.head.append(Object.assign(document.createElement("script"), { textContent: code }));
    return Report.json("charts");
  });

  // Rows that a legend takes beyond its first: they must not come out of the plot.
  const moreRows = (names, width) => {
    const widest = Math.max(...names.map((name) => 7 * name.length + 48));
    return Math.ceil(names.length / Math.max(1, Math.floor((width - 60) / widest))) - 1;
  };

  const themed = (figure, width) => {
    const ink = Report.colour("--ink-2"), line = Report.colour("--line");
    const palette = [0, 1, 2, 3, 4, 5].map((i) => Report.colour(`--c${i}`));
    const data = figure.data.map((trace) => {
      if (trace.type === "heatmap") {
        return { ...trace, colorscale: [[0, Report.colour("--heat-0")], [0.5, Report.colour("--heat-1")],
                                        [1, Report.colour("--heat-2")]] };
      }
      const color = palette[(trace.meta?.colour || 0) % palette.length];
      return { ...trace, line: { ...trace.line, color }, marker: { ...trace.marker, color } };
    });
    const narrow = innerWidth < 700;
    const axis = { gridcolor: line, linecolor: line, zeroline: false, automargin: true,
                   title: { standoff: 6, font: { size: 12 } } };
    const merge = (given = {}) => ({ ...axis, ...given,
                                     title: { ...axis.title, ...(given.title || {}) } });
    const heat = data[0].type === "heatmap";
    const named = heat ? [] : data.filter((trace) => trace.showlegend !== false);
    const layout = { ...figure.layout,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: Report.colour("--sans"), size: 12, color: ink },
      hoverlabel: { bgcolor: Report.colour("--card"), bordercolor: line,
                    font: { color: Report.colour("--ink") } },
      xaxis: { ...merge(figure.layout.xaxis), showgrid: false },
      yaxis: { ...merge(figure.layout.yaxis), showgrid: !heat },
      shapes: (figure.layout.shapes || []).map((shape) => ({ ...shape,
        line: { ...shape.line, color: Report.colour("--card") } })),
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      showlegend: named.length > 1,
      margin: { l: 8, r: heat ? 8 : 14, t: 8, b: 8 },
      height: (narrow ? 260 : 300)
        + (named.length > 1 ? 19 * moreRows(named.map((trace) => trace.name), width) : 0),
      hovermode: heat ? "closest" : "x unified",
    };
    return [data, layout, { responsive: true, displayModeBar: false }];
  };

  const draw = async (plot) => {
    const figures = await load();
    await Plotly.react(plot, ...themed(figures[plot.dataset.chart], plot.clientWidth));
    plot.dataset.drawn = "yes";
  };

  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((one) => one.isIntersecting)) {
      watch.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "300px" });
  requestAnimationFrame(() => setTimeout(() => plots.forEach((plot) => watch.observe(plot))));
  Report.dark.addEventListener("change", () => plots.filter((plot) => plot.dataset.drawn).forEach(draw));
  addEventListener("beforeprint", () => plots.forEach(draw));
})();
