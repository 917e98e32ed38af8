// Start: the state from the address, the theme, then curves and inspector.

function applyTheme() {
  const root = document.documentElement;
  if (state.theme === "auto") delete root.dataset.theme;
  else root.dataset.theme = state.theme;
}

function fail(problem) {
  const box = element("failure");
  box.hidden = false;
  box.textContent = `This page cannot show all of its parts: ${problem}`;
  console.error(problem);
}

function start() {
  Object.assign(state, readAddress());
  watchers.unshift([["theme"], applyTheme]);
  bind(element("theme"), "theme", "change");
  applyTheme();
  for (const link of document.querySelectorAll('a[href^="#"]')) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      const section = document.querySelector(link.getAttribute("href"));
      section.scrollIntoView();
      section.querySelector("h2").focus({ preventScroll: true });
    });
  }
  addEventListener("hashchange", () => setState(readAddress()));
  if (!("DecompressionStream" in window)) {
    fail("the browser lacks DecompressionStream; Chromium 80, Firefox 113, Safari 16.4 and later have it.");
    return;
  }
  const parts = [];
  if (element("inspect")) parts.push(openInspector().then(() => (document.documentElement.dataset.inspector = "ready")));
  if (element("charts")) parts.push(openCurves().then(() => (document.documentElement.dataset.curves = "ready")));
  for (const part of parts) part.catch((problem) => fail(problem.message ?? problem));
}

start();
