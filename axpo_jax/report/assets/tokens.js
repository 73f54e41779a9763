// Tokens as text, coloured by advantage or by the probability that the sampler gave them.
(() => {
  const { make } = Report;
  const TAG = /^<[^<>]*>$/;
  Report.mode = "advantage";

  const signed = (x) => (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(2);
  Report.signed = signed;

  // How a token looks: its classes, the strength of its colour, and what it says when asked.
  const look = (p, advantage) => {
    const words = [];
    if (p !== null && p !== undefined) words.push(`probability ${(p / 1000).toFixed(3)}`);
    if (advantage === null) words.push("not trained on");
    else if (advantage !== undefined) words.push(`advantage ${signed(advantage)}`);
    let kind = "", strength = 0;
    if (Report.mode === "advantage" && advantage === null) kind = "masked";
    else if (Report.mode === "advantage" && advantage) {
      kind = advantage > 0 ? "gain" : "loss";
      strength = Math.min(1, 0.25 + Math.abs(advantage) / 2.5);
    } else if (Report.mode === "confidence" && p !== null && p !== undefined) {
      kind = "doubt";
      strength = Math.round(10 * (1 - p / 1000)) / 10;  // tenths: equal neighbours become one span
    }
    return { kind: strength || kind === "masked" ? kind : "", strength, words: words.join(" · ") };
  };

  // The tokens [from, to) of a segment. advantage: number, null (masked) or undefined (not known).
  Report.tokens = (segment, advantage, from = 0, to = segment.tokens.length) => {
    const out = [];
    let plain = "";
    const flush = () => { if (plain) out.push(plain); plain = ""; };
    for (let i = from; i < to; i += 1) {
      const text = segment.tokens[i];
      const { kind, strength, words } = segment.p ? look(segment.p[i], advantage)
                                                  : { kind: "", words: "" };
      const tag = TAG.test(text.trim());
      if (!kind && !tag && !(segment.p && Report.mode !== "plain")) { plain += text; continue; }
      flush();
      out.push(make("span", { class: `t ${kind} ${tag ? "tag" : ""}`, title: words || null,
                              style: strength ? `--s:${strength.toFixed(2)}` : null }, text));
    }
    flush();
    return out;
  };
})();
