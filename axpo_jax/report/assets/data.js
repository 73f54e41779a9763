// Data blocks of the page: base64, gzip, JSON. Unpacked when somebody asks, and kept.
"use strict";
const Report = {};
(() => {
  const kept = new Map();

  // The parser may still be reading the end of the page when a script asks for it.
  Report.whole = new Promise((done) => {
    if (document.readyState !== "loading") done();
    else document.addEventListener("DOMContentLoaded", () => done());
  });

  Report.text = async (id) => {
    let block = document.getElementById(`block-${id}`);
    if (!block) {
      await Report.whole;
      block = document.getElementById(`block-${id}`);
    }
    const bytes = Uint8Array.from(atob(block.textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  Report.json = (id) => {
    if (!kept.has(id)) kept.set(id, Report.text(id).then(JSON.parse));
    return kept.get(id);
  };

  // An image of the page: {uri, width, height} of the original; uri is "" where the file was missing.
  Report.image = (key) => {
    const block = document.getElementById(`image-${key}`);
    const [width, height] = (block ? block.dataset.size : "1 1").split(" ").map(Number);
    return { uri: block ? block.textContent : "", width, height };
  };

  Report.runs = JSON.parse(document.getElementById("runs").textContent);

  // make("p", {class: "note"}, "text", child, ...): an element. Text is never read as HTML.
  Report.make = (tag, attributes, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) {
        element.setAttribute(name, value === true ? "" : value);
      }
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  };

  Report.colour = (name) => getComputedStyle(document.documentElement)
    .getPropertyValue(name).trim();

  Report.dark = matchMedia("(prefers-color-scheme: dark)");
})();
