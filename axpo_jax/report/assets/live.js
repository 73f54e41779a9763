// The page of a run that is going on: asks its server for news, and shows them when nobody is reading.
(() => {
  const note = document.getElementById("news"), button = note.querySelector("button");
  let version = null;
  const show = () => location.reload();
  button.addEventListener("click", show);
  setInterval(async () => {
    let found;
    try {
      found = await (await fetch("version", { cache: "no-store" })).text();
    } catch {
      note.hidden = false;
      note.firstElementChild.textContent = "The server of this page has ended.";
      button.hidden = true;
      return;
    }
    if (version !== null && found !== version) {
      // Who has a trajectory open reads it to its end.
      if (!location.hash) return show();
      note.hidden = false;
    }
    version = version ?? found;
  }, 3000);
})();
