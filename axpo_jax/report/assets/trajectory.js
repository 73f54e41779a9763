// One trajectory: the question, its siblings, and turn by turn what was thought, called and seen.
(() => {
  const { make, signed } = Report;
  const PROMPT = 0, THINK = 1, CALL = 2, OBSERVATION = 3, ANSWER = 4, USER = 5;
  const NAMES = { [THINK]: "thinking", [CALL]: "call", [OBSERVATION]: "observation", [ANSWER]: "answer", [USER]: "user" };
  // Longer prompts are folded: what was done about them matters more.
  const LONG = 700;
  const IMAGE = "\ufffc";
  // The template's own marks; what stands between them is what the tool said.
  const MARKS = /<\|[^|]*\|>|<\/?tool_response>/g;
  Report.narrow = matchMedia("(max-width: 760px)");
  const detail = document.getElementById("detail"), browser = document.getElementById("browser");
  let current = null;

  const picture = (image, label, call) => {
    const { uri, width, height } = Report.image(image.key);
    if (!uri) return make("figure", { class: "shot" }, make("figcaption", {}, `${label} (file missing)`));
    // Small at first, so that the text stays in sight; a click or Enter shows all there is.
    const frame = make("button", { type: "button", class: "frame", "aria-pressed": "false",
      "aria-label": `${label}: enlarge`, title: "enlarge", onclick: () => {
        const large = frame.classList.toggle("large");
        frame.setAttribute("aria-pressed", String(large));
        frame.title = large ? "shrink" : "enlarge"; } },
      make("img", { src: uri, alt: label, width, height, class: width < 120 ? "tiny" : null }));
    if (call) frame.append(outline(call.box.corners, call.error));
    return make("figure", { class: "shot" }, frame,
                make("figcaption", {}, `${label} · ${width} × ${height}`));
  };

  const outline = ([x1, y1, x2, y2], failed) => {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 1000 1000");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("class", `box${failed ? " failed" : ""}`);
    svg.setAttribute("aria-hidden", "true");
    for (const kind of ["under", "over"]) {
      const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      for (const [name, value] of Object.entries({ x: Math.min(x1, x2), y: Math.min(y1, y2),
             width: Math.abs(x2 - x1), height: Math.abs(y2 - y1), class: kind })) {
        rect.setAttribute(name, value);
      }
      svg.append(rect);
    }
    return svg;
  };

  // Tokens of a rollout that carry its advantage: number, null (masked), undefined (not in the dump).
  const credit = (rollout, behindPrefix) => {
    if (rollout.advantage === undefined) return undefined;
    return rollout.region === "prefix" && behindPrefix ? null : rollout.advantage;
  };

  // The blocks of tokens [from, to) of a rollout, by turn.
  const blocks = (group, rollout, from, to, behindPrefix = false) => {
    const images = [...group.images, ...rollout.images];
    const out = [];
    let calls = 0, pictures = group.images.length;
    for (const segment of rollout.segments) {
      const start = Math.max(0, from - segment.at);
      const stop = Math.min(segment.tokens.length, to - segment.at);
      const call = segment.kind === CALL ? rollout.calls[calls++] : null;
      const seen = segment.tokens.filter((text) => text === IMAGE).length;
      const own = images.slice(pictures, pictures + seen);
      const first = pictures;
      pictures += seen;
      if (start >= stop || !NAMES[segment.kind]) continue;
      if (segment.kind === ANSWER && !segment.tokens.slice(start, stop).join("").replace(MARKS, "").trim()) continue;
      const body = segment.kind === OBSERVATION || segment.kind === USER
        ? observation(segment, own, first)
        : [make("div", { class: "text" }, Report.tokens(segment, credit(rollout, behindPrefix), start, stop))];
      // A call that is cut open by the prefix shows its box where its arguments are.
      if (call && stop === segment.tokens.length && to > segment.at + 1) body.push(...looked(call, images));
      out.push(make("div", { class: `block ${NAMES[segment.kind]}` },
                    make("h4", {}, NAMES[segment.kind], call && call.error && stop > start + 1
                      ? make("span", { class: "bad" }, call.error.replaceAll("_", " ")) : null), body));
    }
    return out;
  };

  const looked = (call, images) => {
    const image = call.box && images[call.box.image];
    return image ? [picture(image, `where it looked, in image ${call.box.image}`, call)] : [];
  };

  const observation = (segment, images, first) => {
    const text = segment.tokens.join("").replaceAll(IMAGE, "").replace(MARKS, "")
      .replace(/^\s*user\n/, "").trim();
    return [text ? make("div", { class: "text" }, text) : null,
            make("div", { class: "shots" }, images.map((image, i) => picture(image, `image ${first + i}`)))];
  };

  // right, wrong, or unscored: other makers' logs need not say.
  const outcome = (rollout) => rollout.reward === null ? "unscored" : rollout.reward > 0.5 ? "right" : "wrong";

  const verdict = (rollout) => {
    const found = outcome(rollout);
    return make("p", { class: `verdict ${found}` },
      make("strong", {}, { right: "✓ right", wrong: "✗ wrong", unscored: "not scored" }[found]),
      make("span", {}, `answered ${rollout.answer ?? "nothing"}`),
      rollout.stop === "answer" ? null : make("span", {}, `stopped: ${rollout.stop.replaceAll("_", " ")}`),
      rollout.advantage === undefined ? null
        : make("span", {}, `${rollout.region === "prefix" ? "prefix " : ""}advantage ${signed(rollout.advantage)}`));
  };

  const strip = (group, place, go) => make("div", { class: "strip", role: "group", "aria-label": "Rollouts of this question" },
    group.rollouts.map((rollout, i) => {
      const kind = rollout.branch !== undefined ? "continuation" : "rollout";
      const label = `${kind} ${i + 1}: ${outcome(rollout)}, `
        + `${rollout.calls.length || "no"} call${rollout.calls.length === 1 ? "" : "s"}`
        + (rollout.frozen === undefined ? "" : ", prefix frozen");
      return make("button", { type: "button", title: label, "aria-label": label,
        "aria-current": i === place ? "true" : null,
        class: `chip ${outcome(rollout)} ${kind} ${rollout.calls.length ? "tool" : ""}`,
        onclick: () => go(i).then(() => detail.querySelector(".chip[aria-current]")?.focus()) },
        rollout.frozen === undefined ? (rollout.calls.length ? "●" : "○") : "❄");
    }));

  const KEY = "round: continuation · ● called a tool · ○ did not · ❄ prefix frozen here";

  const question = (text) => text.length <= LONG ? make("h3", { class: "asked" }, text)
    : make("details", { class: "asked" }, make("summary", {}, `${text.slice(0, 200).replace(/\s+/g, " ")} … (${text.length.toLocaleString("en")} characters)`),
           make("div", {}, text));

  const colouring = () => make("div", { class: "modes", role: "radiogroup", "aria-label": "Colour tokens by" },
    make("span", { class: "title" }, "colour by"),
    [["advantage", "advantage"], ["confidence", "confidence"], ["plain", "nothing"]].map(([mode, name]) =>
      make("label", {}, make("input", { type: "radio", name: "mode", value: mode, checked: mode === Report.mode,
        onchange: () => { Report.mode = mode; draw(); detail.querySelector(`input[value=${mode}]`).focus(); } }), name)),
    make("span", { class: "legend" }, LEGENDS[Report.mode].map(([kind, strength, words]) =>
      make("span", { class: `t ${kind}`, style: `--s:${strength}` }, words))));

  const LEGENDS = {
    advantage: [["loss", 0.8, "pushed down"], ["gain", 0.8, "pushed up"], ["masked", 0, "not trained on"]],
    confidence: [["doubt", 1, "unlikely"], ["doubt", 0.5, "even"], ["", 0, "sure"]], plain: [] };

  const branch = (group, source, place) => {
    const rollout = group.rollouts[source], end = rollout.frozen;
    const own = group.rollouts.map((other, i) => [other, i]).filter(([other]) => other.source === source && other.branch !== undefined);
    const right = own.filter(([other]) => other.reward > 0.5).length;
    return [
      make("div", { class: "fork" },
        make("section", { class: "prefix", "aria-label": "Frozen prefix" },
          make("h3", {}, "Frozen prefix"),
          make("p", { class: "note" }, rollout.advantage === undefined ? "up to the opening of the call"
            : `up to the opening of the call · advantage ${signed(rollout.advantage)}`),
          blocks(group, rollout, rollout.start, end)),
        make("section", { class: "continuations", "aria-label": "Continuations" },
          make("h3", {}, `${own.length} continuations, ${right} right`),
          make("p", { class: "note" }, right ? "the prefix is credited as recovered" : "none recovered it"),
          make("div", { class: "cards", tabindex: "0" }, own.map(([other, i]) =>
            make("article", { class: `card ${i === place ? "chosen" : ""}` }, verdict(other),
                 blocks(group, other, other.start, Infinity)))))),
      make("details", { class: "abandoned", open: source === place },
        make("summary", {}, "How the source went on"), verdict(rollout),
        blocks(group, rollout, end, Infinity, true))];
  };

  const draw = () => {
    const { group, place, systems, go } = current;
    const rollout = group.rollouts[place];
    const source = rollout.branch !== undefined ? rollout.source : rollout.frozen !== undefined ? place : null;
    const top = detail.scrollTop;
    detail.replaceChildren(
      make("button", { type: "button", class: "back", onclick: close }, "← all trajectories"),
      make("header", { class: "head" },
        make("div", { class: "shots" }, group.images.map((image, i) => picture(image, `image ${i}`))),
        make("div", {}, make("p", { class: "note" }, [Report.runs.length > 1 ? Report.runs[group.run] : "", group.at, group.category, group.id]
          .filter(Boolean).join(" · ")),
        question(group.question),
        group.gold.length ? make("p", { class: "gold" }, "right answer ", make("b", {}, group.gold.join(" or "))) : null,
        strip(group, place, go), make("p", { class: "note" }, KEY))),
      rollout.segments.some((segment) => segment.p) ? colouring() : "",  // logs of texts have no tokens
      ...(source === null ? [verdict(rollout), ...blocks(group, rollout, rollout.start, Infinity)]
                          : branch(group, source, place)),
      group.system < 0 ? "" : make("details", { class: "system" }, make("summary", {}, "System prompt"),
                                   make("pre", {}, systems[group.system])));
    detail.scrollTop = top;
    const chosen = detail.querySelector(".cards .chosen");
    if (chosen) chosen.parentElement.scrollLeft = chosen.offsetLeft - chosen.parentElement.offsetLeft;
  };

  const close = () => {
    browser.classList.remove("opened");
    document.body.classList.remove("covered");
    document.getElementById("list").focus();
  };

  Report.show = (group, place, systems, go) => {
    const same = current?.group === group && current.place === place;
    if (current?.group !== group) detail.scrollTop = 0;
    // Dumps of other makers have no advantages; something to see is better than nothing.
    if (!current && group.rollouts[place].advantage === undefined) Report.mode = "confidence";
    current = { group, place, systems, go };
    // Shown again it stays as it is: enlarged pictures, the focus, what was unfolded.
    if (!same) draw();
    detail.dataset.shown = `${group.id} ${place}`;
    browser.classList.add("opened");
    document.body.classList.toggle("covered", Report.narrow.matches);
  };

  detail?.addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
})();
