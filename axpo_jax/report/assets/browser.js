// The list of trajectories: filtered, and only as many lines in the page as are seen.
(async () => {
  const { make } = Report;
  const list = document.getElementById("list");
  if (!list) return;
  const ROW = 62, SPARE = 8;
  const [GROUP, PLACE, REWARD, CALLS, ERRORS, KIND, ANSWER] = [0, 1, 2, 3, 4, 5, 6];
  const form = document.getElementById("filters"), sizer = list.firstElementChild;
  const index = await Report.json("index");
  let shown = [], at = -1, open = null;

  const fill = (name, values) => {
    const select = form.elements[name];
    select.append(...values.map((value) => make("option", {}, value)));
    if (values.length < 2) select.parentElement.hidden = true;
  };
  fill("at", [...new Set(index.groups.map((group) => group.at))]);
  fill("category", [...new Set(index.groups.map((group) => group.category))].filter(Boolean));

  const found = index.groups.map((group) => `${group.question}\n${group.id}`.toLowerCase());
  const ACTING = { tool: (row) => row[CALLS] > 0, none: (row) => !row[CALLS],
                   error: (row) => row[ERRORS] > 0, source: (row) => row[KIND] === 1,
                   continuation: (row) => row[KIND] === 2 };

  const outcome = (row) => row[REWARD] === null ? "unscored" : row[REWARD] > 0.5 ? "right" : "wrong";
  const MARKS = { right: "✓", wrong: "✗", unscored: "·" };

  const filter = () => {
    const want = Object.fromEntries(new FormData(form));
    const text = want.text.trim().toLowerCase();
    shown = index.rows.flatMap((row, number) => {
      const group = index.groups[row[GROUP]];
      const keep = (!want.run || group.run === Number(want.run)) && (!want.at || group.at === want.at)
        && (!want.category || group.category === want.category)
        && (!want.outcome || outcome(row) === want.outcome)
        && (!want.acting || ACTING[want.acting](row))
        && (!text || found[row[GROUP]].includes(text) || row[ANSWER].toLowerCase().includes(text));
      return keep ? [number] : [];
    });
    document.getElementById("count").value =
      `${shown.length.toLocaleString("en")} of ${index.rows.length.toLocaleString("en")}`;
    at = shown.indexOf(open);
    sizer.style.height = `${shown.length * ROW}px`;
    list.scrollTop = at >= 0 ? Math.max(0, (at - 2) * ROW) : 0;
    paint();
  };

  const what = (row) => [
    row[CALLS] ? `${row[CALLS]} call${row[CALLS] > 1 ? "s" : ""}` : "no call",
    row[ERRORS] ? `${row[ERRORS]} failed` : "",
    ["", "frozen prefix", "continuation"][row[KIND]]].filter(Boolean).join(" · ");

  const line = (position) => {
    const row = index.rows[shown[position]], group = index.groups[row[GROUP]];
    const found = outcome(row);
    return make("div", {
      class: `row ${found}`, role: "option", id: `row-${position}`,
      "aria-selected": String(position === at), "aria-posinset": position + 1,
      "aria-setsize": shown.length, style: `top:${position * ROW}px`,
      onclick: () => { move(position); show(); } },
      make("span", { class: "mark", role: "img", "aria-label": found }, MARKS[found]),
      make("span", { class: "question" }, group.question),
      make("span", { class: "answer" }, row[ANSWER] || "–"),
      make("span", { class: "about" },
           [Report.runs.length > 1 ? Report.runs[group.run] : "", group.at, what(row)]
             .filter(Boolean).join(" · ")));
  };

  const paint = () => {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
    sizer.replaceChildren(...Array.from({ length: Math.max(0, last - first) },
                                        (_, i) => line(first + i)));
    if (at >= first && at < last) list.setAttribute("aria-activedescendant", `row-${at}`);
    else list.removeAttribute("aria-activedescendant");
  };

  const move = (to) => {
    at = Math.max(0, Math.min(shown.length - 1, to));
    if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
    const below = (at + 1) * ROW - list.clientHeight;
    if (below > list.scrollTop) list.scrollTop = below;
    paint();
  };

  const show = async () => {
    open = shown[at];
    const row = index.rows[open];
    history.replaceState(null, "", `#t${open}`);
    const chunk = await Report.json(`chunk-${Math.floor(row[GROUP] / index.chunk)}`);
    await Report.whole;  // pictures stand at the end of the page
    if (open !== shown[at] && shown.includes(open)) return;  // somebody moved on meanwhile
    Report.show(chunk[row[GROUP] % index.chunk], row[PLACE], index.systems, (place) => {
      const number = index.rows.findIndex((other) => other[GROUP] === row[GROUP] && other[PLACE] === place);
      if (!shown.includes(number)) { form.reset(); filter(); }
      move(shown.indexOf(number));
      return show();
    });
  };

  const page = () => Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const KEYS = { ArrowDown: () => at + 1, ArrowUp: () => at - 1, PageDown: () => at + page(),
                 PageUp: () => at - page(), Home: () => 0, End: () => shown.length - 1 };
  let waiting = 0;
  list.addEventListener("keydown", (event) => {
    if (KEYS[event.key] && shown.length) {
      event.preventDefault();
      move(KEYS[event.key]());
      // Beside the list the trajectory follows the arrows; on a phone it would cover the list.
      clearTimeout(waiting);
      if (!Report.narrow.matches) waiting = setTimeout(show, 60);
    } else if ((event.key === "Enter" || event.key === " ") && at >= 0) {
      event.preventDefault();
      show().then(() => document.getElementById("detail").focus());
    }
  });
  list.addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  addEventListener("resize", paint);
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());

  filter();
  list.dataset.ready = "yes";
  const linked = /^#t(\d+)$/.exec(location.hash);
  if (linked && shown.includes(Number(linked[1]))) {
    move(shown.indexOf(Number(linked[1])));
    document.getElementById("trajectories").scrollIntoView();
    show();
  } else if (!Report.narrow.matches && shown.length) {
    // Something worth looking at first: a recovered prefix, else a rollout with a call.
    const best = [(row) => row[KIND] === 2 && row[REWARD] > 0.5, (row) => row[CALLS] > 0, () => true];
    const first = best.map((test) => shown.findIndex((n) => test(index.rows[n]))).find((i) => i >= 0);
    move(first);
    await show();
    history.replaceState(null, "", location.pathname + location.search);
  }
})();
